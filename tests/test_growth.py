# SPDX-License-Identifier: Apache-2.0
"""grow: wider units, the same function, and an optimizer that goes on."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from dessilbi import DessiLBI, Path, grow, param_groups, wrap
from dessilbi.graph import read_graph
from dessilbi.growth.planting import resized
from dessilbi.growth.widening import widths_of
from dessilbi.models import build_model
from dessilbi.models.gpt import GPT
from dessilbi.models.resnet import Bottleneck, ResNet


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 3),
    )


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0])


def stepped(model, optimizer, steps=3):
    model.train()
    for number in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X * (1 + number)), Y).backward()
        optimizer.step()


def trained(steps=5, **options):
    model = small_net()
    options = {"lr": 0.1, "nu": 1.0, "lam": 0.05, "momentum": 0.9} | options
    optimizer = DessiLBI(param_groups(model), **options)
    stepped(model, optimizer, steps)
    return model, optimizer


def vision(name):
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.get_model(name, weights=None, num_classes=5)


NETS = {
    "lenet": (lambda: build_model("lenet", num_classes=10, in_channels=1), (2, 1, 28, 28), 3),
    "vgg16-bn": (lambda: build_model("vgg16-bn", num_classes=10, in_channels=3), (2, 3, 32, 32), 1),
    "resnet20": (lambda: build_model("resnet20", num_classes=10, in_channels=3), (2, 3, 16, 16), 4),
    "bottleneck": (lambda: ResNet(Bottleneck, 1), (2, 3, 16, 16), 4),
    "bottleneck, padded": (lambda: ResNet(Bottleneck, 1, shortcut="pad"), (2, 3, 16, 16), 4),
    "mobilenet_v2": (lambda: vision("mobilenet_v2"), (4, 3, 64, 64), 5),
    "character GPT": (lambda: GPT(num_classes=9, length=8, width=16, depth=2), None, 7),
}


@pytest.mark.parametrize("name", NETS)
def test_every_unit_gets_wider_and_the_function_stays(name):
    make, shape, more = NETS[name]
    torch.manual_seed(0)
    model = make().train()
    x = torch.randint(9, (2, 8)) if shape is None else torch.randn(shape)
    if shape is not None:
        model(x)  # norms with statistics of their own
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sizes = widths_of(read_graph(model, x))
    if shape is None:
        sizes = {unit: width for unit, width in sizes.items() if ".up." in unit}
    grown = grow(model, {u: w + more for u, w in sizes.items()}, example_inputs=x, seed=0)
    assert len(sizes) >= 2
    assert grown.proof.max_relative_diff <= 1e-6
    assert grown.proof.relative_diff <= 1e-12
    assert grown.proof.params_after > grown.proof.params_before
    assert grown.proof.macs_after > grown.proof.macs_before
    assert widths_of(read_graph(grown.model, x)) == grown.sizes
    assert all(grown.sizes[unit] == width + more for unit, width in sizes.items())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_new_blocks_learn_from_the_first_steps_on():
    model, optimizer = trained()
    grown = grow(model, {"0": 6}, example_inputs=X, optimizer=optimizer, seed=3)
    incoming, reading = grown.model[0].weight, grown.model[3].weight
    assert bool(incoming[4:].any(dim=(1, 2, 3)).all())
    assert not bool(reading[:, 4:].any())
    start = incoming[4:].detach().clone()
    stepped(grown.model, grown.optimizer, 2)
    assert bool(reading[:, 4:].any())
    assert not torch.equal(incoming[4:], start)


def test_fresh_draws_the_weights_that_read_new_blocks_as_well():
    model = small_net()
    grown = grow(model, {"0": 6}, example_inputs=X, fresh=True, seed=3)
    assert bool(grown.model[3].weight[:, 4:].any())
    assert grown.proof.max_relative_diff > 1e-3
    assert torch.equal(grown.model[3].weight[:, :4], model[3].weight)


def test_growing_by_nothing_continues_to_the_bit():
    model, optimizer = trained()
    grown = grow(model, {"0": 4}, example_inputs=X, optimizer=optimizer)
    stepped(model, optimizer)
    assert not torch.equal(grown.model[0].weight, model[0].weight)  # nothing is shared
    stepped(grown.model, grown.optimizer)
    own, other = model.state_dict(), grown.model.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert torch.equal(optimizer.support()["0.weight"], grown.optimizer.support()["0.weight"])


def test_state_goes_on_where_it_was_and_is_zero_where_it_is_new():
    model, optimizer = trained()
    grown = grow(model, {"0": 6, "3": 8}, example_inputs=X, optimizer=optimizer)
    for key in ("v", "momentum_buffer"):
        old = optimizer.state[model[3].weight][key]
        new = grown.optimizer.state[grown.model[3].weight][key]
        assert bool(old.any())
        assert torch.equal(new[:6, :4], old)
        assert not bool(new[6:].any())
        assert not bool(new[:, 4:].any())
    assert [g["structure"] for g in grown.optimizer.param_groups] == [
        g["structure"] for g in optimizer.param_groups
    ]
    assert torch.equal(grown.model[1].running_mean[:4], model[1].running_mean)
    assert not bool(grown.model[1].running_mean[4:].any())
    assert bool((grown.model[1].running_var[4:] == 1).all())


def test_a_wrapped_optimizer_and_its_scheduler_follow():
    model = small_net()
    base = torch.optim.AdamW(param_groups(model), lr=0.01)
    optimizer = wrap(base, nu=1.0, lam=0.05)
    scheduler = CosineAnnealingLR(optimizer, 20)
    stepped(model, optimizer)
    scheduler.step()
    grown = grow(model, {"0": 5}, example_inputs=X, optimizer=optimizer)
    again = grown.follow(scheduler)
    again.step()
    assert optimizer.param_groups[0]["lr"] != grown.optimizer.param_groups[0]["lr"]
    state = grown.optimizer.base.state[grown.model[0].weight]
    assert float(state["step"]) == 3
    assert not bool(state["exp_avg"][4:].any())
    stepped(grown.model, grown.optimizer)
    with pytest.raises(ValueError, match=r"call grow\(\.\.\., optimizer="):
        grow(model, {"0": 5}, example_inputs=X).follow(scheduler)


def test_a_path_goes_on_and_knows_when_blocks_were_born(tmp_path):
    model, _ = trained(0)
    optimizer = DessiLBI(param_groups(model), lr=0.1, nu=1.0, lam=0.02, momentum=0.9)
    path = Path(optimizer, every=1, file=tmp_path / "path.jsonl")
    stepped(model, optimizer, 4)
    entries, support = path.entry()["0.weight"], path.support(step=4)["0.weight"]
    grown = grow(model, {"0": 6}, example_inputs=X, optimizer=optimizer)
    assert grown.follow_path(path) is path
    assert torch.equal(path.entry()["0.weight"][:4], entries)
    assert torch.equal(path.support(step=4)["0.weight"][:4], support)
    assert bool(support.any())
    assert not bool(path.support(step=4)["0.weight"][4:].any())
    assert path.history.births["0.weight"].flatten().tolist() == [0, 0, 0, 0, 4, 4]
    stepped(grown.model, grown.optimizer, 4)
    assert path.step == 8
    stepped(model, optimizer, 1)
    assert path.step == 8
    from dessilbi.path.history import History

    read = History.load(tmp_path / "path.jsonl")
    assert read.specs == path.history.specs
    assert torch.equal(read.births["0.weight"], path.history.births["0.weight"])
    assert torch.equal(read.entries["0.weight"], path.entry()["0.weight"])
    assert torch.equal(read.support(3)["0.weight"], path.support(step=4)["0.weight"])


def test_an_enforced_ticket_holds_the_old_and_not_the_new():
    model, optimizer = trained()
    ticket = optimizer.support()
    masks = {name: mask.clone() for name, mask in ticket.items()}
    masks["0.weight"][0] = False
    from dessilbi import Ticket

    Ticket(masks, ticket.specs).enforce(model, optimizer)
    grown = grow(model, {"0": 6}, example_inputs=X, optimizer=optimizer)
    stepped(grown.model, grown.optimizer, 2)
    assert not bool(grown.model[0].weight[0].any())
    assert bool(grown.model[0].weight[4:].any())


def test_a_seed_decides_the_new_values_and_moves_no_other_numbers():
    model = small_net()
    state = torch.get_rng_state()
    one, two, three = (
        grow(model, {"0": 6}, example_inputs=X, seed=seed).model[0].weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(state, torch.get_rng_state())


def test_groups_of_a_convolution_stay_even():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 3)
    )
    grown = grow(net, {"0": 12, "2": 16}, example_inputs=X)
    assert (grown.model[2].groups, grown.model[2].in_channels) == (4, 12)
    assert grown.model[2].out_channels == 16
    assert grown.proof.relative_diff <= 1e-12
    with pytest.raises(ValueError, match=r"4 groups stay even: 8 can change by multiples of 4"):
        grow(net, {"0": 9}, example_inputs=X)


def test_resized_makes_a_smaller_or_larger_model_of_the_same_kind():
    model = build_model("resnet20", num_classes=10, in_channels=3, seed=0)
    x = torch.randn(2, 3, 16, 16)
    widths = dict.fromkeys(widths_of(read_graph(model, x)), 8)
    first = next(iter(widths))
    small = resized(model, {**widths, first: 24}, example_inputs=x, seed=0)
    found = widths_of(read_graph(small, x))
    assert found == {**widths, first: 24}
    assert small(x).shape == (2, 10)


class Held(nn.Module):
    """Holds a size in its forward."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)).view(-1, 2, 3).reshape(-1, 6))


class Normed(nn.Module):
    """A residual width under a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


@pytest.mark.parametrize(
    ("make", "sizes", "message"),
    [
        (small_net, {"7": 9}, "no unit or layer '7'"),
        (small_net, {"0": 3}, "has 4 blocks and cannot grow to 3"),
        (small_net, {"0": 0}, "the width 0 of 0 is not allowed"),
        (small_net, {"0": 6, "0.weight": 7}, "one unit and get wider together: 6 and 7"),
        (small_net, {"6": 5}, "6 has no width that can change"),
        (Normed, {"embed": 12}, "layer_norm in norm takes its statistics over it"),
        (Held, {"one": 8}, "the forward of Held does not follow new widths"),
    ],
)
def test_what_cannot_grow_is_refused_in_one_sentence(make, sizes, message):
    model = make()
    x = X if make is small_net else torch.randn(2, 4)
    with pytest.raises(ValueError, match=message) as caught:
        grow(model, sizes, example_inputs=x)
    assert "\n" not in str(caught.value)


def test_an_optimizer_that_cannot_follow_is_refused():
    model = small_net()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match="not in the model"):
        grow(model, {"0": 6}, example_inputs=X, optimizer=other)
    rules = {"3.weight": (4, 4, None, None)}
    net = copy.deepcopy(model)
    net[3] = nn.Conv2d(4, 8, 3)
    net[6] = nn.Linear(8 * 16, 3)
    optimizer = DessiLBI(param_groups(net, rules), lr=0.1, nu=1.0)
    with pytest.raises(ValueError, match="new widths would tear"):
        grow(net, {"0": 6}, example_inputs=X, optimizer=optimizer)
    assert grow(net, {"0": 8}, example_inputs=X, optimizer=optimizer).optimizer is not None
