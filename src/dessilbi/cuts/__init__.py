# SPDX-License-Identifier: Apache-2.0
"""Cuts: a ticket extended to all that hangs on it, as kept indices, and what these leave."""
