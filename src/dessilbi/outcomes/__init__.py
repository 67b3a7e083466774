# SPDX-License-Identifier: Apache-2.0
"""Outcomes: what a finished run folder gives: tickets, smaller models, and whether it is whole."""
