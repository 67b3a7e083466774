# SPDX-License-Identifier: Apache-2.0
"""What a page is made of: its template, style sheet and script."""
