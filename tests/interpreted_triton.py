# SPDX-License-Identifier: Apache-2.0
"""The fused step for CUDA on the CPU, in Triton's interpreter; run by tests/test_triton.py.

Triton decides at its first import whether it interprets: these tests need a process of their own,
with TRITON_INTERPRET=1.
"""

import copy
import importlib

import pytest
import test_fused as fused
import torch
from torch import nn
from torch.testing import assert_close

from dessilbi import DessiLBI, wrap
from dessilbi.optimizers import dual, fusing

# Few elements: the interpreter takes milliseconds for each program.
CASES = {
    "none": ((40, 30), None, torch.contiguous_format),
    "element": ((40, 30), "element", torch.contiguous_format),
    "filter": ((12, 8, 3, 3), "filter", torch.contiguous_format),
    "long-filter": ((3, 2500), "filter", torch.contiguous_format),
    "channel-channels-last": ((12, 8, 3, 3), "channel", torch.channels_last),
    "column": ((70, 40), "channel", torch.contiguous_format),
    "kernel-channels-last": ((12, 8, 3, 3), "kernel", torch.channels_last),
    "4x4": ((16, 60), (4, 4), torch.contiguous_format),
    "packed": ((24, 30), "head:4+4+4", torch.contiguous_format),
    "packed-columns": ((30, 24), (None, (4, 4, 4)), torch.contiguous_format),
    "layer": ((40, 50), "layer", torch.contiguous_format),
}


@pytest.fixture(scope="module")
def kernel():
    """The kernel, interpreted."""
    from dessilbi.kernels.cuda import TritonKernel

    return TritonKernel()


@pytest.fixture
def interpreted(kernel, monkeypatch):
    """CPU tensors step by the kernel for CUDA."""
    monkeypatch.setattr(fusing, "kernel_for", lambda device, asked: kernel if asked else None)
    monkeypatch.setattr(fusing, "prepare", lambda params: None)
    monkeypatch.setattr(fused, "CASES", CASES)


def pair_of(case, dtype=torch.float32, **options):
    p, structure = fused.start(case, dtype)
    options = {"lam": fused.median_lam(p, structure), **options}
    q = nn.Parameter(p.detach().clone())
    pair = [(x, fused.optimizer_of(x, structure, x is p, **options)) for x in (p, q)]
    assert [optimizer.kernel for _, optimizer in pair] == ["fused-cuda", "reference"]
    return pair


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_reference_step(case, interpreted):
    pair = pair_of(case, **fused.OPTIONS["nesterov"])
    fused.steps(pair, 3)
    fused.assert_agree(pair)


@pytest.mark.parametrize("options", ["plain", "dampening", "decay"])
def test_all_options_are_followed(options, interpreted):
    pair = pair_of("filter", **{**fused.OPTIONS[options], "block_scale": "unit"})
    fused.steps(pair, 2)
    fused.assert_agree(pair, partial=options != "dampening")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_stepped(dtype, interpreted):
    pair = pair_of("filter", dtype, momentum=0.9)
    fused.steps(pair, 3)
    fused.assert_agree(pair)


@pytest.mark.parametrize("event", [fused.other_lam, fused.other_numbers, fused.written_v])
def test_what_happens_between_steps_is_noticed(event, interpreted):
    pair = pair_of("filter", momentum=0.9)
    fused.steps(pair, 2)
    for _, optimizer in pair:
        event(optimizer)
    fused.steps(pair, 2, first=2)
    fused.assert_agree(pair)


def test_norms_computed_again_are_those_that_were_carried(interpreted):
    (p, optimizer), other = pair_of("long-filter", momentum=0.9)
    fused.steps(((p, optimizer), other), 3)
    plan = optimizer._fusion._carried[0]._plan
    before = plan.sums.clone()
    assert before.count_nonzero() == before.numel() > 3
    weights = p.detach().clone()
    plan.sums.zero_()
    plan.rebuild(0)
    assert torch.equal(before, plan.sums)
    assert torch.equal(weights, p)


def test_units_thresholds_per_block_and_members_without_gradient(interpreted, monkeypatch):
    lam = torch.linspace(1.0, 12.0, 12).reshape(12, 1)
    monkeypatch.setattr(dual, "threshold", lambda unit: lam.reshape(unit[0].grid))
    runs = [fused.unit_of_two(asked) for asked in (True, False)]
    for k in range(4):
        for named, optimizer in runs:
            for name, p in named:
                p.grad = None if k > 2 and name == "b" else p.detach() * 0.1
            optimizer.step()
    assert runs[0][1].kernel == "fused-cuda"
    for (_, p), (_, q) in zip(runs[0][0], runs[1][0], strict=True):
        assert_close(p, q)
    assert 0 < runs[0][1].support().density < 1


def test_a_tensor_lr_is_followed_in_place(interpreted):
    lr = torch.tensor(0.05)
    pair = pair_of("filter", lr=lr)
    fused.steps(pair, 2)
    lr.mul_(3)
    fused.steps(pair, 2, first=2)
    fused.assert_agree(pair)
    lr.zero_()
    before = pair[0][0].detach().clone()
    fused.steps(pair, 1, first=4)
    assert torch.equal(pair[0][0], before)


def test_an_infinite_gradient_moves_nothing_and_gradients_are_unscaled(interpreted):
    pair = pair_of("filter", momentum=0.9, dampening=0.5)
    (p, optimizer), (q, reference) = pair
    assert optimizer._step_supports_amp_scaling
    assert not reference._step_supports_amp_scaling
    for k in range(3):
        start = copy.deepcopy((p, optimizer.state.get(p)))
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.grad_scale = torch.tensor(256.0)
        p.grad = torch.full_like(p, torch.inf)
        optimizer.step()
        assert torch.equal(p, start[0])
        if k:
            assert all(torch.equal(optimizer.state[p][key], start[1][key]) for key in start[1])
        optimizer.found_inf.zero_()
        grad = fused.values(tuple(p.shape), k).float()
        p.grad, q.grad = 256 * grad, grad
        optimizer.step()
        reference.step()
    fused.assert_agree(pair)


def test_only_what_changed_is_written_to_the_device(interpreted, kernel, monkeypatch):
    ((p, optimizer), _) = pair_of("filter", momentum=0.9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    cuda = importlib.import_module("dessilbi.kernels.cuda")
    written = []
    monkeypatch.setattr(cuda.launched, "write", {(1,): lambda *a, **_: written.append(a[1:3])})
    optimizer.step()
    assert written == []
    optimizer.param_groups[0]["lr"] *= 2
    optimizer.step()
    assert written == [(0, 8)]


def test_levels_too_many_for_it_are_left_to_the_reference(interpreted):
    weight = nn.Parameter(torch.ones(4, 4, 3, 3))
    optimizer = DessiLBI([weight], structure=(2, 2, 1, 1), fused=True)
    assert optimizer.kernel == "reference"


def test_the_coupling_of_a_wrapped_optimizer(interpreted):
    runs = []
    for asked in (True, False):
        p, _ = fused.start("filter")
        base = torch.optim.AdamW([("w", p)], lr=0.02)
        optimizer = wrap(base, nu=0.2, lam=3.0, kappa=1.5, structure="filter", fused=asked)
        for k in range(6):
            p.grad = fused.values(tuple(p.shape), k).float()
            optimizer.step()
        runs.append((p, optimizer))
    assert [optimizer.kernel for _, optimizer in runs] == ["fused-cuda", "reference"]
    assert_close(runs[0][0], runs[1][0])
    assert 0 < runs[0][1].support().density < 1
