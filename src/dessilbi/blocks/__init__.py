# SPDX-License-Identifier: Apache-2.0
"""Blocks: what a structure divides a tensor into, on one rank or many, and tickets, masks of them.

Everything else speaks of blocks in these words; nothing here knows an optimizer or a graph.
"""
