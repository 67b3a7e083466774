# SPDX-License-Identifier: Apache-2.0
"""Tickets: what they count, what they do to models, and what they refuse."""

import copy
import pickle
from collections import OrderedDict
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import block_of, cut_shapes
from torch import nn

from dessilbi import DessiLBI, Ticket
from dessilbi.blocks.structure import grid_shape
from dessilbi.blocks.ticket import TensorSpec, pack_bits, unpack_bits


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


SPECS = {
    "conv.weight": TensorSpec((6, 2, 3, 3), (1, None, None, None)),
    "fc.weight": TensorSpec((4, 6), (2, 1)),
}


def ticket_of(seed=0, **origin):
    generator = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(s.grid, generator=generator) < 0.5 for n, s in SPECS.items()}
    ticket = Ticket(masks, SPECS, origin)
    assert 0 < ticket.density < 1
    return ticket


@st.composite
def tickets(draw):
    cuts = draw(st.lists(cut_shapes(max_rank=4), max_size=3))
    specs = {f"layer{i}.weight": TensorSpec(*cut) for i, cut in enumerate(cuts)}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.0, 0.4, 1.0]))
    masks = {n: torch.rand(s.grid, generator=generator) < share for n, s in specs.items()}
    return Ticket(masks, specs, {"step": draw(st.integers(0, 99)), "note": draw(st.text("aä\n"))})


def brute_mask(ticket, name):
    """The element-wise mask by a loop over the elements."""
    spec, mask = ticket.specs[name], ticket[name]
    full = torch.zeros(spec.shape, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, spec.shape)).reshape(-1, len(spec.shape)):
        full[tuple(index)] = mask[block_of(index.tolist(), spec.block, spec.shape)]
    return full


@given(tickets())
def test_density_is_the_share_of_elements_kept(ticket):
    full = {name: brute_mask(ticket, name) for name in ticket}
    kept, total = sum(int(m.sum()) for m in full.values()), sum(m.numel() for m in full.values())
    assert ticket.kept_elements == kept
    assert ticket.total_elements == total
    assert ticket.density == (kept / total if total else 0.0)
    for name, mask in full.items():
        assert torch.equal(ticket.mask_of(name), mask)
        assert ticket.densities()[name] == pytest.approx(int(mask.sum()) / mask.numel())


def test_density_of_the_model_counts_every_parameter():
    model, ticket = Net(), ticket_of()
    dead = sum(int((~brute_mask(ticket, name)).sum()) for name in ticket)
    total = sum(p.numel() for p in model.parameters())
    assert ticket.density_of_model(model) == pytest.approx(1 - dead / total)
    assert ticket.density_of_model(model) > ticket.density


def test_apply_zeroes_dead_blocks_in_place_and_nothing_else():
    model, ticket = Net(), ticket_of()
    before = copy.deepcopy(model.state_dict())
    pointer = model.conv.weight.data_ptr()
    assert ticket.apply_(model) is model
    assert model.conv.weight.data_ptr() == pointer
    for name, value in model.state_dict().items():
        mask = brute_mask(ticket, name) if name in ticket else True
        assert torch.equal(value, before[name] * mask)


def test_applying_twice_is_applying_once():
    model, ticket = Net(), ticket_of()
    once = copy.deepcopy(ticket.apply_(model).state_dict())
    twice = ticket.apply_(model).state_dict()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_ticket_fits_the_wrapped_model_too():
    ticket = ticket_of()
    model = nn.DataParallel(Net())
    assert ticket.apply_(model) is model
    assert not model.module.conv.weight[~ticket["conv.weight"].flatten()].any()


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "dessilbi": lambda model: DessiLBI(
        [
            {"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1]},
            {"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 1]}
            | {"structure": None},
        ],
        structure="element",
        lr=0.1,
        nu=1.0,
        lam=0.05,
        momentum=0.9,
        weight_decay=0.01,
    ),
}
all_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def closure_of(model, optimizer, k):
    def closure():
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(4, 2, 5, 5, generator=generator)
        loss = (model(x) - x.mean((2, 3)).repeat(1, 2)).square().sum()
        loss.backward()
        return loss

    return closure


def advance(model, optimizer, k, with_closure):
    closure = closure_of(model, optimizer, k)
    if with_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def dead_values(ticket, model, optimizer):
    """Weights, gradients and state at dead positions, and the same at living ones."""
    dead, alive = [], []
    for name in ticket:
        param, mask = model.get_parameter(name), brute_mask(ticket, name)
        tensors = [param.detach(), *optimizer.state.get(param, {}).values()]
        tensors += [] if param.grad is None else [param.grad]
        for tensor in tensors:
            if tensor.shape == param.shape:
                dead.append(tensor[~mask])
                alive.append(tensor[mask])
    return torch.cat(dead), torch.cat(alive)


@all_optimizers
@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
def test_enforce_keeps_weights_gradients_and_state_dead_at_every_step(make, with_closure):
    model, ticket = Net(), ticket_of()
    optimizer = make(model)
    advance(model, optimizer, 0, with_closure)  # there is something to kill already
    assert dead_values(ticket, model, optimizer)[0].count_nonzero() > 0
    ticket.enforce(model, optimizer)
    assert not dead_values(ticket, model, optimizer)[0].any()
    before = model.fc.weight.detach().clone()
    for k in range(1, 15):
        advance(model, optimizer, k, with_closure)
        dead, alive = dead_values(ticket, model, optimizer)
        assert not dead.any()
        assert alive.count_nonzero() > 0.3 * alive.numel()
    assert not torch.equal(model.fc.weight, before)


@all_optimizers
def test_enforce_covers_gradients_that_are_set_by_hand_before_the_step(make):
    model, ticket = Net(), ticket_of()
    optimizer = make(model)
    ticket.enforce(model, optimizer)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not dead_values(ticket, model, optimizer)[0].any()


def test_gradients_are_masked_as_soon_as_they_are_there():
    model, ticket = Net(), ticket_of()
    optimizer = OPTIMIZERS["sgd"](model)
    ticket.enforce(model, optimizer)
    closure_of(model, optimizer, 0)()
    assert model.fc.weight.grad.any()
    assert not model.fc.weight.grad[~brute_mask(ticket, "fc.weight")].any()


@all_optimizers
def test_removing_the_handle_gives_the_blocks_their_freedom_back(make):
    model, ticket = Net(), ticket_of()
    optimizer = make(model)
    handle = ticket.enforce(model, optimizer)
    advance(model, optimizer, 0, with_closure=False)
    handle.remove()
    handle.remove()
    advance(model, optimizer, 1, with_closure=False)
    assert dead_values(ticket, model, optimizer)[0].count_nonzero() > 0


def test_a_ticket_cannot_be_changed():
    mask = torch.tensor([[True], [False]])
    masks, specs = {"w": mask}, {"w": TensorSpec((2, 3), (1, None))}
    origin = {"step": 1}
    ticket = Ticket(masks, specs, origin)
    mask.fill_(True)
    masks.clear()
    specs.clear()
    origin["step"] = 2
    ticket["w"].fill_(True)
    assert ticket["w"].flatten().tolist() == [True, False]
    assert ticket.origin == {"step": 1}
    with pytest.raises(AttributeError):
        ticket.masks = {}
    with pytest.raises(AttributeError):
        ticket.specs["w"].shape = (1,)
    for mapping in (ticket, ticket.specs, ticket.origin):
        with pytest.raises(TypeError):
            mapping["w"] = mask
    with pytest.raises(TypeError):
        hash(ticket)


def test_a_ticket_is_a_mapping():
    ticket = ticket_of()
    assert list(ticket) == list(SPECS)
    assert len(ticket) == 2
    assert "fc.weight" in ticket
    assert "fc.bias" not in ticket
    with pytest.raises(KeyError):
        ticket["fc.bias"]


def test_equality_goes_by_masks_and_cuts_not_by_origin():
    ticket = ticket_of(step=1)
    assert ticket == ticket_of(step=2)
    assert ticket != ticket_of(seed=1)
    assert ticket != {"w": 1}
    a, b = (
        Ticket({"w": torch.ones(1, 1, dtype=torch.bool)}, {"w": TensorSpec((2, 2), block)})
        for block in ((None, None), (2, None))
    )
    assert a != b
    assert a != Ticket({}, {})


@pytest.mark.parametrize(
    "copier", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_a_copy_is_equal_and_keeps_its_origin(copier):
    ticket = ticket_of(step=3)
    twin = copier(ticket)
    assert twin == ticket
    assert twin.origin == ticket.origin


def test_repr_says_density_origin_and_every_tensor():
    masks = {"w": torch.tensor([[True], [False]]), "long.name": torch.tensor(True)}
    specs = {"w": TensorSpec((2, 3), (1, None)), "long.name": TensorSpec((), ())}
    assert repr(Ticket(masks, specs, {"step": 7, "kind": "support"})) == (
        "Ticket(density=0.5714, kept 4 of 7 elements, step 7)\n"
        "  w          1 of 2 blocks  (1, None)\n"
        "  long.name  1 of 1 blocks  ()"
    )
    assert "density=0, kept 0 of 0" in repr(Ticket({}, {}))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(2, 1),
            r"mask of w is torch\.float32 of shape \(2, 1\): it must be torch\.bool",
        ),
        (torch.ones(2, 3, dtype=torch.bool), r"shape \(2, 3\): .* \(2, 1\), one entry per block"),
        (torch.ones(2, dtype=torch.bool), r"torch\.bool of shape \(2,\)"),
    ],
)
def test_a_mask_that_does_not_fit_its_grid_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        Ticket({"w": mask}, {"w": TensorSpec((2, 3), (1, None))})


def test_masks_and_specs_must_name_the_same_tensors():
    with pytest.raises(ValueError, match="different tensors: a, b"):
        Ticket({"a": torch.tensor(True)}, {"b": TensorSpec((), ())})


def test_a_block_that_does_not_divide_its_tensor_is_refused():
    with pytest.raises(ValueError, match="does not divide"):
        TensorSpec((3, 2), (2, None))


@pytest.mark.parametrize("verb", ["apply_", "enforce", "density_of_model"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Linear(6, 4),
            r"needs conv\.weight with shape \(6, 2, 3, 3\) but the model has no para",
        ),
        (
            nn.ModuleDict({"conv": nn.Conv2d(2, 5, 3)}),
            r"the model has it with shape \(5, 2, 3, 3\)",
        ),
    ],
)
def test_the_ticket_of_another_model_is_refused_before_anything_changes(verb, model, message):
    ticket, before = ticket_of(), copy.deepcopy(model.state_dict())
    arguments = [torch.optim.SGD(model.parameters())] if verb == "enforce" else []
    with pytest.raises(ValueError, match=f"this ticket is for another model.*{message}"):
        getattr(ticket, verb)(model, *arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_parameter_without_dimensions_is_reported_with_its_shape():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    ticket = Ticket({"scale": torch.tensor([True])}, {"scale": TensorSpec((1,), (1,))})
    with pytest.raises(ValueError, match=r"has it with shape \(\)"):
        ticket.apply_(model)


@given(cut_shapes(), st.integers(0, 2**31))
def test_packing_bits_loses_nothing(cut, seed):
    grid = grid_shape(cut[1], cut[0])
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.nbytes == (prod(grid) + 7) // 8
    assert torch.equal(unpack_bits(packed, grid), mask)


def test_unpacking_refuses_another_number_of_bytes():
    with pytest.raises(ValueError, match="a mask of 1 bytes cannot hold 9 blocks"):
        unpack_bits(pack_bits(torch.ones(8, dtype=torch.bool)), (9,))


def test_a_ticket_does_not_guess_which_of_two_parts_it_is_of():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4)))
            self.fc = nn.Linear(4, 4)

    model = Net()
    listed = [(n, p) for n, p in model.named_parameters() if n.startswith("module.")][:1]
    ticket = DessiLBI(listed, structure="filter").support()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"has fc\.weight and module\.fc\.weight, and this ticket"):
        ticket.apply_(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_ticket_of_both_parts_tells_them_apart():
    model = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "fc": nn.Linear(4, 4)})
    listed = [(n, p) for n, p in model.named_parameters() if n.endswith("weight")]
    ticket = DessiLBI(listed, structure="filter").support()
    ticket.apply_(model)
    assert set(ticket) == {"module.fc.weight", "fc.weight"}
    assert not model["fc"].weight.any()
    assert not model["module"]["fc"].weight.any()
