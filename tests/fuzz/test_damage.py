# SPDX-License-Identifier: Apache-2.0
"""A damaged file is refused in one sentence or read right: never a traceback, never a wrong number.

The seeds are fixed, so that a failure names its copy and comes again.
"""

import damaged
import pytest

COUNT, LONG = 30, 1000  # damaged copies of each file


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return {form.name: form for form in damaged.formats(tmp_path_factory.mktemp("samples"))}


def checked(samples, count, seed):
    """Damage every format; return how many copies were refused, by name."""
    refused = {}
    for name, form in samples.items():
        told = damaged.damage(form, count, seed)
        assert told.total() == count
        refused[name] = told["refused"]
    return refused


def test_damaged_copies_of_every_format_are_refused_or_read_right(samples):
    refused = checked(samples, COUNT, seed=0)
    assert COUNT * len(refused) >= 500
    guarded = [name for name, form in samples.items() if form.guarded and form.accepts is None]
    assert all(refused[name] >= COUNT // 2 for name in guarded), refused
    assert all(refused.values()), refused


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 4))
def test_thousands_of_damaged_copies_are_refused_or_read_right(samples, seed):
    checked(samples, LONG, seed)
