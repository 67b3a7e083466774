# SPDX-License-Identifier: Apache-2.0
"""What the doctor finds."""

import pytest
import torch
from tiny import FEW

from dessilbi.reporting import doctor
from dessilbi.training.data import DATA_SETS


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    """The sets are read in other tests; here only whether they can be is of interest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "DATA_SETS", {"few": FEW, "mnist": DATA_SETS["mnist"]})


def test_versions_devices_kernels_data_and_write_access_are_told(tmp_path):
    found = list(doctor.findings(None))
    told = dict(found)
    assert torch.__version__.startswith(told["torch"])
    assert {"python", "devices", "kernels", "data", "runs"} <= set(told)
    assert told["runs"] == f"{tmp_path} is writable"
    lines = [value for name, value in found if name == ""]
    assert "few: ready" in lines
    for name in ("mnist", "tinyshakespeare"):
        assert any(line.startswith(f"{name}: ") and "ready" not in line for line in lines)
    assert not any("\n" in value for _, value in found)


def test_the_fused_kernel_is_built_can_be_built_or_cannot(kernel_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "some-compiler")
    assert doctor._fused() == "fused-cpu (fused=True builds it with some-compiler)"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._fused().startswith("fused-cpu (cannot be built: no C++ compiler was found")
    monkeypatch.setenv("DESSILBI_CACHE", str(kernel_cache))
    assert doctor._fused() == "fused-cpu (built)"


def test_a_data_folder_is_named(tmp_path):
    assert dict(doctor.findings(str(tmp_path)))["data"] == str(tmp_path)


def test_a_place_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert doctor._write_access(tmp_path) == (
        f"{tmp_path} is not writable: name another folder with --out"
    )


def test_a_full_disk_is_told(monkeypatch, tmp_path):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert "(No space left on device)" in doctor._write_access(tmp_path / "runs")


def test_a_file_in_the_place_of_the_runs_folder_is_told(tmp_path):
    (tmp_path / "runs").write_text("x")
    assert "is writable" not in doctor._write_access(tmp_path / "runs")
