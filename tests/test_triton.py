# SPDX-License-Identifier: Apache-2.0
"""The fused step for CUDA without a GPU: run in Triton's interpreter, and compiled for a GPU."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI
from dessilbi.optimizers import fusing
from dessilbi.optimizers.options import check_group

pytest.importorskip("triton")

COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dessilbi.kernels import triton as kernels

GPU = GPUTarget("cuda", 90, 32)


def built(kernel, types, **constants):
    signature = dict(zip(kernel.arg_names, types, strict=False))
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): x for name, x in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=places)
    options = {"enable_fp_fusion": True}
    return "atom" in triton.compile(source, target=GPU, options=options).asm["ptx"]


atomic = [built(kernels.write, ["*i64"] + ["i64"] * 10), built(kernels.scales, ["*i64"] * 5)]
types = ["*i64"] * 4 + ["*fp32", "*fp32", "i32"]
for stored, wide, kind, momentum, couple in (
    (tl.float32, tl.float32, kernels.MANY, True, False),
    (tl.bfloat16, tl.float32, kernels.SOFT, False, False),
    (tl.float64, tl.float64, kernels.MANY, False, True),
):
    shape = {"HIGH": 8, "WIDTH": 128, "MOMENTUM": momentum, "COUPLE": couple}
    atomic.append(built(kernels.advance, types, STORED=stored, WIDE=wide, KIND=kind, **shape))
print("compiled", len(atomic), "atomic", sum(atomic))
"""


def python(*arguments, **environment):
    """Run Python in a process of its own: Triton decides at its import whether it interprets."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_in_the_interpreter_it_is_the_reference_step():
    code, told = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_triton.py"),
        TRITON_INTERPRET="1",
    )
    assert code == 0, told
    assert " passed" in told
    assert "skipped" not in told


def test_it_compiles_for_a_gpu_and_adds_nothing_atomically(tmp_path):
    code, told = python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert code == 0, told
    assert "compiled 5 atomic 0" in told


def on_cuda(monkeypatch):
    """A weight that says that it lies on a GPU."""
    weight = nn.Parameter(torch.ones(3, 2))
    monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda", 0), raising=False)
    return weight


def test_fused_is_allowed_on_cuda_and_builds_nothing_for_the_cpu(monkeypatch):
    group = DessiLBI([nn.Parameter(torch.ones(3, 2))]).param_groups[0]
    monkeypatch.setattr(fusing.building, "build", lambda: pytest.fail("built for the CPU"))
    group["params"] = [on_cuda(monkeypatch)]
    check_group(group | {"fused": True})
    fusing.prepare(group["params"])
    assert fusing.kernel_for("cuda", asked=True).name == "fused-cuda"
    assert fusing.kernel_for("cuda", asked=False) is None


def test_without_triton_there_is_one_warning(monkeypatch):
    weight = on_cuda(monkeypatch)
    monkeypatch.setattr(fusing, "_triton", lambda: None)
    fusing._miss_triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed"):
        fusing.prepare([weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusing.prepare([weight])
