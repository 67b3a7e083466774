# SPDX-License-Identifier: Apache-2.0
"""The wheel holds what the package needs, and works on a machine without a compiler."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAIN = """
import warnings

import torch

import dessilbi

weight = torch.nn.Parameter(torch.linspace(-1, 1, 24).reshape(6, 4))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        optimizer = dessilbi.DessiLBI([("w", weight)], lr=0.1, structure="filter", fused=True)
        weight.grad = weight.detach().clone()
        optimizer.step()
print(dessilbi.__file__, optimizer.kernel, float(weight[0, 0]) > -1, sep="\\n")
print(*[warning.message for warning in told], sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the source tree."""
    wheels = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = wheels.WheelBuilder(str(ROOT)).build(directory=str(folder))
    return Path(built)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """What an installation of the wheel puts among other packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder


def python(installed, cache, *arguments):
    """Run Python with the installed wheel, where no compiler can be found."""
    dropped = ("CC", "CXX", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PATH": str(cache / "no-programs"), "DESSILBI_CACHE": str(cache)}
    environment |= {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def test_the_wheel_holds_every_file_of_the_package(wheel):
    source = ROOT / "src" / "dessilbi"
    files = {str(f.relative_to(ROOT / "src")) for f in source.rglob("*") if f.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert files <= packed
    for name in ("kernels/native/step.cpp", "kernels/native/arithmetic.h", "py.typed"):
        assert f"dessilbi/{name}" in packed
    assert "dessilbi/recipes/digits-lenet.toml" in packed


def test_without_a_compiler_the_installed_wheel_steps_after_one_warning(installed, tmp_path):
    done = python(installed, tmp_path, "-c", TRAIN)
    assert done.returncode == 0, done.stderr
    place, kernel, moved, warning = done.stdout.splitlines()
    assert Path(place).is_relative_to(installed)
    assert (kernel, moved) == ("reference", "True")
    assert warning.startswith("fused=True falls back to the slower reference step")
    assert "no C++ compiler was found" in warning


@pytest.mark.full
def test_without_a_compiler_the_installed_wheel_passes_the_tests_of_the_optimizer(
    installed, tmp_path
):
    files = ("optimizer", "contract", "fused", "carrying", "building", "wrapping", "laws")
    tests = [f"tests/test_{name}.py" for name in files]
    done = python(installed, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "there is no C++ compiler to build the fused kernel with" in done.stdout
