# SPDX-License-Identifier: Apache-2.0
"""Units: blocks of several tensors that live or die together."""

import numpy as np
import pytest
import torch
from oracle import NumpyTensor, Problem, numpy_step
from torch import nn
from torch.testing import assert_close

from dessilbi import DessiLBI

STEPS = 300
BASE = {"lr": 0.03, "nu": 3.0, "momentum": 0.9}

# (name, shape, structure, block, unit, kappa): four members of one unit over three groups, among
# them a ConvTranspose weight, whose filters lie in dimension 1; a second unit; two loners.
MEMBERS = [
    ("conv1", (6, 3, 2, 2), "filter", (1, None, None, None), "stage", 1.0),
    ("conv2", (6, 2, 1, 1), "filter", (1, None, None, None), "stage", 1.0),
    ("fc", (6, 4), "neuron", (1, None), "stage", 2.5),
    ("up", (2, 6, 2, 2), "channel", (None, 1, None, None), "stage", 0.5),
    ("gate", (5, 1), "element", (1, 1), "other", 1.0),
    ("gate.bias", (5,), "element", (1,), "other", 1.0),
    ("free", (4, 3), "filter", (1, None), None, 1.0),
    ("norm", (4,), None, None, None, 1.0),
]


def parameter(problem):
    return nn.Parameter(torch.tensor(problem.start))


def unit_pair(**second):
    """Two members of the unit "u", the second with other options."""
    first = {"params": [("a", nn.Parameter(torch.ones(4, 3)))]}
    other = {"params": [("b", nn.Parameter(torch.ones(4, 2)))], **second}
    return [first, other]


@pytest.mark.parametrize("foreach", [False, True], ids=["reference", "foreach"])
@pytest.mark.parametrize(("block_scale", "lam"), [("unit", 3.0), ("sqrt", 0.6)])
def test_units_train_as_in_the_implementation_in_numpy(block_scale, lam, foreach):
    problems = [Problem(shape, STEPS, seed=7) for _, shape, *_ in MEMBERS]
    options = {**BASE, "lam": lam, "block_scale": block_scale}
    theirs = [
        NumpyTensor(problem.start, block, unit, {**options, "kappa": kappa})
        for problem, (_, _, _, block, unit, kappa) in zip(problems, MEMBERS, strict=True)
    ]
    params = [parameter(problem) for problem in problems]
    optimizer = DessiLBI(
        [
            {"params": [(name, param)], "structure": structure, "unit": unit, "kappa": kappa}
            for param, (name, _, structure, _, unit, kappa) in zip(params, MEMBERS, strict=True)
        ],
        foreach=foreach,
        **options,
    )
    densities = []
    for k in range(STEPS):
        for problem, param in zip(problems, params, strict=True):
            param.grad = torch.tensor(problem.gradient(param.detach().numpy(), k))
        numpy_step(theirs, [p.gradient(t.w, k) for p, t in zip(problems, theirs, strict=True)])
        optimizer.step()
        if k % 20 != 19:
            continue
        gammas, support = optimizer.gamma(), optimizer.support()
        densities.append(support.densities()["conv1"])
        for param, their, (name, *_) in zip(params, theirs, MEMBERS, strict=True):
            assert_close(param.detach(), torch.tensor(their.w), rtol=1e-10, atol=1e-10)
            if their.block is not None:
                assert_close(gammas[name], torch.tensor(their.gamma), rtol=1e-10, atol=1e-10)
        for name in ("conv2", "fc", "up"):
            assert torch.equal(support[name].reshape(-1), support["conv1"].reshape(-1))
        assert torch.equal(support["gate"].reshape(-1), support["gate.bias"])
    assert any(0 < density < 1 for density in densities), densities


def test_a_unit_is_selected_by_its_joint_norm():
    """Neither member alone would pass the threshold: 3 < 4.9 and 4 < 4.9, but 5 > 4.9."""
    params = [nn.Parameter(torch.tensor([[size], [0.1]])) for size in (3.0, 4.0)]
    named = list(zip("ab", params, strict=True))
    options = {"lr": 1.0, "nu": 1.0, "lam": 4.9, "structure": "filter"}
    for unit, expected in (("u", [True, False]), (None, [False, False])):
        optimizer = DessiLBI(named, unit=unit, **options)
        for param in params:
            param.grad = torch.zeros_like(param)
        with torch.no_grad():
            start = [param.clone() for param in params]
            optimizer.step()
            for param, old in zip(params, start, strict=True):
                param.copy_(old)
        for name in "ab":
            assert optimizer.support()[name].flatten().tolist() == expected


def test_a_unit_of_one_tensor_is_the_tensor_alone():
    runs = []
    for unit in ("u", None):
        problem = Problem((6, 4), STEPS)
        param = parameter(problem)
        optimizer = DessiLBI([("w", param)], structure="filter", unit=unit, lam=0.6, **BASE)
        densities = []
        for k in range(STEPS):
            param.grad = torch.tensor(problem.gradient(param.detach().numpy(), k))
            optimizer.step()
            densities.append(optimizer.support().density if k % 20 == 19 else 0.0)
        runs.append(param.detach())
        assert any(0 < density < 1 for density in densities)
    assert torch.equal(*runs)


def test_a_member_without_a_gradient_still_counts_in_its_unit():
    a, b = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(2, 1))
    options = {"lr": 1.0, "nu": 1.0, "structure": "filter", "unit": "u", "lam": 1.2}
    optimizer = DessiLBI([("a", a), ("b", b)], **options)
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimizer.step()
    assert optimizer.support().density == 1  # sqrt(1 + 1) > 1.2
    a.grad = None
    before = [tensor.clone() for tensor in (a, optimizer.state[a]["v"])]
    optimizer.step()
    assert torch.equal(a, before[0])
    assert torch.equal(optimizer.state[a]["v"], before[1])
    # b was at W = 0, V = 1; Gamma used the joint norm: V + (0 - (1 - 1.2/sqrt 2))
    expected = 1 - (1 - 1.2 / 2**0.5)
    assert_close(optimizer.state[b]["v"], torch.full((2, 1), expected))


def test_units_of_different_names_do_not_touch_each_other():
    a, b = nn.Parameter(torch.full((2, 1), 3.0)), nn.Parameter(torch.full((2, 1), 4.0))
    optimizer = DessiLBI(
        [{"params": [("a", a)], "unit": "x"}, {"params": [("b", b)], "unit": "y"}],
        structure="filter",
        lr=1.0,
        nu=1.0,
        lam=3.5,
    )
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimizer.step()
    assert optimizer.support().densities() == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [{"params": [("a", (4, 3)), ("b", (5, 3))]}],
            "unit 'u' joins a with 4 blocks and b with 5: members need the same number",
        ),
        (
            [{"params": [("a", (4, 3))]}, {"params": [("b", (4, 3))], "lam": 2.0}],
            r"unit 'u' joins a with lam=1\.0 and b with lam=2\.0: members need the same lam",
        ),
        (
            [{"params": [("a", (4, 3))]}, {"params": [("b", (4, 3))], "block_scale": "sqrt"}],
            "joins a with block_scale='unit' and b with block_scale='sqrt': .* same block_scale",
        ),
        (
            [{"params": [("a", (4, 3, 2)), ("b", (4, 3, 2))], "structure": "kernel"}],
            r"a cannot be in unit 'u': its blocks form a grid of \(4, 3, 1\), .* one dimension",
        ),
    ],
)
def test_members_that_do_not_agree_are_refused_and_both_named(groups, message):
    for group in groups:
        group["params"] = [(name, nn.Parameter(torch.ones(s))) for name, s in group["params"]]
    with pytest.raises(ValueError, match=message):
        DessiLBI(groups, structure=groups[0].pop("structure", "filter"), unit="u")


def test_lambda_changed_for_one_member_is_refused_before_anything_moves():
    optimizer = DessiLBI(unit_pair(), structure="filter", unit="u")
    params = [group["params"][0] for group in optimizer.param_groups]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.param_groups[1]["lam"] = 0.5
    with pytest.raises(ValueError, match=r"a with lam=1\.0 and b with lam=0\.5"):
        optimizer.step()
    for param in params:
        assert torch.equal(param, torch.ones_like(param))


def test_members_may_differ_in_kappa_and_each_multiplies_its_own():
    optimizer = DessiLBI(unit_pair(kappa=3.0), structure="filter", unit="u", lr=1.0, nu=1.0)
    params = [group["params"][0] for group in optimizer.param_groups]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    gammas = optimizer.gamma()
    scale = 1 - 1 / np.sqrt(5)  # V = 1 in the 3 + 2 entries of a block
    assert_close(gammas["a"], torch.full((4, 3), scale, dtype=torch.float32))
    assert_close(gammas["b"], torch.full((4, 2), 3 * scale, dtype=torch.float32))


def test_gamma_keeps_the_dtype_of_v_in_a_unit_of_mixed_precision():
    a = nn.Parameter(torch.ones(2, 3))
    b = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer = DessiLBI(
        [("a", a), ("b", b)], structure="filter", unit="u", lam=0.1, lr=1.0, nu=1.0
    )
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimizer.step()
    assert optimizer.state[a]["v"].dtype == torch.float32
    assert {n: g.dtype for n, g in optimizer.gamma().items()} == {
        "a": torch.float32,
        "b": torch.float64,
    }


def test_the_joint_norm_is_that_of_all_members_put_side_by_side():
    names, shapes = "abc", [(4, 3), (4, 2), (4, 5)]
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).double()) for s in shapes]
    options = {"structure": "neuron", "lr": 1.0, "nu": 1.0, "lam": 3.2}
    optimizer = DessiLBI(list(zip(names, params, strict=True)), unit="u", **options)
    whole = nn.Parameter(torch.cat([p.detach() for p in params], dim=1))
    joined = DessiLBI([("w", whole)], **options)
    for param in [*params, whole]:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    joined.step()
    assert 0 < joined.support().density < 1
    assert torch.equal(optimizer.support()["a"], joined.support()["w"])
    side_by_side = torch.cat([optimizer.gamma()[name] for name in names], dim=1)
    assert_close(side_by_side, joined.gamma()["w"], rtol=1e-12, atol=0)
