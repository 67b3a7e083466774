# SPDX-License-Identifier: Apache-2.0
"""Compaction: a closed ticket becomes a smaller model, certified to compute the same."""
