# SPDX-License-Identifier: Apache-2.0
"""Training: the one loop behind the command line, with its data, models and recipes."""
