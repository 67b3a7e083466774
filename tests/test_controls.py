# SPDX-License-Identifier: Apache-2.0
"""Random tickets as sparse as another, layer by layer."""

import pytest
import torch
from test_choosing import X, family, make, trained

from dessilbi.choosing.controls import random_like
from dessilbi.cuts.costs import CostModel
from dessilbi.graph import read_graph


def drawn(name, ticket, seed):
    model, path = trained(name)
    return random_like(ticket, path.specs, path.units, model=model, example_inputs=X, seed=seed)


def kept(ticket, specs):
    return {n: int(ticket.mask_of(n).flatten(1).any(1).sum()) for n in specs if n in ticket}


def test_every_layer_keeps_as_many_filters_and_what_goes_together_goes_together():
    _, path = trained("grouped")
    ticket = family("grouped").choose("params", 0.5).ticket
    found = [drawn("grouped", ticket, seed) for seed in range(4)]
    for one in found:
        assert kept(one, path.specs) == kept(ticket, path.specs)
        assert one.origin["closed"] is True
        rows = [one.mask_of(n).flatten(1).any(1) for n in ("stem.weight", "back.weight")]
        assert torch.equal(*rows)
        alive = one["grouped.weight"].reshape(4, -1, *one["grouped.weight"].shape[1:])
        assert len({int(group.flatten(1).any(1).sum()) for group in alive}) == 1
    assert any(one != found[0] for one in found[1:])


def test_a_seed_decides_and_no_random_state_is_moved():
    ticket = family("lenet").choose("density", 0.3).ticket
    before = torch.get_rng_state()
    one, again, other = (drawn("lenet", ticket, seed) for seed in (3, 3, 4))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert one.origin["like"] == ticket.digest()


def test_closing_takes_no_more_than_was_given():
    ticket = family("lenet").choose("density", 0.3).ticket
    model = make("lenet")
    costs = CostModel(read_graph(model, X), model)
    assert 0 < drawn("lenet", ticket, 0).density <= ticket.density + 1e-9
    assert costs.of(drawn("lenet", ticket, 0)).params < costs.dense.params


def test_a_tensor_the_ticket_does_not_name_is_whole():
    ticket = family("grouped").choose("params", 0.5).ticket
    from dessilbi.training.thinning import without

    one = drawn("grouped", without(ticket, ["inner.weight"]), 0)
    assert kept(one, ["inner.weight"]).get("inner.weight", 12) == 12


def test_specs_of_another_model_are_refused():
    _, path = trained("grouped")
    ticket = family("grouped").choose("params", 0.5).ticket
    with pytest.raises(ValueError, match="this ticket is for another model"):
        random_like(ticket, path.specs, path.units, model=make("lenet"), example_inputs=X, seed=0)
