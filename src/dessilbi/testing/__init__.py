# SPDX-License-Identifier: Apache-2.0
"""Promises of this library as checks that anyone can run on their own classes."""

from dessilbi.testing.contract import check_optimizer as check_optimizer
from dessilbi.testing.contract import parametrize_with_checks as parametrize_with_checks
