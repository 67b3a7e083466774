# SPDX-License-Identifier: Apache-2.0
"""Whole runs: equal to two independent implementations of the algorithm."""

import functools
import itertools
import math

import pytest
import torch
from oracle import (
    BASE,
    DEFAULTS,
    MOMENTA,
    STEPS,
    STRUCTURES,
    NumpyTensor,
    Problem,
    advance,
    assert_not_vacuous,
    numpy_step,
    parameter,
    python_run,
)
from torch import nn
from torch.testing import assert_close

from dessilbi import DessiLBI

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# Every pair of values meets; all combinations would take minutes.
OPTIONS = [
    {
        **momentum,
        "weight_decay": wd,
        "kappa": kappa,
        "block_scale": "unit" if (wd == 0) == (kappa == 1) else "sqrt",
        "maximize": (i % 2 == 0) == (kappa == 1),
    }
    for (i, momentum), wd, kappa in itertools.product(enumerate(MOMENTA), (0.0, 0.02), (1.0, 2.5))
]
both_kernels = pytest.mark.parametrize("foreach", [False, True], ids=["reference", "foreach"])
all_options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())
)


@functools.lru_cache(maxsize=256)
def python_oracle(shape, structure, options, sign):
    return python_run(Problem(shape, STEPS, sign=sign), structure, STEPS, **dict(options))


@both_kernels
@all_options
def test_trajectory_equals_the_loop_in_plain_python_floats(options, foreach):
    options = {**BASE, **options}
    sign = -1.0 if options["maximize"] else 1.0  # maximising needs a concave function
    cases = [((4, 3), "filter"), ((3, 4), "element"), ((4,), None)]
    problems = [Problem(shape, STEPS, sign=sign) for shape, _ in cases]
    expected = [
        python_oracle(shape, structure, tuple(options.items()), sign) for shape, structure in cases
    ]
    params = [parameter(problem) for problem in problems]
    optimizer = DessiLBI(
        [
            {"params": [(str(i), param)], "structure": structure}
            for i, (param, (_, structure)) in enumerate(zip(params, cases, strict=True))
        ],
        foreach=foreach,
        **options,
    )
    densities = []
    for k in range(STEPS):
        advance(optimizer, problems, params, k)
        if k % 50 != 49:
            continue
        gammas = optimizer.gamma()
        densities.append(optimizer.support().density)
        for i, (param, (_, structure)) in enumerate(zip(params, cases, strict=True)):
            w, v, gamma = (torch.tensor(x, dtype=torch.float64) for x in expected[i][k])
            assert_close(param.detach(), w.reshape(param.shape), **EXACT)
            if structure is not None:
                assert_close(optimizer.state[param]["v"], v, **EXACT)
                assert_close(gammas[str(i)], gamma, **EXACT)
    assert_not_vacuous(densities)


@functools.lru_cache(maxsize=64)
def numpy_oracle(shape, block, options):
    """W, V and Gamma after every step."""
    problem = Problem(shape, STEPS)
    tensor = NumpyTensor(problem.start, block, options=dict(options))
    states = []
    for k in range(STEPS):
        numpy_step([tensor], [problem.gradient(tensor.w, k)])
        states.append((tensor.w, tensor.v, tensor.gamma))
    return states


@pytest.mark.parametrize(
    ("momentum", "foreach"), list(zip(MOMENTA, [False, True] * 2, strict=True)), ids=str
)
@pytest.mark.parametrize(("structure", "shape", "block"), STRUCTURES, ids=str)
def test_trajectory_equals_the_implementation_in_numpy(structure, shape, block, momentum, foreach):
    block_scale = "sqrt" if (MOMENTA.index(momentum) + len(shape)) % 2 else "unit"
    # The larger a block, the larger its norm; "sqrt" divides that out.
    size = math.prod(n if b is None else b for n, b in zip(shape, block, strict=True))
    lam = 0.5 if block_scale == "sqrt" else 0.5 * math.sqrt(size)
    options = {**BASE, **momentum, "kappa": 1.5, "weight_decay": 0.01, "lam": lam}
    options["block_scale"] = block_scale
    expected = numpy_oracle(shape, block, tuple(options.items()))
    problem = Problem(shape, STEPS)
    param = parameter(problem)
    optimizer = DessiLBI([("w", param)], structure=structure, foreach=foreach, **options)
    densities = []
    for k in range(STEPS):
        advance(optimizer, [problem], [param], k)
        if k % 20 == 19:
            w, v, gamma = expected[k]
            assert_close(param.detach(), torch.tensor(w), **EXACT)
            assert_close(optimizer.state[param]["v"], torch.tensor(v), **EXACT)
            assert_close(optimizer.gamma()["w"], torch.tensor(gamma), **EXACT)
            densities.append(optimizer.support().density)
    if structure == "layer":
        # One block is never strictly between; it must have been out and then in.
        assert densities[-1] == 1
        assert not expected[5][2].any()
    else:
        assert_not_vacuous(densities)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_kernels
def test_low_precision_weights_integrate_v_in_float32(dtype, foreach):
    """20,000 steps of 1e-4 reach 2 in float32; in bfloat16 they would stop at 0.03."""
    param = nn.Parameter(torch.full((2, 2), 1e-2, dtype=dtype))
    optimizer = DessiLBI([param], lr=1e-2, nu=1.0, lam=1e6, structure="filter", foreach=foreach)
    start = param.detach().clone()
    for _ in range(600):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        with torch.no_grad():
            param.copy_(start)
    v = optimizer.state[param]["v"]
    assert v.dtype == torch.float32
    assert_close(v, 6 * start.float(), rtol=1e-3, atol=0)


def test_the_oracles_know_the_defaults_of_the_optimizer():
    group = DessiLBI([nn.Parameter(torch.ones(1))]).param_groups[0]
    assert {name: group[name] for name in DEFAULTS} == DEFAULTS
