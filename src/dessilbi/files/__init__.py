# SPDX-License-Identifier: Apache-2.0
"""Files: durable writing, and what lies in a run folder. No torch but in ``tensorfiles``."""
