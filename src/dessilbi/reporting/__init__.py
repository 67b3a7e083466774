# SPDX-License-Identifier: Apache-2.0
"""Reporting: a run folder becomes numbers, and numbers become tables and figures."""
