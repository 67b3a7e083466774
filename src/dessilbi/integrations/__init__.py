# SPDX-License-Identifier: Apache-2.0
"""Integrations: DessiLBI in other people's trainers, one file each.

Imported only when asked for: each needs the library of its name, an extra of this package.
"""
