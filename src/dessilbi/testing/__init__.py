# SPDX-License-Identifier: Apache-2.0
"""Promises of this library as checks that anyone can run, and material for tests."""

from dessilbi.testing.contract import check_optimizer as check_optimizer
from dessilbi.testing.contract import parametrize_with_checks as parametrize_with_checks
from dessilbi.testing.tickets import random_ticket as random_ticket
