# SPDX-License-Identifier: Apache-2.0
"""Path: the family of models of one run, recorded while it trains and read again from its file."""
