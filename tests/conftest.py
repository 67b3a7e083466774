# SPDX-License-Identifier: Apache-2.0
"""What all tests share: where helper modules lie, hypothesis profiles, real data."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tests import `oracle` and `strategies`, which lie beside them.
sys.path.insert(0, str(Path(__file__).parent))

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "long", deadline=None, max_examples=2000, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def data_root():
    """The folder of real data sets; tests that ask for it are skipped where there is none."""
    folder = os.environ.get("DESSILBI_DATA")
    if not folder:
        pytest.skip("set DESSILBI_DATA to the folder of the data sets to run this test")
    if not Path(folder).is_dir():
        pytest.skip(f"DESSILBI_DATA={folder} is not a folder")
    return Path(folder)
