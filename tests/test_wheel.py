# SPDX-License-Identifier: Apache-2.0
"""The wheel holds what the package needs, and works on a machine without a compiler.

So does the wheel that pip builds of the source distribution: it is the same.
"""

import os
import subprocess
import sys
import tarfile
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
def unpacked(tmp_path_factory):
    """A source distribution of the source tree, unpacked as pip does."""
    sdists = pytest.importorskip("hatchling.builders.sdist")
    folder = tmp_path_factory.mktemp("sdist")
    (built,) = sdists.SdistBuilder(str(ROOT)).build(directory=str(folder))
    with tarfile.open(built) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    return root


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


BUILD = "import hatchling.build, sys; hatchling.build.build_wheel(sys.argv[1])"  # what pip calls


def contents(wheel):
    with zipfile.ZipFile(wheel) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def test_the_wheel_built_of_the_source_distribution_is_the_same(wheel, unpacked, tmp_path):
    called = [sys.executable, "-c", BUILD, str(tmp_path)]
    done = subprocess.run(called, cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert built.name == wheel.name
    ours, theirs = contents(wheel), contents(built)
    assert len(ours) > 100
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_the_source_distribution_holds_what_its_tests_and_commands_need(unpacked):
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone, whose files could be listed")
    called = ["git", "ls-files", "src", "tests", "docs", "examples"]
    listed = subprocess.run(called, cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout
    files = listed.stdout.splitlines()
    assert [file for file in files if not (unpacked / file).is_file()] == []


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
