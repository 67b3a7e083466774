# SPDX-License-Identifier: Apache-2.0
"""What all tests share: where helper modules lie, hypothesis profiles, real data."""

import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tests import `oracle` and `strategies`, which lie beside them.
sys.path.insert(0, str(Path(__file__).parent))

# What a shell starts in the background ignores Ctrl-C, and so would everything that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="session", autouse=True)
def no_kernel_unless_asked_for(tmp_path_factory):
    """Tests step as a fresh install does; what somebody has built at home plays no part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DESSILBI_CACHE", str(tmp_path_factory.mktemp("no-kernel")))
        yield


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory):
    """A folder with the built CPU kernel, compiled once for all processes of a test run."""
    from dessilbi.kernels import building  # loads torch

    if not any(shutil.which(name) for name in building.COMPILERS):
        pytest.skip("there is no C++ compiler to build the fused kernel with")
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DESSILBI_CACHE", str(shared / "kernel"))
        building.build()
    return shared / "kernel"


@pytest.fixture
def built_kernel(kernel_cache, monkeypatch):
    """Let a test step with the built CPU kernel."""
    monkeypatch.setenv("DESSILBI_CACHE", str(kernel_cache))


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    """An empty folder to call commands in, where the data set "few" is known.

    Commands set the handler of SIGTERM, how warnings are shown, and flush denormals.
    """
    import tiny  # loads torch
    import torch

    from dessilbi.training.data import DATA_SETS

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DESSILBI_DATA", raising=False)
    monkeypatch.setitem(DATA_SETS, "few", tiny.FEW)
    handler, show = signal.getsignal(signal.SIGTERM), warnings.showwarning
    yield
    signal.signal(signal.SIGTERM, handler)
    warnings.showwarning = show
    torch.set_flush_denormal(False)
