# SPDX-License-Identifier: Apache-2.0
"""Closed tickets become smaller models that compute the same function."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.compaction.compaction import compact
from dessilbi.cuts.closing import close
from dessilbi.testing import random_ticket


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a = nn.Sequential(
            nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(inplace=True)
        )
        self.b = nn.Sequential(nn.Conv2d(10, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(self.a(x)))
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(17)
        self.c = nn.Conv2d(17, 8, 1)
        self.fc = nn.Linear(8 * 4, 5)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.silu(self.b(a))
        x = self.c(F.relu(self.norm(torch.cat([b, x, a], 1))))
        return self.fc(F.adaptive_avg_pool2d(F.hardswish(x), 2).flatten(1))


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3)
        self.b = nn.Conv2d(5, 6, 1)
        self.c = nn.Conv2d(17, 4, 1)

    def forward(self, x):
        one, two, three = F.relu(self.a(x)).split([5, 8, 3], 1)
        return self.c(torch.cat([F.relu(self.b(one)), two, three], 1)).sum((2, 3))


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.c = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(12)
        self.d = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        left, right = F.relu(self.a(x)).chunk(2, 1)
        x = self.norm(torch.cat([left, F.relu(self.c(self.b(right)))], 1))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        x = torch.cat([left, F.relu(right)], 1)
        return self.d(x).amax((2, 3))


class Reshuffle(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.down = nn.Conv2d(12, 4, 1)
        self.up = nn.Conv2d(4, 12, 1)
        self.out = nn.Conv2d(12, 5, 3, padding=1)

    def forward(self, x):
        x = F.relu6(self.a(x))
        gate = torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.out(gate * x).mean((2, 3))


class Attention(nn.Module):
    def __init__(self, heads=4, size=6, width=20, kv_heads=4, *, fused=True):
        super().__init__()
        self.heads, self.kv_heads, self.size, self.fused = heads, kv_heads, size, fused
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * size)
        self.proj = nn.Linear(heads * size, width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x):
        b, n, _ = x.shape
        groups = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        q, k, v = self.qkv(self.norm(x)).split(groups, -1)
        q = q.view(b, n, self.heads, self.size).transpose(1, 2)
        k = k.view(b, n, self.kv_heads, self.size).transpose(1, 2)
        v = v.view(b, n, self.kv_heads, self.size).transpose(1, 2)
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) * self.size**-0.5).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, self.heads * self.size))
        return x + self.mlp(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        x = self.emb(ids)
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class Residuals(nn.Module):
    """A stream that only RMSNorm reads, as in recent language models."""

    def __init__(self, norm=nn.RMSNorm):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)
        self.norms = nn.ModuleList(norm(16) for _ in range(3))
        self.norms[1].eps = 0.1
        self.qkv, self.proj = nn.Linear(16, 24, bias=False), nn.Linear(8, 16, bias=False)
        self.gate, self.up = nn.Linear(16, 20, bias=False), nn.Linear(16, 20, bias=False)
        self.down = nn.Linear(20, 16, bias=False)

    def forward(self, x):
        x = self.first(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.last(self.norms[2](x))


class HandNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


IMAGE = (2, 3, 9, 9)
NETS = {
    "plain": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 10, 3),
            nn.BatchNorm2d(10),
            nn.ReLU(True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(40, 5),
        ),
        IMAGE,
        18,
    ),
    "residual": (Residual, IMAGE, 22),
    "concat": (Concat, IMAGE, 22),
    "split": (Split, IMAGE, 22),
    "shuffle": (Shuffle, IMAGE, 18),
    "two shuffles": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.ReLU(), Reshuffle(), Reshuffle(), nn.Conv2d(12, 5, 1)
        ),
        IMAGE,
        12,
    ),
    "gate": (Gate, IMAGE, 16),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 16, 3, padding=1, groups=8),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Conv2d(16, 5, 1),
        ),
        IMAGE,
        8,
    ),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.ReLU(),
            nn.Conv2d(12, 18, 3, padding=1, groups=3),
            nn.ReLU(),
            nn.Conv2d(18, 5, 1),
        ),
        IMAGE,
        30,
    ),
    "group norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 5, 3, padding=1)
        ),
        IMAGE,
        4,
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, stride=2),
            nn.InstanceNorm2d(6, affine=True),
            nn.PReLU(6),
            nn.ConvTranspose2d(6, 6, 2, groups=6),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(6, 4, 1),
        ),
        IMAGE,
        14,
    ),
    "folded bias": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Sigmoid(),
            nn.Conv2d(8, 6, 3, bias=False),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 5),
        ),
        IMAGE,
        14,
    ),
    "carrier": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Sigmoid(),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(6 * 49, 5),
        ),
        IMAGE,
        14,
    ),
    "layer norm mlp": (
        lambda: nn.Sequential(
            nn.LayerNorm(10),
            nn.Linear(10, 12),
            nn.GELU(),
            nn.Linear(12, 9),
            nn.Mish(),
            nn.Linear(9, 3),
        ),
        (4, 10),
        21,
    ),
    "view to image": (
        lambda: nn.Sequential(
            nn.Linear(10, 32), nn.ReLU(), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 4, 2)
        ),
        (4, 10),
        8,
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ELU(), nn.MaxPool1d(2), nn.Conv1d(8, 2, 1)),
        (2, 3, 12),
        8,
    ),
    "attention": (Attention, (2, 7, 20), 20),
    "plain attention": (lambda: Attention(fused=False), (2, 7, 20), 20),
    "grouped-query attention": (lambda: Attention(6, 4, 20, 3), (2, 7, 20), 19),
    "root mean square norms": (Residuals, (2, 7, 6), 38),
    "root mean square by hand": (lambda: Residuals(HandNorm), (2, 7, 6), 38),
    "torch attention": (
        lambda: nn.TransformerEncoderLayer(20, 4, 24, batch_first=True),
        (2, 7, 20),
        28,
    ),
    "gated embedding": (Gated, None, 20),
}


def make(name):
    torch.manual_seed(0)
    factory, shape, blocks = NETS[name]
    model = factory().eval()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm | HandNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(shape) if shape else torch.randint(0, 11, (2, 6))
    return model, x, blocks


def other_input(x):
    return torch.randn_like(x) if x.is_floating_point() else x.flip(1)


@pytest.mark.parametrize(
    ("density", "dtype", "tolerance"), [(0.7, torch.float64, 1e-12), (0.4, torch.float32, 1e-5)]
)
@pytest.mark.parametrize("name", NETS)
def test_compacted_equals_masked(name, density, dtype, tolerance):
    model, x, _ = make(name)
    model = model.to(dtype)
    before = copy.deepcopy(model.state_dict())
    x = x.to(dtype) if x.is_floating_point() else x
    ticket = random_ticket(model, example_inputs=x, density=density)
    result = compact(model, ticket, example_inputs=x)
    y = other_input(torch.cat([x, x, x]))
    with torch.no_grad():
        expected, found = ticket.apply_(copy.deepcopy(model))(y), result.model(y)
    assert (expected - found).abs().max() <= tolerance * expected.abs().max()
    assert result.proof.relative_diff <= 1e-12
    assert result.proof.removed > 0
    assert result.proof.params_after < result.proof.params_before
    assert result.proof.macs_after < result.proof.macs_before
    assert result.proof.removed + sum(result.proof.kept_zero.values()) == result.proof.dead
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the original was touched"


@pytest.mark.parametrize("name", NETS)
def test_close_is_idempotent_and_every_block_is_found(name):
    from dessilbi.graph import read_graph

    model, x, blocks = make(name)
    assert read_graph(model, x).num_blocks == blocks
    ticket = random_ticket(model, example_inputs=x, density=0.5, seed=3)
    assert close(ticket, model, example_inputs=x) == ticket


def filter_ticket(model, name, dead):
    weight = dict(model.named_parameters())[name]
    block = (1,) + (None,) * (weight.dim() - 1)
    mask = torch.ones(weight.shape[0], *[1] * (weight.dim() - 1), dtype=torch.bool)
    mask[dead] = False
    return Ticket({name: mask}, {name: TensorSpec(tuple(weight.shape), block)})


def test_an_unclosed_ticket_is_refused():
    model, x, _ = make("plain")
    with pytest.raises(ValueError, match="call close"):
        compact(model, filter_ticket(model, "0.weight", [1, 2]), example_inputs=x)


def test_a_ticket_of_another_model_is_refused():
    model, x, _ = make("plain")
    other = nn.Sequential(nn.Linear(3, 4))
    ticket = filter_ticket(other, "0.weight", [0])
    with pytest.raises(ValueError, match="another model"):
        close(ticket, model, example_inputs=x)


def test_nan_weights_are_refused():
    model, x, _ = make("plain")
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight has values that are not finite"):
        compact(model, ticket, example_inputs=x)


def test_wrong_example_inputs_are_refused():
    model, _, _ = make("plain")
    with pytest.raises(ValueError, match="cannot be read"):
        random_ticket(model, example_inputs=torch.randn(2, 4, 9, 9), density=0.5)


def test_example_inputs_that_are_not_finite_are_refused():
    model, x, _ = make("plain")
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    with pytest.raises(ValueError, match="the example input has values that are not finite"):
        compact(model, ticket, example_inputs=x * float("nan"))


def test_a_model_that_does_not_trace_is_refused_in_one_sentence_and_nothing_else(capfd):
    class Branching(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if float(y.sum()) > 0 else -y

    with pytest.raises(ValueError, match="Branching cannot be read with these example") as caught:
        random_ticket(Branching(4, 4), example_inputs=torch.randn(2, 4), density=0.5)
    assert "\n" not in str(caught.value)
    assert "forward accepts them, but torch.export cannot follow it" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_inputs_that_forward_does_not_accept_are_told_apart():
    with pytest.raises(ValueError, match="forward does not accept them: give inputs that it does"):
        random_ticket(nn.Linear(4, 4), example_inputs=torch.randn(2, 3), density=0.5)


def test_a_model_without_units_is_refused_by_random_ticket():
    with pytest.raises(ValueError, match="nothing in Linear can be removed"):
        random_ticket(nn.Linear(3, 4), example_inputs=torch.ones(1, 3), density=0.5)


def test_a_unit_is_dead_only_if_all_producers_are():
    model, x, _ = make("residual")
    ticket = close(filter_ticket(model, "stem.weight", [0, 1]), model, example_inputs=x)
    assert ticket.origin["dead_blocks"] == 0


def test_uneven_groups_are_revived_and_listed():
    model, x, _ = make("grouped")
    ticket = close(filter_ticket(model, "0.weight", [0, 1, 4]), model, example_inputs=x)
    assert ticket.origin["revived"] == {"0.weight": [0, 1, 4]}
    assert ticket["0.weight"].all()
    assert close(ticket, model, example_inputs=x) == ticket


def test_uneven_patterns_of_equal_count_are_removed():
    model, x, _ = make("grouped")
    ticket = close(filter_ticket(model, "0.weight", [0, 5, 11]), model, example_inputs=x)
    result = compact(model, ticket, example_inputs=x)
    assert result.model[2].weight.shape == (18, 3, 3, 3)
    assert result.proof.relative_diff < 1e-12


def test_a_whole_group_goes():
    model, x, _ = make("grouped")
    one = filter_ticket(model, "0.weight", [0, 1, 2, 3])
    two = filter_ticket(model, "2.weight", [0, 1, 2, 3, 4, 5])
    both = Ticket({**one, **two}, {**one.specs, **two.specs})
    result = compact(model, close(both, model, example_inputs=x), example_inputs=x)
    assert result.model[2].groups == 2


def test_a_dead_layer_beside_a_bypass_keeps_one_channel_of_zeros():
    model, x, _ = make("residual")
    ticket = close(filter_ticket(model, "a.0.weight", list(range(10))), model, example_inputs=x)
    result = compact(model, ticket, example_inputs=x)
    assert result.model.a[0].out_channels == 1
    assert result.proof.kept_zero == {"a.0.weight": 1}


def test_a_dead_layer_without_bypass_is_refused():
    model, x, _ = make("plain")
    ticket = close(filter_ticket(model, "0.weight", list(range(8))), model, example_inputs=x)
    with pytest.raises(ValueError, match="does not depend on the input"):
        compact(model, ticket, example_inputs=x)


def test_the_class_and_names_are_kept_where_forward_allows():
    model, x, _ = make("residual")
    result = compact(model, random_ticket(model, example_inputs=x, density=0.5), example_inputs=x)
    assert type(result.model) is Residual
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert result.proof.form == "module"


def test_widths_are_rounded_up():
    model, x, _ = make("plain")
    ticket = random_ticket(model, example_inputs=x, density=0.3)
    result = compact(model, ticket, example_inputs=x, multiple_of=4)
    assert result.model[0].out_channels == 4
    assert result.model[3].out_channels == 4
    assert result.proof.relative_diff < 1e-12


def test_widths_of_a_residual_net_are_rounded_up_together():
    model, x, _ = make("residual")
    ticket = random_ticket(model, example_inputs=x, density=0.4)
    plain = compact(model, ticket, example_inputs=x)
    result = compact(model, ticket, example_inputs=x, multiple_of=8)
    assert plain.model.stem.out_channels == 5
    assert result.model.stem.out_channels == result.model.b[0].out_channels == 8
    assert result.model.a[0].out_channels == 8
    assert result.proof.rounded == {"stem.weight": 3, "a.0.weight": 4}
    assert plain.proof.rounded == {}
    assert result.proof.removed + sum(result.proof.rounded.values()) == result.proof.dead
    assert "kept as zeros to round a width up: 3 of stem.weight" in str(result.proof)
    assert result.proof.relative_diff < 1e-12


def test_groups_stay_even_when_widths_are_rounded_up():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(48, 5, 1),
    )
    x = torch.randn(IMAGE)
    ticket = random_ticket(model, example_inputs=x, density=0.4)
    result = compact(model, ticket, example_inputs=x, multiple_of=8)
    assert compact(model, ticket, example_inputs=x).model[0].out_channels == 12
    assert result.model[0].out_channels == 16
    assert result.model[2].out_channels == 24
    assert result.model[2].groups == 4
    assert result.proof.rounded == {"0.weight": 4, "2.weight": 4}
    assert result.proof.relative_diff < 1e-12


def test_a_layer_that_has_no_such_width_keeps_what_it_needs():
    model, x, _ = make("layer norm mlp")
    ticket = random_ticket(model, example_inputs=x, density=0.8)
    result = compact(model, ticket, example_inputs=x, multiple_of=16)
    assert (result.model[1].out_features, result.model[3].out_features) == (10, 7)
    assert result.proof.rounded == {}


def test_an_rms_norm_keeps_its_class_and_gets_another_eps():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 16), nn.RMSNorm(16), nn.Linear(16, 5))
    z = 1e-4 * torch.randn(9, 6)  # so small that the default eps, which depends on the type, counts
    with torch.no_grad():
        plain[0].bias.zero_()
    ticket = random_ticket(plain, example_inputs=z, density=0.5)
    result = compact(plain, ticket, example_inputs=z)
    assert result.model[1].normalized_shape == (8,)
    assert result.model[1].eps == pytest.approx(2 * torch.finfo(torch.float32).eps)
    masked = ticket.apply_(copy.deepcopy(plain))
    torch.testing.assert_close(result.model(z), masked(z), rtol=1e-5, atol=1e-6)


def test_element_tickets_remove_rows_without_a_living_element():
    model, x, _ = make("layer norm mlp")
    mask = torch.rand(12, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[[2, 7]] = False
    ticket = Ticket({"1.weight": mask}, {"1.weight": TensorSpec((12, 10), (1, 1))})
    result = compact(model, close(ticket, model, example_inputs=x), example_inputs=x)
    assert result.model[1].out_features == 10


def test_training_mode_and_statistics_stay_untouched():
    model, x, _ = make("plain")
    model.train()
    before = copy.deepcopy(model.state_dict())
    result = compact(model, random_ticket(model, example_inputs=x, density=0.5), example_inputs=x)
    assert model.training
    assert model[8].training
    assert result.model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_without_units_compacts_to_itself():
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    ticket = close(filter_ticket(model, "weight", [1]), model, example_inputs=x)
    result = compact(model, ticket, example_inputs=x)
    assert result.proof.removed == 0
    assert result.cuts == {}


def test_a_dead_bias_of_a_removed_layer_is_masked_and_the_ticket_says_so():
    model, x, _ = make("residual")
    ticket = filter_ticket(model, "a.0.weight", [3])
    closed = close(ticket, model, example_inputs=x)
    assert closed.origin["density_before"] == ticket.density
    assert f"closed from density {ticket.density:.4g}" in repr(closed)
    assert closed.origin["closed"] is True
    named = [n for n in closed if not closed[n].all()]
    assert named == ["a.0.weight", "a.1.weight", "a.1.bias", "b.0.weight"]


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x, scale=None):
            hidden = torch.relu(self.a(x))
            hidden = hidden if scale is None else hidden * scale
            return {"p": self.b(hidden), "q": (self.c(hidden),)}

    x, scale = torch.randn(2, 4), torch.rand(2, 1)
    for inputs in (x, (x, None), (x, scale), {"x": x, "scale": scale}):
        ticket = random_ticket(Two(), example_inputs=inputs, density=0.5)
        assert compact(Two(), ticket, example_inputs=inputs).proof.removed == 4


def test_the_rewritten_program_takes_any_batch():
    model, x, _ = make("torch attention")
    ticket = random_ticket(model, example_inputs=x[:1], density=0.5)
    result = compact(model, ticket, example_inputs=x[:1])
    assert result.proof.form == "program"
    masked = ticket.apply_(copy.deepcopy(model))
    for size in (1, 2, 5):
        y = torch.randn(size, 7, 20)
        with torch.no_grad():
            torch.testing.assert_close(result.model(y), masked(y))


def test_the_proof_prints_as_a_table():
    model, x, _ = make("plain")
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    result = compact(model, ticket, example_inputs=x, latency_repeats=3)
    text = str(result.proof)
    for word in ("parameters", "bytes", "MACs", "latency ms", "removed 9 of 9 dead units"):
        assert word in text


def test_cuts_name_what_stays():
    model, x, _ = make("layer norm mlp")
    ticket = close(filter_ticket(model, "1.weight", [0, 5]), model, example_inputs=x)
    cuts = compact(model, ticket, example_inputs=x).cuts
    assert {(c.name, c.dim, len(c.index)) for own in cuts.values() for c in own} == {
        ("1.weight", 0, 10),
        ("1.bias", 0, 10),
        ("3.weight", 1, 10),
    }


@pytest.mark.parametrize("name", NETS)
def test_the_rewritten_program_is_exact_as_well(name, monkeypatch):
    def fail(*_):
        raise RuntimeError("forced")

    monkeypatch.setattr("dessilbi.compaction.candidates.cut_module", fail)
    model, x, _ = make(name)
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    result = compact(model, ticket, example_inputs=x)
    assert result.proof.form == "program"
    assert result.proof.relative_diff <= 1e-12


def test_a_model_that_is_a_part_called_module_compacts_under_the_names_of_its_ticket():
    plain, x, _ = make("plain")
    model = nn.ModuleDict({"module": plain})
    model.forward = plain.forward
    ticket = close(filter_ticket(plain, "0.weight", [1, 2]), model, example_inputs=x)
    result = compact(model, ticket, example_inputs=x)
    assert result.proof.removed == 2
    assert result.cuts["1.running_mean"][0].index.tolist() == [0, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("end", [torch.log_softmax, torch.softmax], ids=lambda end: end.__name__)
def test_a_forward_that_rounds_to_float32_on_its_way_is_certified_by_its_program(end):
    class Casting(nn.Sequential):
        def forward(self, x):
            return end(self[1](self[0](x).float().relu().to(x.dtype)), -1)

    torch.manual_seed(0)
    model, x = Casting(nn.Linear(8, 32), nn.Linear(32, 400)), torch.randn(4, 8)
    with torch.no_grad():
        model[1].weight.mul_(30)
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    small = compact(model, ticket, example_inputs=x)
    assert small.proof.relative_diff < 1e-9
    assert small.proof.params_after < small.proof.params_before
