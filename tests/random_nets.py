# SPDX-License-Identifier: Apache-2.0
"""Random nets and random tickets, and whether their compaction is equal, refused or wrong."""

import copy

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.compaction.compaction import compact
from dessilbi.cuts.closing import close_on
from dessilbi.cuts.costs import CostModel
from dessilbi.graph import read_graph
from dessilbi.testing import random_ticket

ACTIVATIONS = [
    *(nn.ReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Softplus, nn.ELU),
    *(nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU6, nn.Hardsigmoid),
]
NORMS = ["batch", "group", "instance", "plain batch", "layer", "root mean square"]
STEPS = [
    "conv",
    "valid",
    "conv",
    "grouped",
    "depthwise",
    "norm",
    "norm",
    "activation",
    "activation",
    "shuffle",
    "split",
    "residual",
    "gate",
    "concat",
    "pool",
    "halves",
    "positions",
    "transposed",
    "mean gate",
]


class ChannelsLast(nn.Module):
    """A norm over channels, which it wants last."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Step(nn.Module):
    """One random operation on an image of ``width`` channels; ``out`` is its new width."""

    def __init__(self, kind, width, choice, other):
        super().__init__()
        self.kind, self.out, self.cut = kind, width, 1 + choice % (width - 1)
        new = 4 * (1 + other % 4)
        if kind in ("conv", "valid"):
            size = (1, 3)[choice % 2]
            padding = 0 if kind == "valid" else size // 2
            self.layer = nn.Conv2d(width, new, size, padding=padding, bias=choice % 3 > 0)
            self.out = new
        elif kind == "grouped":
            self.layer = nn.Conv2d(width, new, 3, padding=1, groups=(2, 4)[choice % 2])
            self.out = new
        elif kind == "depthwise":
            times = 1 + choice % 2
            self.layer = nn.Conv2d(width, times * width, 3, padding=1, groups=width)
            self.out = times * width
        elif kind == "norm":
            name = NORMS[choice % len(NORMS)]
            self.layer = {
                "batch": lambda: nn.BatchNorm2d(width),
                "plain batch": lambda: nn.BatchNorm2d(width, affine=False),
                "instance": lambda: nn.InstanceNorm2d(width, affine=True),
                "group": lambda: nn.GroupNorm((2, 4)[other % 2], width),
                "layer": lambda: ChannelsLast(nn.LayerNorm(width)),
                "root mean square": lambda: ChannelsLast(nn.RMSNorm(width, eps=1e-3)),
            }[name]()
        elif kind == "activation":
            self.layer = ACTIVATIONS[choice % len(ACTIVATIONS)]()
        elif kind in ("split", "residual", "concat"):
            width_in = self.cut if kind == "split" else width
            width_out = width if kind == "residual" else new
            self.layer = nn.Conv2d(width_in, width_out, 3, padding=1)
            self.out = {"split": width - self.cut + new, "concat": width + new}.get(kind, width)
        elif kind == "gate":
            self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        elif kind == "pool":
            self.layer = (nn.AvgPool2d, nn.MaxPool2d)[choice % 2](3, 1, 1)
        elif kind == "halves":
            self.layer = nn.Conv2d(width, 2 * new, 1)
            self.out = new
        elif kind == "positions":
            self.register_buffer("order", torch.randperm(width))
        elif kind == "transposed":
            self.layer = nn.ConvTranspose2d(width, new, 3, padding=1)
            self.out = new

    def forward(self, x):
        if self.kind == "shuffle":
            n, c, h, w = x.shape
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if self.kind == "split":
            a, b = x.split([self.cut, x.shape[1] - self.cut], 1)
            return torch.cat([b, self.layer(a)], 1)
        if self.kind == "residual":
            return x + self.layer(x)
        if self.kind == "concat":
            return torch.cat([self.layer(x), x], 1)
        if self.kind == "gate":
            return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        if self.kind == "halves":
            one, two = self.layer(x).chunk(2, 1)
            return one * torch.tanh(two)
        if self.kind == "positions":
            return x[:, self.order]
        if self.kind == "mean gate":
            return x * torch.sigmoid(x.mean(1, keepdim=True))
        return self.layer(x)


@st.composite
def nets(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    steps, width, size = [nn.Conv2d(3, 8, 3, padding=1)], 8, 8
    numbers = st.integers(0, 59)
    for kind in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=9)):
        even = width % 4 == 0
        if (kind in ("grouped", "shuffle") and not even) or width > 40:
            continue
        choice = draw(numbers)
        if kind == "norm" and not even:
            choice = 0
        if kind == "valid":
            size -= 2 * (choice % 2)
            if size < 3:
                break
        step = Step(kind, width, choice, draw(numbers))
        steps.append(step)
        width = step.out
    if draw(st.booleans()):
        steps += [nn.Flatten(), nn.Linear(width * size * size, 5)]
    else:
        steps += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 6), nn.GELU()]
        steps += [nn.LayerNorm(6), nn.Linear(6, 3)]
    model = nn.Sequential(*steps).eval()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if "Norm" in type(module).__name__ and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if "Norm" in type(module).__name__ and getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.2)
    return model


def any_ticket(graph, density, seed, kind="any"):
    """Blocks die at random, removable or not; ``kind`` "whole": some units die entirely."""
    random = np.random.default_rng(seed)
    masks, specs = {}, {}
    written = {(m.name, m.dim) for unit in graph.units for m in unit.producers}
    for unit in graph.units:
        dead = random.random(unit.num_blocks) > density
        if kind == "whole" and random.random() < 0.15:
            dead[:] = True
        for member in unit.producers:
            shape = graph.shapes[member.name]
            block = tuple(1 if (member.name, d) in written else None for d in range(len(shape)))
            spec = specs.setdefault(member.name, TensorSpec(shape, block))
            mask = masks.setdefault(member.name, torch.ones(spec.grid, dtype=torch.bool))
            index = torch.from_numpy(member.index[dead].ravel())
            mask.index_fill_(member.dim, index, False)
    return close_on(graph, Ticket(masks, specs))


def outcome(model, density, seed, kind="any"):
    """Return "equal", "nothing" (to remove) or why compaction was refused; else it fails.

    ``kind`` "even": every group of a grouped convolution loses the same number of channels.
    """
    x = torch.randn(2, 3, 8, 8)
    graph = read_graph(model, x)
    if not graph.units:
        return "nothing"
    if kind == "even":
        ticket = random_ticket(model, example_inputs=x, density=density, seed=seed)
    else:
        ticket = any_ticket(graph, density, seed, kind)
    assert close_on(graph, ticket) == ticket
    try:
        result = compact(model, ticket, example_inputs=x)
    except ValueError as error:
        return str(error)
    masked = ticket.apply_(copy.deepcopy(model)).double()
    y = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected, found = masked(y.double()), result.model(y)
    assert result.proof.relative_diff <= 1e-9
    cost = CostModel(graph, model).of(ticket)
    assert (cost.params, cost.macs) == (result.proof.params_after, result.proof.macs_after)
    assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()
    return "equal" if result.proof.removed else "nothing"


def outcomes(count):
    """Outcomes of ``count`` nets, drawn the same way every time."""
    seen = []
    kinds = st.sampled_from(["any", "whole", "even"])

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking a net takes longer than it tells
    )
    @given(nets(), st.sampled_from([0.7, 0.4]), st.integers(0, 99), kinds)
    def check(model, density, seed, kind):
        seen.append(outcome(model, density, seed, kind))

    check()
    return seen
