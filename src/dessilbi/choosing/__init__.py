# SPDX-License-Identifier: Apache-2.0
"""Choosing: blocks in an order, and the largest ticket of that order within a budget."""
