# SPDX-License-Identifier: Apache-2.0
"""What can be removed together, what follows, and what is left out and why."""

import pytest
import torch
from torch import nn

from dessilbi.graph import read_graph, rule
from dessilbi.graph.program import as_arguments


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.relu(self.a(x) + self.b(x)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.relu(self.shared(torch.relu(self.shared(self.first(x))))))


class Calls(nn.Module):
    """Wraps one function between two linear layers."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 6), nn.Linear(6, 2), function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def units(model, x):
    return {u.name: u.num_blocks for u in read_graph(model, x).units}


def test_a_sum_couples_its_producers():
    graph = read_graph(Add(), torch.ones(1, 4))
    (unit,) = graph.units
    assert [m.name for m in unit.producers] == ["a.weight", "b.weight"]
    assert [m.name for m in unit.followers] == ["a.bias", "b.bias"]
    assert [(m.name, m.dim) for m in unit.consumers] == [("out.weight", 1)]
    assert unit.num_blocks == 6
    assert unit.producers[0].index.tolist() == [[i] for i in range(6)]


def test_a_shared_module_couples_its_calls():
    graph = read_graph(Twice(), torch.ones(1, 4))
    (unit,) = graph.units
    assert {m.name for m in unit.producers} == {"first.weight", "shared.weight"}


def test_a_gate_need_not_be_dead():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.g, self.b = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)) * torch.sigmoid(self.g(x)))

    (unit,) = read_graph(Gated(), torch.ones(1, 4)).units
    assert [m.name for m in unit.producers] == ["a.weight"]
    assert ("g.weight", "gate") in [(m.name, m.role) for m in unit.members]


def test_statistics_of_a_norm_follow():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    (unit,) = read_graph(model, torch.ones(1, 3, 2, 2)).units
    statistics = [m.name for m in unit.members if m.role == "statistic"]
    assert statistics == ["1.running_mean", "1.running_var"]


def test_flatten_gives_several_columns_per_block():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    (unit,) = read_graph(model, torch.ones(1, 3, 2, 2)).units
    assert unit.consumers[0].index.tolist() == [[4 * i + j for j in range(4)] for i in range(4)]


def test_the_output_is_left_out_with_its_reason():
    graph = read_graph(nn.Linear(4, 3), torch.ones(1, 4))
    assert graph.left_out == {"weight": "it is an output of the model"}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: torch.fft.fft(x).real, "fft_fft is not understood"),
        (lambda x: torch.sort(x)[0], "sort is not understood"),
        (lambda x: x.softmax(-1), "softmax normalises over it"),
        (lambda x: nn.functional.layer_norm(x, (6,)), "layer_norm takes its statistics over it"),
        (lambda x: x / x.std(-1, keepdim=True), "std runs over it"),
        (lambda x: x + x.mean(-1, keepdim=True), "linear in b reads it and it is not 0 when dead"),
        (lambda x: x.roll(1, -1), "roll shifts it by a fixed number"),
        (lambda x: x + torch.arange(6.0), "add joins it with a tensor that keeps its size"),
        (lambda x: torch.cumsum(x, -1), "cumsum runs over it"),
        (lambda x: torch.where(x > x.amax(-1, True), x, -x), "amax runs over it"),
        (lambda x: x * torch.argsort(x), "argsort is not understood"),
    ],
)
def test_what_is_not_understood_is_left_out(function, reason):
    graph = read_graph(Calls(function), torch.ones(2, 4))
    assert graph.units == ()
    assert graph.left_out["a.weight"] == reason


def test_users_can_add_a_rule():
    from dessilbi.graph.reader import RULES

    model = Calls(lambda x: torch.special.i1(x))
    assert units(model, torch.ones(2, 4)) == {}
    try:

        @rule("special_i1")
        def zero_stays(reader, x):
            return x

        assert units(model, torch.ones(2, 4)) == {"a.weight": 6}
    finally:
        del RULES["special_i1"]


def test_heads_are_blocks():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 3 * 12), nn.Linear(12, 2)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).reshape(b, n, 12))

    (unit,) = read_graph(Heads(), torch.ones(2, 5, 8)).units
    assert unit.num_blocks == 3
    rows = unit.producers[0].index[1].tolist()
    assert rows == [*range(4, 8), *range(16, 20), *range(28, 32)]


def test_macs_count_the_samples_of_the_program():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    graph = read_graph(model, torch.ones(3, 3, 8, 8))
    assert graph.reading.batch == 3
    assert graph.macs == {"0.weight": 3 * 4 * 36 * 27, "2.weight": 3 * 5 * 144}


@pytest.mark.parametrize("wrong", [3, (), {}, "x"])
def test_wrong_kinds_of_example_inputs_are_refused(wrong):
    with pytest.raises(ValueError, match="give a tensor"):
        as_arguments(wrong)


def test_writing_into_a_slice_is_never_silently_wrong():
    def write(x):
        x = x.clone()
        x[:, 0] = 1.0
        return x

    assert units(Calls(write), torch.ones(2, 4)) == {}


def test_couplings_name_the_unit_and_its_blocks():
    from dessilbi.graph import couplings

    found = couplings(read_graph(Add(), torch.ones(1, 4)))
    assert {name: (c.unit, c.structure) for name, c in found.items()} == {
        "a.weight": ("a.weight", (1, None)),
        "b.weight": ("a.weight", (1, None)),
    }


def test_torch_pruning_finds_the_same_groups_on_plain_nets():
    tp = pytest.importorskip("torch_pruning")
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * 16, 5)),
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    theirs = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    ours = {u.name: u for u in read_graph(model, x).units}
    assert len(ours) == 2
    for name, layer in (("0.weight", model[0]), ("3.weight", model[3])):
        group = theirs.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=[1])
        named = {id(m): n for n, m in model.named_modules()}
        layers = {
            named[id(dep.target.module)] for dep, _ in group if id(dep.target.module) in named
        }
        members = {m.name.rpartition(".")[0] for m in ours[name].members}
        assert members == layers - {"2", "4", "5"}
