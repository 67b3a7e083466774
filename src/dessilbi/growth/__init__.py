# SPDX-License-Identifier: Apache-2.0
"""Growth: wider units that compute the same, by the same cuts that make a model smaller."""
