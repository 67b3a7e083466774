# SPDX-License-Identifier: Apache-2.0
"""Layers pruned by first entry, by magnitude and at random."""

import itertools
import json

import pytest
import torch
from commands import assert_failed, call
from tiny import own_copy, shared_run

from dessilbi import Path
from dessilbi.training.curve import BY, SHARES, _best_first, _pruned, curve_of, names_of
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.finetune import load_trained


@pytest.fixture(scope="module")
def path():
    return Path.load(shared_run().folder)


def test_blocks_are_kept_in_the_order_of_their_entry_ties_by_norm(path):
    entries = path.entry()["fc1.weight"].reshape(-1)
    norms = path.scores()["weight"]["fc1.weight"].reshape(-1)
    kept = torch.from_numpy(_best_first(path, "fc1.weight", "entry", 0))
    steps = entries[kept].where(entries[kept] >= 0, 10**9)
    assert len(steps.unique()) > 2
    assert (steps.diff() >= 0).all()
    for step in steps.unique():
        assert (norms[kept[steps == step]].diff() <= 0).all()


def test_magnitude_and_chance_are_orders_of_their_own(path):
    norms = path.scores()["weight"]["conv3.weight"].reshape(-1)
    order = torch.from_numpy(_best_first(path, "conv3.weight", "magnitude", 0))
    assert (norms[order].diff() <= 0).all()
    drawn = [_best_first(path, "conv3.weight", "random", seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == list(range(120))


def test_only_the_named_layers_are_pruned_and_tickets_are_nested(path):
    best = {"conv3.weight": _best_first(path, "conv3.weight", "entry", 0)}
    tickets = [_pruned(path, best, share) for share in SHARES]
    for ticket, share in zip(tickets, SHARES, strict=True):
        assert int((~ticket["conv3.weight"]).sum()) == round(share * 120)
        assert all(ticket[n].all() for n in ticket if n != "conv3.weight")
    for larger, smaller in itertools.pairwise(tickets):
        assert not (smaller["conv3.weight"] & ~larger["conv3.weight"]).any()


def test_a_layer_always_keeps_a_block(path):
    best = {"conv1.weight": _best_first(path, "conv1.weight", "entry", 0)}
    assert int(_pruned(path, best, 1.0)["conv1.weight"].sum()) == 1


def test_a_curve_has_every_share_in_every_order_before_and_after_fine_tuning(path):
    trained = load_trained(shared_run())
    points = curve_of(
        trained, path, ["conv3.weight"], finetune=trained.recipe.finetune, shares=(0.3, 0.9)
    )
    torch.set_flush_denormal(False)
    assert [(p.order, p.pruned) for p in points] == [(by, s) for by in BY for s in (0.3, 0.9)]
    assert all(p.fine_tuned is not None for p in points)
    from dessilbi import close

    best = {"conv3.weight": _best_first(path, "conv3.weight", "entry", 0)}
    example = trained.data.train.examples(1)[0]
    ticket = close(_pruned(path, best, 0.3), trained.model, example_inputs=example)
    net = masked(trained.model, ticket, trained.data.train)
    assert points[0].at_once == accuracy(net, trained.data.test)
    assert points[0].density == ticket.density


def test_names_of_layers_may_be_short(path):
    assert names_of(path, ["conv3", " fc1.weight", "conv3"]) == ["conv3.weight", "fc1.weight"]
    with pytest.raises(ValueError, match=r"'convv3' is no structured layer .* mean conv3\?"):
        names_of(path, ["convv3"])


@pytest.mark.usefixtures("command_line")
def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch):
    run = own_copy(tmp_path)
    monkeypatch.setitem(curve_of.__kwdefaults__, "shares", (0.2, 0.8))
    result = call("prune-curve", run.folder, "--layers", "conv3,fc1", "--no-finetune")
    assert result.exit_code == 0, result.output
    assert "magnitude" in result.stdout
    told = json.loads((run.curves / "conv3+fc1.json").read_text())
    assert len(told["points"]) == 6
    assert "saved as" in result.stdout
    assert told["layers"] == ["conv3.weight", "fc1.weight"]
    bad = call("prune-curve", run.folder, "--layers", "x")
    assert_failed(bad, 1, "error: 'x' is no structured layer")
