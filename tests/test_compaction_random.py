# SPDX-License-Identifier: Apache-2.0
"""Random nets and random tickets: the compacted model is equal or refused, never wrong."""

import pytest
from random_nets import outcomes


@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.full)])
def test_random_nets_are_equal_or_refused(count):
    seen = outcomes(count)
    assert len(seen) >= count
    assert seen.count("equal") >= 0.7 * len(seen)
