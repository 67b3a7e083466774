# SPDX-License-Identifier: Apache-2.0
"""The small problem on which the contract suite trains: named matrices, a quadratic, noise.

Blocks differ in size by design, and ``make`` chooses lam such that some of them are selected while
others are not: a check that compares dynamics says so with :func:`assert_partial`.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import inf, sqrt
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dessilbi.blocks.structure import Block, Length, resolve

Named = list[tuple[str, nn.Parameter]]
Shapes = Mapping[str, tuple[int, ...]]
Factory = Callable[[Named], Optimizer]

# One number of rows, so that filters can form a unit; even sides, so that 2 x 2 blocks fit.
SHAPES: Shapes = {"first.weight": (6, 4), "second.weight": (6, 8)}
STEPS = 20


class NotApplicable(SkipTest):
    """Raised by a check about something that the optimizer does not have; says what."""


def generator_for(*words: object) -> torch.Generator:
    """Return a generator seeded by words, whatever the order of calls."""
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


@lru_cache(maxsize=4096)
def draw(kind: str, name: str, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Return a normal float64 tensor; larger in later rows and smaller in later tensors."""
    x = torch.randn(shape, generator=generator_for(kind, name, step), dtype=torch.float64)
    if shape and shape[0] > 1:
        x *= torch.linspace(0.1, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return x * (0.1 if name.startswith("second") else 1.0)


def parameters(shapes: Shapes = SHAPES, dtype: torch.dtype = torch.float32) -> Named:
    """Return fresh parameters; the same ones at every call."""
    return [(n, nn.Parameter(draw("start", n, s).to(dtype).clone())) for n, s in shapes.items()]


def gradient(name: str, param: Tensor, step: int) -> Tensor:
    """Return the gradient of 0.5 ||p - target||^2, with noise, as a new tensor."""
    w, shape = param.detach().double(), tuple(param.shape)
    clean = w - draw("target", name, shape)
    noisy = clean + 0.1 * draw("noise", name, shape, step)
    return torch.empty_like(param).copy_(noisy)  # laid out as the parameter


def loss_of(named: Named) -> Tensor:
    """Return the loss whose gradient is :func:`gradient`, without the noise."""
    parts = [(p - draw("target", n, tuple(p.shape)).to(p.dtype)).square().sum() for n, p in named]
    return 0.5 * torch.stack(parts).sum()


def loss_value(named: Named) -> float:
    """Return :func:`loss_of` as a number."""
    return float(loss_of([(n, nn.Parameter(p.detach().double())) for n, p in named]).detach())


def fill_gradients(named: Named, step: int) -> None:
    """Give every parameter the gradient of this step."""
    for name, param in named:
        param.grad = gradient(name, param, step)


def train(named: Named, optimizer: Optimizer, steps: int = STEPS, first: int = 0) -> None:
    """Take ``steps`` steps; ``first`` is the number of the first one."""
    for step in range(first, first + steps):
        fill_gradients(named, step)
        optimizer.step()


def make(
    factory: Factory,
    shapes: Shapes = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> tuple[Named, Optimizer]:
    """Return fresh parameters and their optimizer, with lam such that few blocks are selected."""
    named = parameters(shapes, dtype)
    optimizer = factory(list(named))
    if has_dual(optimizer):
        lam = _lam_between(factory)
        for group in optimizer.param_groups:
            group["lam"] = lam
    return named, optimizer


@lru_cache(maxsize=256)
def _lam_between(factory: Factory) -> float:
    """Return a lam between what the best block reaches early and what the worst reaches late."""
    named = parameters()
    optimizer = factory(list(named))
    for group in optimizer.param_groups:
        group["lam"] = inf
    train(named, optimizer, STEPS // 3)
    early = max(norm / scale for norm, scale in _unit_sizes(optimizer))
    train(named, optimizer, 2 * STEPS - STEPS // 3, first=STEPS // 3)
    late = min(norm / scale for norm, scale in _unit_sizes(optimizer))
    assert 0 < late < early, "the factory's lr and nu give the blocks no dynamics of their own"
    return sqrt(early * late)


def has_dual(optimizer: Optimizer) -> bool:
    """Return whether the optimizer has a V, and so a Gamma and a support."""
    return callable(getattr(optimizer, "support", None)) and any(
        group.get("structure") is not None for group in optimizer.param_groups
    )


def assert_partial(optimizer: Optimizer) -> None:
    """Assert that the support, where there is one, is neither empty nor full."""
    if has_dual(optimizer):
        density = density_of(optimizer)
        assert 0 < density < 1, f"vacuous: the support has density {density}"


def density_of(optimizer: Optimizer) -> float:
    """Return the density of the support."""
    density: float = optimizer.support().density  # type: ignore[attr-defined]
    return density


def assert_same_run(a: tuple[Named, Optimizer], b: tuple[Named, Optimizer]) -> None:
    """Assert that weights and state of two optimizers agree to the bit."""
    assert_same_weights(a[0], b[0])
    for (name, p), (_, q) in zip(a[0], b[0], strict=True):
        mine, theirs = a[1].state.get(p, {}), b[1].state.get(q, {})
        assert set(mine) == set(theirs), f"state of {name}: {sorted(mine)} and {sorted(theirs)}"
        for key, value in mine.items():
            assert value.dtype == theirs[key].dtype, f"dtype of {key} of {name}"
            assert torch.equal(value, theirs[key]), f"{key} of {name} differs"
    assert_partial(a[1])


def assert_same_weights(a: Named, b: Named) -> None:
    """Assert that weights agree to the bit."""
    for (name, p), (_, q) in zip(a, b, strict=True):
        assert torch.isfinite(p).all(), f"{name} is not finite"
        difference = (p.detach() - q.detach()).abs().max() if p.numel() else 0
        assert torch.equal(p, q), f"{name} differs by {float(difference):.2g}"


def copy_weights(source: Named, target: Named) -> None:
    """Copy weights of one set of parameters into another."""
    with torch.no_grad():
        for (_, p), (_, q) in zip(source, target, strict=True):
            q.copy_(p)


def weights_of(named: Named) -> list[Tensor]:
    """Return copies of the weights."""
    return [p.detach().clone() for _, p in named]


def block_slices(shape: Sequence[int], block: Block) -> list[tuple[slice | list[int], ...]]:
    """Return where each block lies, one after the other."""
    places = [_places(n, length) for n, length in zip(shape, block, strict=True)]
    return list(product(*places))


def _places(size: int, length: Length) -> list[slice | list[int]]:
    """Where blocks lie along one dimension; packed ones, of which one can be, as lists."""
    if isinstance(length, tuple):
        count, starts = size // sum(length), [0]
        for part in length:
            starts.append(starts[-1] + count * part)
        runs = [
            [
                range(start + b * n, start + b * n + n)
                for start, n in zip(starts, length, strict=False)
            ]
            for b in range(count)
        ]
        return [[i for run in own for i in run] for own in runs]
    step = size if length is None else length
    return [slice(i, i + step) for i in range(0, size, step)]


def units_of(optimizer: Optimizer) -> list[list[tuple[Tensor, dict[str, Any]]]]:
    """Return the structured parameters that live together, each with its group."""
    units: dict[object, list[tuple[Tensor, dict[str, Any]]]] = {}
    for group in optimizer.param_groups:
        if group.get("structure") is not None:
            for param in group["params"]:
                key = id(param) if group["unit"] is None else group["unit"]
                units.setdefault(key, []).append((param, group))
    return list(units.values())


def joint_blocks(
    unit: Iterable[tuple[Tensor, dict[str, Any]]],
) -> list[list[tuple[Tensor, tuple[slice | list[int], ...]]]]:
    """Return for every block of a unit the parameters and places it consists of."""
    members = [
        [(p, at) for at in block_slices(p.shape, resolve(group["structure"], p.shape))]
        for p, group in unit
    ]
    return [list(parts) for parts in zip(*members, strict=True)]


def _unit_sizes(optimizer: Optimizer) -> list[tuple[float, float]]:
    """||V|| and the factor of lam of every block, by slow loops."""
    sizes = []
    for unit in units_of(optimizer):
        for block in joint_blocks(unit):
            parts = [optimizer.state[p]["v"][at] for p, at in block]
            sizes.append(norm_and_scale(parts, unit[0][1]))
    return sizes


def norm_and_scale(parts: Sequence[Tensor], group: dict[str, Any]) -> tuple[float, float]:
    """Return the joint norm of a block's parts, and what multiplies lam for it."""
    norm = sqrt(sum(float(x.double().square().sum()) for x in parts))
    count = sum(x.numel() for x in parts)
    return norm, sqrt(count) if group["block_scale"] == "sqrt" else 1.0
