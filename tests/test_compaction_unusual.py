# SPDX-License-Identifier: Apache-2.0
"""Unusual operations between layers: followed exactly, or left out by name, never wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from random_nets import any_ticket
from torch import nn

from dessilbi.compaction.compaction import compact
from dessilbi.graph import read_graph
from dessilbi.graph.reader import RULES


class Between(nn.Module):
    """A function of the module and of ``width`` channels between two convolutions."""

    def __init__(self, function, width=8, reads=8, **parts):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.out = nn.Conv2d(reads, 4, 3, padding=1)
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x):
        return self.out(self.function(self, self.norm(self.a(x))))


def assign(_, y):
    z = y.clone()
    z[:, 2:5] = torch.sigmoid(y[:, 2:5])
    z[:, ::3] = F.relu(y[:, ::3])
    return z


def shift(_, y):
    out = torch.zeros_like(y)
    out[:, :3, :-1], out[:, 3:] = y[:, :3, 1:], y[:, 3:]
    return out


def split_attention(m, y):
    y = y.unflatten(1, (2, 4))
    weights = m.g(y.sum(1).mean((2, 3), keepdim=True)).unflatten(1, (2, 4)).softmax(1)
    return (y * weights).sum(1)


def spatial_attention(_, y):
    y = y.flatten(2)
    weights = torch.einsum("bci,bcj->bij", y, y).softmax(-1)
    return torch.einsum("bij,bcj->bci", weights, y).unflatten(2, (9, 9))


def without_autocast(m, y):
    with torch.autocast("cpu", enabled=False):
        return F.relu(m.c(y))


def global_response(m, y):
    norms = y.norm(p=2, dim=(2, 3), keepdim=True)
    return m.g * (y * (norms / (norms.mean(1, keepdim=True) + 1e-6))) + m.b + y


def weight(*shape):
    return nn.Parameter(torch.rand(shape) + 0.5)


def by_hand(m, y):
    return y * torch.rsqrt(y.pow(2).mean(1, True) + 1e-3) * m.g


def shared_bias(m, y):
    return torch.sigmoid(m.c(y.sigmoid()) + F.conv2d(y.cos(), m.w, m.c.bias))


def product(m, y):
    return (y.movedim(1, 3).sigmoid() @ m.w).movedim(3, 1)


# name: (function, blocks that can be removed, arguments and parts of Between)
NETS = {
    "gated linear unit": (lambda _, y: F.glu(y, 1), 8, {"width": 16}),
    "where": (lambda _, y: torch.where(y > 0.2, y, 0.0), 8, {}),
    "where between constants": (lambda _, y: torch.where(y > 0.2, 1.0, 0.0), 8, {}),
    "comparison": (lambda _, y: y * ((y > 0) & (y < y.amax((2, 3), True))), 8, {}),
    "masked fill": (lambda _, y: y.masked_fill(y < 0, 0.0), 8, {}),
    "maximum": (lambda _, y: torch.max(y, -0.3 * y) + torch.min(y, y.tanh()), 8, {}),
    "lerp and addcmul": (lambda _, y: y.lerp(y.relu(), 0.3).addcmul(y, y), 8, {}),
    "ones like": (lambda _, y: torch.cat([y.relu(), torch.ones_like(y)], 1), 8, {"reads": 16}),
    "one number": (lambda m, y: F.relu(y * m.g + m.b), 8, {"g": weight(1), "b": weight()}),
    "mean over channels": (lambda _, y: y * torch.sigmoid(y.mean(1, True)), 8, {}),
    "sum over channels": (lambda _, y: y * torch.tanh(y.sum(1, True)), 8, {}),
    "unit vectors": (lambda _, y: F.normalize(y, dim=1), 8, {}),
    "root mean square by hand": (by_hand, 8, {"g": weight(8, 1, 1)}),
    "response norm": (global_response, 8, {"g": weight(8, 1, 1), "b": weight(8, 1, 1)}),
    "maximum of pairs": (lambda _, y: y.unflatten(1, (4, 2)).amax(2), 4, {"reads": 4}),
    "split attention": (split_attention, 4, {"reads": 4, "g": nn.Conv2d(4, 8, 1)}),
    "attention by einsum": (spatial_attention, 8, {}),
    "matrix product with a weight": (product, 16, {"w": weight(8, 8)}),
    "one channel gates others": (lambda _, y: y[:, 1:] * y[:, :1].sigmoid(), 8, {"width": 9}),
    "writing into parts": (assign, 8, {}),
    "shifted channels": (shift, 8, {}),
    "positions": (lambda m, y: y[:, m.order], 8, {"order": torch.tensor([5, 1, 7, 0, 2, 6, 3, 4])}),
    "positions by mask": (lambda _, y: y[:, torch.arange(8) % 3 > 0], 8, {"reads": 5}),
    "every second channel": (lambda _, y: y[:, 1::2].flip(1), 8, {"reads": 4}),
    "shuffle operation": (lambda _, y: F.channel_shuffle(y.sigmoid(), 4), 8, {}),
    "cropped channels": (lambda _, y: F.pad(y, (1, 0, 0, 0, -2, -1)), 8, {"reads": 5}),
    "tiled": (lambda _, y: y.tile(1, 2, 1, 1), 8, {"reads": 16}),
    "unfolded": (lambda _, y: F.unfold(y, 3, padding=1).unflatten(2, (9, 9)), 8, {"reads": 72}),
    "maxima with positions": (lambda _, y: F.adaptive_max_pool2d(y.cos(), 5), 8, {}),
    "average of what is there": (
        lambda _, y: F.avg_pool2d(y.cos(), 3, 1, 1, count_include_pad=False),
        8,
        {},
    ),
    "depthwise transposed": (
        lambda m, y: m.t(y.relu()),
        8,
        {"reads": 16, "t": nn.ConvTranspose2d(8, 16, 2, 2, groups=8)},
    ),
    "dead constants of which some are 0": (
        lambda m, y: F.relu(m.n(y)),
        8,
        {"n": nn.BatchNorm2d(8, affine=False)},
    ),
    "a bias shared by two layers": (
        shared_bias,
        16,
        {"c": nn.Conv2d(8, 8, 1), "w": weight(8, 8, 1, 1)},
    ),
    "weight and bias by other names": (
        lambda m, y: F.conv2d(y.sigmoid(), m.w, m.b),
        16,
        {"w": weight(8, 8, 1, 1), "b": weight(8)},
    ),
    "bias as buffer": (
        lambda m, y: F.conv2d(y, m.w, m.b).relu(),
        16,
        {"w": weight(8, 8, 1, 1), "b": torch.arange(8.0)},
    ),
    "autocast switched off": (without_autocast, 16, {"c": nn.Conv2d(8, 8, 1)}),
    "a cast in between": (lambda m, y: m.c(y.float().sin()), 16, {"c": nn.Conv2d(8, 8, 1)}),
}


def make(name):
    function, blocks, parts = NETS[name]
    torch.manual_seed(0)
    model = copy.deepcopy(Between(function, **parts)).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("norm.bias"):
            nn.init.normal_(parameter)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model, torch.randn(2, 3, 9, 9), blocks


@pytest.mark.parametrize("name", NETS)
def test_unusual_operations_are_followed_exactly(name):
    model, x, blocks = make(name)
    graph = read_graph(model, x)
    ticket = any_ticket(graph, 0.5, seed=1)
    result = compact(model, ticket, example_inputs=x)
    y = torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        expected, found = ticket.apply_(copy.deepcopy(model))(y), result.model(y)
    assert graph.num_blocks == blocks
    assert result.proof.removed > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def narrow(m, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.relu(m.c(y)).float()


# name: (function, weight that is left out, reason, arguments and parts of Between)
LEFT_OUT = {
    "a constant read twice": (
        lambda m, y: m.c(y) + m.c(y.sigmoid()),
        "a.weight",
        "conv2d in c reads a constant with a weight that is used elsewhere too",
        {"c": nn.Conv2d(8, 8, 1)},
    ),
    "a computed bias": (
        lambda m, y: F.conv2d(y, m.w, 0.5 * m.b),
        "w",
        "conv2d joins it with what cannot be cut by name",
        {"w": weight(8, 8, 1, 1), "b": weight(8)},
    ),
    "dropout that insists": (
        lambda _, y: F.dropout(y, 0.5, training=True),
        "a.weight",
        "dropout is random in eval mode as well",
        {},
    ),
    "one by one": (
        lambda _, y: torch.stack([z * k for k, z in enumerate(y.unbind(1))], 1),
        "a.weight",
        "unbind takes it apart one by one",
        {},
    ),
    "a variance over channels": (
        lambda _, y: y / (y.var(1, keepdim=True) + 1),
        "a.weight",
        "var runs over it",
        {},
    ),
    "a mean of constants": (
        lambda _, y: y * y.sigmoid().mean(1, True),
        "a.weight",
        "mean sums over it and it is not 0 when dead",
        {},
    ),
    "constants at a padded border": (
        lambda _, y: F.avg_pool2d(y.sigmoid(), 3, 1, 1),
        "a.weight",
        "conv2d in out reads it and it is not 0 when dead",
        {},
    ),
    "autocast": (
        narrow,
        "c.weight",
        "wrap_with_autocast is not understood",
        {"c": nn.Conv2d(8, 8, 1)},
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_be_followed_is_left_out_by_name(name):
    function, left, reason, parts = LEFT_OUT[name]
    graph = read_graph(Between(function, **parts), torch.randn(2, 3, 9, 9))
    assert graph.left_out[left] == reason
    assert all(m.name != left for unit in graph.units for m in unit.producers)


def test_a_rule_that_fails_leaves_out_by_name(monkeypatch):
    def fail(reader, x):
        raise IndexError("no such place")

    monkeypatch.setitem(RULES, "relu", fail)
    model = Between(lambda _, y: y.relu())
    reason = read_graph(model, torch.randn(2, 3, 9, 9)).left_out["a.weight"]
    assert reason.startswith("relu is used in a way that its rule does not follow (IndexError")


def test_select_holds_only_the_channel_that_it_picks():
    model = Between(lambda _, y: y * y[:, 3].mean((1, 2))[:, None, None, None])
    (unit,) = read_graph(model, torch.randn(2, 3, 9, 9)).units
    assert unit.producers[0].index.ravel().tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_buffers_that_forward_changes_stay_untouched():
    def count(m, y):
        m.calls += 1
        return y.relu()

    model, x = Between(count, calls=torch.zeros(1)), torch.randn(2, 3, 9, 9)
    ticket = any_ticket(read_graph(model, x), 0.5, seed=1)
    assert compact(model, ticket, example_inputs=x).proof.removed > 0
    assert model.calls == 0


def test_masks_with_infinity_are_fine():
    mask = torch.full((9, 9), float("-inf")).triu(1)
    model = Between(lambda m, y: (y + m.mask).softmax(-1) * y, mask=mask)
    x = torch.randn(2, 3, 9, 9)
    ticket = any_ticket(read_graph(model, x), 0.5, seed=1)
    assert compact(model, ticket, example_inputs=x).proof.removed > 0


def test_a_random_output_is_said_to_be_random():
    model = Between(lambda _, y: y.relu())
    model.register_forward_hook(lambda _m, _x, y: F.dropout(y, 0.1, training=True))
    x = torch.randn(2, 3, 9, 9)
    ticket = any_ticket(read_graph(model, x), 0.5, seed=1)
    with pytest.raises(ValueError, match="random or changes from call to call"):
        compact(model, ticket, example_inputs=x)
