# SPDX-License-Identifier: Apache-2.0
"""Laws that follow from the algorithm, each a test (docs/mathematics.md)."""

import math

import numpy as np
import pytest
import torch
from oracle import (
    BASE,
    MOMENTA,
    STEPS,
    STRUCTURES,
    NumpyTensor,
    Problem,
    advance,
    assert_not_vacuous,
    gradient,
    parameter,
)
from torch import nn
from torch.testing import assert_close

from dessilbi import DessiLBI
from dessilbi.blocks.structure import block_norms, block_size, resolve

EXACT = {"rtol": 1e-10, "atol": 1e-10}

both_kernels = pytest.mark.parametrize("foreach", [False, True], ids=["reference", "foreach"])


@both_kernels
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("structure", ["filter", "element", (2, 2)])
def test_w_plus_kappa_v_equals_start_minus_kappa_times_the_sum_of_steps(
    structure, momentum, foreach
):
    kappa, wd = 2.0, 0.01
    problem = Problem((6, 4), STEPS)
    param = parameter(problem)
    shadow = NumpyTensor(problem.start, options={**momentum, "weight_decay": wd})
    optimizer = DessiLBI(
        [("w", param)],
        structure=structure,
        kappa=kappa,
        weight_decay=wd,
        foreach=foreach,
        **momentum,
    )
    (group,) = optimizer.param_groups
    total, densities = np.zeros((6, 4)), []
    for k in range(STEPS):
        # Any schedule will do, also one that drops blocks again.
        group["lr"] = 0.02 * (1 + math.sin(k))
        group["nu"] = 2.0 + math.cos(k / 7)
        group["lam"] = 100.0 if k < 30 else 0.5 + 0.4 * math.sin(k / 11)
        shadow.w = param.detach().numpy().copy()
        total += group["lr"] * shadow.direction(problem.gradient(shadow.w, k))
        advance(optimizer, [problem], [param], k)
        if k % 10 == 9:
            left = param.detach() + kappa * optimizer.state[param]["v"]
            assert_close(left, torch.tensor(problem.start - kappa * total), **EXACT)
            densities.append(optimizer.support().density)
    assert_not_vacuous(densities)


@pytest.mark.parametrize("block_scale", ["unit", "sqrt"])
@pytest.mark.parametrize("structure", ["filter", "element", "channel"])
def test_with_zero_gradient_every_block_enters_at_the_step_of_the_closed_form(
    structure, block_scale
):
    """V_k = W_0 (1 - (1 - rho)^k)/kappa with rho = kappa alpha/nu, until the block enters."""
    alpha, kappa, nu, lam = 0.05, 2.0, 4.0, 0.15
    rho = kappa * alpha / nu
    start = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start *= torch.outer(torch.linspace(0.05, 1, 8), torch.linspace(0.02, 1, 5)).double()
    block = resolve(structure, start.shape)
    norms = block_norms(start, block)
    lam_g = lam * (math.sqrt(start.numel() / norms.numel()) if block_scale == "sqrt" else 1.0)
    # ||V_k|| > lam_g  <=>  k > log(1 - kappa lam_g/||W_0||)/log(1 - rho); never if ||W_0|| is small
    inside = 1 - kappa * lam_g / norms
    predicted = torch.where(inside > 0, inside.clamp(min=1e-300).log() / math.log(1 - rho), 1e9)

    param = nn.Parameter(start.clone())
    optimizer = DessiLBI(
        [("w", param)],
        lr=alpha,
        kappa=kappa,
        nu=nu,
        lam=lam,
        structure=structure,
        block_scale=block_scale,
    )
    steps, entered = 200, torch.full(norms.shape, 1e9, dtype=torch.float64)
    for k in range(1, steps + 1):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        alive = optimizer.support()["w"]
        entered = torch.where(alive & (entered > k), float(k), entered)
        out = (entered > k).expand_as(norms)
        closed = start * (1 - (1 - rho) ** k) / kappa
        difference = block_norms(optimizer.state[param]["v"] - closed, block)
        assert difference[out].max() < 1e-12 if out.any() else True
    expected = torch.floor(predicted) + 1
    expected[expected > steps] = 1e9
    assert 0 < (entered < 1e9).sum() < entered.numel()
    assert len(entered[entered < 1e9].unique()) > 1
    assert torch.equal(entered, expected)


@both_kernels
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("wd", [0.0, 0.02])
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("kappa", [1.0, 4.0, 0.5])
def test_without_structure_it_is_torch_sgd_to_the_bit(kappa, momentum, wd, maximize, foreach):
    problem = Problem((5, 4), 100, sign=-1.0 if maximize else 1.0)
    common = {"weight_decay": wd, "maximize": maximize, "foreach": foreach, **momentum}
    ours, theirs = (nn.Parameter(torch.tensor(problem.start).float()) for _ in range(2))
    pairs = [
        (ours, DessiLBI([ours], lr=0.03, kappa=kappa, **common)),
        (theirs, torch.optim.SGD([theirs], lr=0.03 * kappa, **common)),
    ]
    for k in range(100):
        for param, optimizer in pairs:
            param.grad = gradient(problem, param, k).float()
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours.detach(), torch.tensor(problem.start).float())
    assert ("momentum_buffer" in pairs[0][1].state[ours]) == (momentum != {})


def run_of(problem, steps=STEPS, each_step=None, **options):
    """One run from the problem's start; returns (optimizer, W, densities)."""
    param = parameter(problem)
    optimizer = DessiLBI([("w", param)], **{**BASE, "momentum": 0.9, **options})
    densities = []
    for k in range(steps):
        if each_step is not None:
            each_step(optimizer, k)
        advance(optimizer, [problem], [param], k)
        if k % 10 == 9:
            densities.append(optimizer.support().density)
    return optimizer, param.detach(), densities


@both_kernels
@pytest.mark.parametrize(("structure", "shape", "block"), STRUCTURES, ids=str)
def test_an_alias_and_its_tuple_train_identically(structure, shape, block, foreach):
    problem = Problem(shape, 60)
    options = {"foreach": foreach, "lr": 0.1, "lam": 0.3}
    _, by_alias, densities = run_of(problem, 60, structure=structure, **options)
    _, by_tuple, _ = run_of(problem, 60, structure=block, **options)
    assert max(densities) > 0
    assert torch.equal(by_alias, by_tuple)


@pytest.mark.parametrize("structure", ["filter", "element"])
def test_kappa_is_redundant(structure):
    problem, kappa = Problem((6, 4), STEPS), 3.0
    options = {"structure": structure, "weight_decay": 0.01}
    first, w, densities = run_of(problem, kappa=kappa, lr=0.02, lam=0.2, **options)
    second, same, _ = run_of(problem, kappa=1.0, lr=kappa * 0.02, lam=kappa * 0.2, **options)
    assert_not_vacuous(densities)
    assert_close(w, same, **EXACT)
    assert_close(first.gamma(), second.gamma(), **EXACT)


@both_kernels
@pytest.mark.parametrize("structure", ["filter", "layer", "element"])
def test_an_infinite_lambda_keeps_gamma_at_zero(structure, foreach):
    problem = Problem((6, 4), STEPS)
    optimizer, w, densities = run_of(
        problem, structure=structure, lam=math.inf, foreach=foreach, block_scale="sqrt"
    )
    assert max(densities) == 0
    assert torch.count_nonzero(optimizer.gamma()["w"]) == 0
    assert w.isfinite().all()
    # The coupling is then a plain decay: the run differs from SGD's.
    assert not torch.equal(w, run_of_sgd(problem))


def run_of_sgd(problem):
    param = parameter(problem)
    optimizer = torch.optim.SGD([param], lr=BASE["lr"], momentum=0.9)
    for k in range(STEPS):
        advance(optimizer, [problem], [param], k)
    return param.detach()


def late_lambda_run(lam, structure, block_scale, steps=150):
    """W after a run whose targets turn round half-way; and max_g ||V_g||/w_g at every step."""
    problem = Problem((6, 4), steps, seed=3)
    param = parameter(problem)
    options = {"structure": structure, "block_scale": block_scale, "momentum": 0.9}
    optimizer = DessiLBI([("w", param)], **{**BASE, **options, "lam": lam})
    block = resolve(structure, param.shape)
    size = block_size(block, param.shape)
    weight = math.sqrt(size) if block_scale == "sqrt" else 1.0
    maxima = []
    for k in range(steps):
        if k == steps // 2:
            problem.target = -0.9 * problem.target
        advance(optimizer, [problem], [param], k)
        maxima.append(float(block_norms(optimizer.state[param]["v"], block).max()) / weight)
    return param.detach(), maxima


@pytest.mark.parametrize("block_scale", ["unit", "sqrt"])
@pytest.mark.parametrize("structure", ["filter", "element"])
def test_a_lambda_from_the_running_maximum_up_was_there_from_the_start(structure, block_scale):
    w, maxima = late_lambda_run(1e9, structure, block_scale)
    running = max(maxima)
    for factor in [1 + 1e-12, 1.5] if block_scale == "sqrt" else [1, 1 + 1e-12, 1.5]:
        assert torch.equal(late_lambda_run(running * factor, structure, block_scale)[0], w)


@pytest.mark.parametrize("block_scale", ["unit", "sqrt"])
@pytest.mark.parametrize("structure", ["filter", "element"])
def test_a_lambda_below_the_running_maximum_is_another_run(structure, block_scale):
    w, maxima = late_lambda_run(1e9, structure, block_scale)
    running, last = max(maxima), maxima[-1]
    assert last < 0.95 * running, "the norms must have come back"
    for lam in [running * 0.999, (running + last) / 2]:  # the second is above the LAST maximum
        assert not torch.equal(late_lambda_run(lam, structure, block_scale)[0], w)


def test_permuting_filters_permutes_results():
    problem = Problem((6, 4), STEPS)
    order = [3, 0, 5, 1, 4, 2]
    moved = Problem((6, 4), STEPS)
    moved.start, moved.curvature = moved.start[order], moved.curvature[order]
    moved.target, moved.noise = moved.target[order], moved.noise[:, order]
    first, w, densities = run_of(problem, structure="filter")
    second, permuted, _ = run_of(moved, structure="filter")
    assert_not_vacuous(densities)
    assert torch.equal(w[order], permuted)
    assert torch.equal(first.support()["w"][order], second.support()["w"])


@both_kernels
def test_lr_as_a_tensor_gives_the_run_of_the_number(foreach):
    problem = Problem((6, 4), STEPS)
    lr = torch.tensor(0.03, dtype=torch.float64)
    options = {"structure": "filter", "foreach": foreach}
    optimizer, w, densities = run_of(problem, **options, lr=lr)
    _, same, _ = run_of(problem, **options, lr=0.03)
    assert_not_vacuous(densities)
    assert_close(w, same, **EXACT)
    assert optimizer.param_groups[0]["lr"] is lr
