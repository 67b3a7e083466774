# SPDX-License-Identifier: Apache-2.0
"""Saving: a smaller model as a folder without pickle or code."""
