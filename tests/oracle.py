# SPDX-License-Identifier: Apache-2.0
"""Two independent implementations of the algorithm, and the problems they are compared on.

Nothing here imports dessilbi. Both store V, Gamma and W, as the paper writes it:

    g' = g + wd W;  m = tau m + (1 - dampening) g' (first m = g');  d = m, or g' + tau m (Nesterov)
    W  <- W - kappa alpha (d + (W - Gamma)/nu),   V <- V + (alpha/nu)(W - Gamma)     (old W, Gamma)
    Gamma = kappa prox(V)
"""

import math
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import nn

DEFAULTS = {
    "lr": 0.1,
    "kappa": 1.0,
    "nu": 100.0,
    "lam": 1.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "block_scale": "unit",
    "maximize": False,
}


MOMENTA = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3},
]
BASE = {"lr": 0.03, "nu": 3.0, "lam": 0.6}
STRUCTURES = [
    ("filter", (5, 4, 2, 2), (1, None, None, None)),
    ("neuron", (6, 5), (1, None)),
    ("channel", (4, 5, 2, 2), (None, 1, None, None)),
    ("channel", (5, 4), (None, 1)),
    ("kernel", (3, 4, 2, 3), (1, 1, None, None)),
    ("kernel", (3, 4, 3), (1, 1, None)),
    ("element", (4, 5), (1, 1)),
    ("element", (7,), (1,)),
    ("head:2", (8, 3), (2, None)),
    ("layer", (3, 3), (None, None)),
    ((4, 4), (8, 12), (4, 4)),
    ((None, 2), (3, 8), (None, 2)),
]
STEPS = 300


class Problem:
    """A quadratic per entry with a target that jumps about: g_k(w) = h (w - c) + noise_k.

    Targets differ in size from slice to slice along every dimension, so that some blocks of any
    structure want to live and others do not. Works on arrays of numpy; ``steps`` noises.
    """

    def __init__(self, shape, steps, seed=0, sign=1.0):
        rng = np.random.default_rng([seed, *shape])
        self.start = rng.normal(size=shape) * 0.5
        self.curvature = sign * rng.uniform(0.5, 1.5, size=shape)
        size = np.ones(shape)
        for dim, length in enumerate(shape):
            along = [length if i == dim else 1 for i in range(len(shape))]
            size = size * (rng.permutation(length) / max(length - 1, 1) * 1.4).reshape(along)
        self.target = rng.normal(size=shape) * size
        self.noise = rng.normal(size=(steps, *shape)) * 0.3

    def gradient(self, w, k):
        return self.curvature * (w - self.target) + self.noise[k]


def python_run(problem, structure, steps, **options):
    """The loop in plain Python floats for one matrix or vector.

    Args:
        problem: Where it starts and what its gradients are.
        structure: "filter" (rows of a matrix), "element", or None (no structure).
        steps: How many.
        options: As of the optimizer.

    Returns:
        W, V and Gamma after each step, as nested lists.
    """
    o = {**DEFAULTS, **options}
    start = np.atleast_2d(problem.start)
    h, c = np.atleast_2d(problem.curvature).tolist(), np.atleast_2d(problem.target).tolist()
    w = start.tolist()
    rows, columns = range(len(w)), range(len(w[0]))
    v = [[0.0 for _ in columns] for _ in rows]
    gamma = [[0.0 for _ in columns] for _ in rows]
    m = [[0.0 for _ in columns] for _ in rows]
    history = []
    for k in range(steps):
        noise = np.atleast_2d(problem.noise[k]).tolist()
        for i in rows:
            for j in columns:
                g = h[i][j] * (w[i][j] - c[i][j]) + noise[i][j]
                if o["maximize"]:
                    g = -g
                g = g + o["weight_decay"] * w[i][j]
                d = g
                if o["momentum"] != 0:
                    old = o["momentum"] * m[i][j] + (1 - o["dampening"]) * g
                    m[i][j] = g if k == 0 else old
                    d = g + o["momentum"] * m[i][j] if o["nesterov"] else m[i][j]
                r = 0.0 if structure is None else (w[i][j] - gamma[i][j]) / o["nu"]
                w[i][j] = w[i][j] - o["kappa"] * o["lr"] * (d + r)
                v[i][j] = v[i][j] + o["lr"] * r
        for i in rows:
            norm = math.sqrt(sum(x * x for x in v[i]))
            lam = o["lam"] * (math.sqrt(len(v[i])) if o["block_scale"] == "sqrt" else 1.0)
            for j in columns:
                if structure == "filter":
                    scale = 1 - lam / norm if norm > lam else 0.0
                    gamma[i][j] = o["kappa"] * scale * v[i][j]
                elif structure == "element":
                    size = max(abs(v[i][j]) - o["lam"], 0.0)
                    gamma[i][j] = o["kappa"] * math.copysign(size, v[i][j])
        history.append(([row[:] for row in w], [row[:] for row in v], [row[:] for row in gamma]))
    return history


def labels_of(shape, block):
    """The number of the block of every entry, by counting through the grid."""
    counts = [1 if b is None else n // b for n, b in zip(shape, block, strict=True)]
    number = {position: i for i, position in enumerate(product(*map(range, counts)))}
    labels = np.empty(shape, dtype=np.int64)
    for index in np.ndindex(*shape):
        position = tuple(0 if b is None else i // b for i, b in zip(index, block, strict=True))
        labels[index] = number[position]
    return labels


@dataclass
class NumpyTensor:
    """One tensor with its options; ``block`` None means no structure."""

    w: np.ndarray
    block: tuple | None = None
    unit: str | None = None
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.o = {**DEFAULTS, **self.options}
        self.w = self.w.copy()
        self.v, self.gamma, self.m = np.zeros_like(self.w), np.zeros_like(self.w), None
        if self.block is not None:
            self.labels = labels_of(self.w.shape, self.block)
            self.num_blocks = int(self.labels.max()) + 1
            self.block_size = self.w.size // self.num_blocks

    def direction(self, g):
        """d, advancing the momentum."""
        g = (-g if self.o["maximize"] else g) + self.o["weight_decay"] * self.w
        tau = self.o["momentum"]
        if tau == 0:
            return g
        self.m = g if self.m is None else tau * self.m + (1 - self.o["dampening"]) * g
        return g + tau * self.m if self.o["nesterov"] else self.m

    def squares(self):
        return np.bincount(self.labels.ravel(), (self.v**2).ravel(), minlength=self.num_blocks)


def numpy_step(tensors, gradients):
    """Advance all tensors by one step, then their Gammas, unit by unit; return the d."""
    directions = []
    for t, g in zip(tensors, gradients, strict=True):
        d, alpha, kappa = t.direction(g), t.o["lr"], t.o["kappa"]
        r = 0.0 if t.block is None else (t.w - t.gamma) / t.o["nu"]
        t.v = t.v + alpha * r
        t.w = t.w - kappa * alpha * (d + r)
        directions.append(d)
    units = {}
    for i, t in enumerate(tensors):
        if t.block is not None:
            units.setdefault(i if t.unit is None else t.unit, []).append(t)
    for unit in units.values():
        norms = np.sqrt(sum(t.squares() for t in unit))
        lam = unit[0].o["lam"]
        if unit[0].o["block_scale"] == "sqrt":
            lam = lam * math.sqrt(sum(t.block_size for t in unit))
        scale = np.array([1 - lam / n if n > lam else 0.0 for n in norms])
        for t in unit:
            t.gamma = t.o["kappa"] * scale[t.labels] * t.v
    return directions


def parameter(problem):
    return nn.Parameter(torch.tensor(problem.start))


def gradient(problem, param, k):
    return torch.tensor(problem.gradient(param.detach().numpy(), k))


def advance(optimizer, problems, params, k):
    for problem, param in zip(problems, params, strict=True):
        param.grad = gradient(problem, param, k)
    optimizer.step()


def assert_not_vacuous(densities):
    """Over the run the support was somewhere strictly between empty and full."""
    assert any(0 < density < 1 for density in densities), densities
