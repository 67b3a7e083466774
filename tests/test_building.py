# SPDX-License-Identifier: Apache-2.0
"""Building the native kernel: on request only, once, and never in the way of training."""

import shutil
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dessilbi import DessiLBI
from dessilbi.kernels import building
from dessilbi.optimizers import fusing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no compiler but the one a test sets."""
    monkeypatch.setenv("DESSILBI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return tmp_path / "cache"


@pytest.fixture
def fake_compiler(cache, tmp_path, monkeypatch):
    """A compiler that notes that it was called, takes its time and writes what it is told."""

    def set_up(content="kernel", status=0):
        log, script = tmp_path / "calls", tmp_path / "compiler.py"
        script.write_text(
            "import sys, time\n"
            f"open({str(log)!r}, 'a').write('called\\n')\n"
            "time.sleep(0.3)\n"
            f"open(sys.argv[-1], 'w').write({content!r})\n"
            "print('step.cpp:1: something is wrong', file=sys.stderr)\n"
            f"sys.exit({status})\n"
        )
        monkeypatch.setenv("CXX", f"{sys.executable} {script}")
        return lambda: log.read_text().count("called") if log.exists() else 0

    return set_up


def weights():
    return nn.Parameter(torch.linspace(-1, 1, 24).reshape(6, 4))


def trained(**options):
    p = weights()
    optimizer = DessiLBI([("w", p)], lr=0.1, nu=0.5, lam=0.8, structure="filter", **options)
    for _ in range(8):
        p.grad = 0.1 * p.detach()
        optimizer.step()
    assert 0 < optimizer.support().density < 1
    return p, optimizer


def test_without_a_compiler_there_is_one_warning_and_the_same_numbers(cache):
    with pytest.warns(UserWarning, match=r"slower reference step .* no C\+\+ compiler") as told:
        runs = [trained(fused=True) for _ in range(2)]
    assert len(told) == 1
    p, optimizer = runs[0]
    assert optimizer.kernel == "reference"
    assert_close(p, trained(fused=False)[0], rtol=0, atol=0)


def test_a_compiler_that_fails_is_told_in_one_sentence_and_leaves_nothing(cache, fake_compiler):
    calls = fake_compiler(status=1)
    with pytest.raises(building.NoKernelError, match=r"could not compile .*something is wrong$"):
        building.build()
    assert calls() == len(building.NATIVE)
    assert building.find() is None
    assert not list(cache.glob("*.so"))
    with pytest.warns(UserWarning, match="could not compile"):
        assert trained(fused=True)[1].kernel == "reference"


def test_a_cache_that_cannot_be_written_to_is_told(cache, fake_compiler):
    fake_compiler()
    cache.write_text("a file where the folder should be")
    with pytest.raises(building.NoKernelError, match=r"building the native kernel into .* failed"):
        building.build()


def test_a_library_that_does_not_load_is_not_used(cache, fake_compiler):
    fake_compiler(content="no library")
    with pytest.warns(UserWarning, match="falls back to the slower reference step"):
        assert trained(fused=True)[1].kernel == "reference"
    assert building.find() is not None
    assert trained()[1].kernel == "reference"


@pytest.mark.parametrize("damage", [lambda x: x[:-4096], lambda x: b"", lambda x: x[:-1] + b"!"])
def test_a_damaged_library_is_never_loaded_and_is_built_again(kernel_cache, cache, damage):
    found = next(kernel_cache.glob("*.so"))
    cache.mkdir()
    whole = found.read_bytes()
    (cache / found.name).write_bytes(damage(whole))
    assert building.find() is None
    assert trained()[1].kernel == "reference"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_compile", lambda *_: (cache / found.name).write_bytes(whole))
        patch.setenv("CXX", "compiler")
        building.build()
    assert building.find() == cache / found.name
    assert trained()[1].kernel == "fused-cpu"


def test_a_full_disk_is_told_and_leaves_nothing(cache, fake_compiler, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    fake_compiler()
    monkeypatch.setattr(building.tempfile, "TemporaryDirectory", full)
    with pytest.raises(building.NoKernelError, match=r"failed: .*No space left on device$"):
        building.build()
    assert not list(cache.glob("*.so"))


def test_a_compiler_that_runs_out_of_disk_is_told(cache, tmp_path, monkeypatch):
    script = tmp_path / "compiler.py"
    script.write_text(
        "import sys\nopen(sys.argv[-1], 'w').write('half')\n"
        "sys.exit('In file included from step.cpp:1:\\nstep.s: error: No space left on device')"
    )
    monkeypatch.setenv("CXX", f"{sys.executable} {script}")
    with pytest.raises(building.NoKernelError, match=r"kernel: step\.s: error: No space left"):
        building.build()
    assert [file.suffix for file in cache.iterdir()] in ([], [".lock"])


@pytest.mark.parametrize(
    ("told", "message"),
    [("g++ '", "is no command"), ("/nowhere/g++", r"failed: .*No such file"), (" ", "no C\\+\\+")],
)
def test_a_compiler_that_is_none_is_told(cache, monkeypatch, told, message):
    monkeypatch.setenv("CXX", told)
    with pytest.raises(building.NoKernelError, match=message):
        building.build()


def test_without_a_home_folder_nothing_is_built_and_training_goes_on(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("DESSILBI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(building.Path, "home", homeless)
    fusing._prepare.cache_clear()
    assert trained()[1].kernel == "reference"
    with pytest.warns(UserWarning, match="no home folder .* DESSILBI_CACHE"):
        assert trained(fused=True)[1].kernel == "reference"
    fusing._prepare.cache_clear()


def test_where_files_cannot_be_locked_it_is_built_without(cache, fake_compiler, monkeypatch):
    fake_compiler()
    # What filelock itself raises on a file system without locks.
    unlockable = mock.Mock(side_effect=NotImplementedError("FileSystem does not appear to support"))
    monkeypatch.setattr(building, "FileLock", unlockable)
    assert building.build() == building.find()
    unlockable.assert_called()


def test_a_torch_without_threads_to_share_is_told(built_kernel, monkeypatch, tmp_path):
    from dessilbi.kernels import cpu

    monkeypatch.setattr(cpu.torch, "__file__", str(tmp_path / "__init__.py"))
    cpu._parallel_for.cache_clear()
    with pytest.raises(OSError, match="has no torch_parallel_for"):
        cpu.CpuKernel(building.find())
    cpu._parallel_for.cache_clear()


def test_nothing_is_built_unless_asked_for(cache, fake_compiler):
    calls = fake_compiler()
    for options in ({}, {"fused": False}, {"foreach": True}):
        trained(**options)
    assert calls() == 0
    assert not cache.exists()


def test_two_processes_compile_once(cache, fake_compiler):
    calls = fake_compiler()
    # Without the package, which would load torch.
    code = f"import runpy; print(runpy.run_path({building.__file__!r})['build']())"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = {process.communicate()[0].strip() for process in both}
    assert told == {str(building.find())}
    assert [process.returncode for process in both] == [0, 0]
    assert calls() == 1


def test_the_library_is_named_after_source_flags_and_processor(cache, monkeypatch, tmp_path):
    names = {building.place().name}
    other = tmp_path / "native"
    shutil.copytree(building.SOURCES, other)
    (other / "arithmetic.h").write_text("// something else\n")
    changes = {"SOURCES": other, "FLAGS": ("-O0",), "_processor": lambda: "another"}
    for name, value in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(building, name, value)
            building._key.cache_clear()
            names.add(building.place().name)
        building._key.cache_clear()
    assert len(names) == 4
    assert building.place().name in names
    assert building.place().parent == cache


def test_the_cache_is_the_users_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("DESSILBI_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert building.cache_folder() == tmp_path / "dessilbi"


def test_the_built_kernel_is_used_without_asking_and_without_a_warning(built_kernel):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained()[1].kernel == trained(fused=True)[1].kernel == "fused-cpu"


def test_a_kernel_of_another_release_is_not_used(built_kernel, monkeypatch):
    from dessilbi.kernels import cpu

    monkeypatch.setattr(cpu, "_Tensor", cpu._Unit)
    cpu.load.cache_clear()
    with pytest.raises(OSError, match="does not fit this release"):
        cpu.load(building.find())
    cpu.load.cache_clear()


def test_there_is_no_kernel_where_none_was_built_or_none_exists():
    assert fusing.kernel_for("cpu", asked=True) is None
    assert fusing.kernel_for("mps", asked=True) is None
