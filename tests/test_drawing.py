# SPDX-License-Identifier: Apache-2.0
"""Tickets of a run by what one cares about."""

import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import QUICK, denormals_kept, own_copy, shared_run, train_tiny

from dessilbi import Path, compact
from dessilbi.outcomes.tickets import Drawer, Wish
from dessilbi.path.scores import load_scores
from dessilbi.path.settling import settled
from dessilbi.training.data import DATA_SETS
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.finetune import load_trained

pytestmark = pytest.mark.filterwarnings("ignore:nothing is left of")


@pytest.fixture(autouse=True, scope="module")
def _sets():
    with pytest.MonkeyPatch.context() as patch, denormals_kept():
        patch.setitem(DATA_SETS, "few", tiny.FEW)
        yield


@pytest.fixture(scope="module")
def drawer():
    return Drawer(shared_run())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with all its checkpoints, single weights, and all points judged."""
    more = ("structure={'*.weight' = 'element'}", "keep_checkpoints=99", "checkpoint_every=0.5")
    folder = tmp_path_factory.mktemp("kept") / "run"
    quick = (*QUICK, "batch_size=25", "points=8", "optimizer.lam=0.01")
    return train_tiny(folder, *quick, *more)  # 2 epochs of 4 steps


@pytest.mark.parametrize(
    "wish",
    [
        Wish(density=0.3),
        Wish(params=0.4),
        Wish(macs=200_000),
        Wish(bytes=0.5),
        Wish(latency_ms=1000.0),
        Wish(max_drop=5.0),
    ],
    ids=lambda w: w.name,
)
def test_every_ticket_is_closed_costs_what_it_says_and_tells_why(drawer, wish):
    drawn = drawer.draw(wish)
    assert drawn.ticket.origin["closed"] is True
    small = compact(load_trained(shared_run()).model, drawn.ticket, example_inputs=drawer.example)
    assert small.proof.params_after == drawn.cost.params
    assert small.proof.macs_after == drawn.cost.macs
    assert "\n" not in drawn.reason
    assert drawn.reason
    assert drawn.to_json()["density"] == drawn.ticket.density


def test_accuracy_is_that_of_w_on_the_ticket_on_the_validation_split(drawer):
    drawn, trained = drawer.draw(Wish(density=0.5)), load_trained(shared_run())
    net = masked(trained.model, drawn.ticket, trained.data.train)
    assert drawn.accuracy == accuracy(net, trained.data.validation)


def test_a_drop_is_held_on_the_validation_split(drawer):
    dense = accuracy(drawer.model, drawer.data.validation)
    drawn = drawer.draw(Wish(max_drop=5.0))
    assert drawn.ticket.density < 1
    assert drawn.accuracy >= dense - 0.05


def test_the_order_by_default_compares_only_what_can_be_compared(drawer, kept):
    assert drawer.order == "dual"  # filters beside single weights
    assert Drawer(kept).order == "weight"
    assert Drawer(kept).draw(Wish(density=0.3)).ticket.origin["order"] == "weight"
    assert Drawer(kept).draw(Wish(density=0.3, order="dual")).ticket.origin["order"] == "dual"


def test_an_epoch_is_the_step_at_which_it_was_over(kept):
    drawer = Drawer(kept)
    assert drawer.draw(Wish(epoch=1)).ticket == drawer.draw(Wish(step=4)).ticket
    with pytest.raises(ValueError, match="epoch=3 is not on this path, which ends at epoch 2"):
        drawer.draw(Wish(epoch=3))


def test_a_step_behind_the_end_is_refused(kept):
    with pytest.raises(ValueError, match="step=9 is not on this path, which ends at step 8"):
        Drawer(kept).draw(Wish(step=9))


def test_a_budget_at_a_moment_ranks_as_the_net_stood_then(kept):
    drawer = Drawer(kept)
    at_end = drawer.draw(Wish(density=0.3)).ticket
    early = drawer.draw(Wish(density=0.3, step=2))
    assert early.ticket != at_end
    assert early.ticket.origin["step"] == 2
    assert "ranked as at step 2" in early.reason
    last = Path.load(kept.folder).step
    assert drawer.draw(Wish(density=0.3, step=last)).ticket == at_end


def test_scores_of_the_last_checkpoint_are_those_of_the_end(kept):
    drawer, last = Drawer(kept), Path.load(kept.folder).step
    found = drawer._scores_at(last)
    saved = load_scores(kept.scores, drawer.path.specs)
    for kind, named in saved.items():
        for name, values in named.items():
            torch.testing.assert_close(found[kind][name], values)


def test_entry_at_a_moment_takes_first_what_had_entered(kept):
    drawer = Drawer(kept)
    steps = [p.step for p in drawer.path.points if 0 < p.density < 0.5]
    assert steps
    entered = drawer.path.ticket(step=steps[0])
    family = drawer.family("entry", step=steps[0])
    for density in (0.3 * entered.density, 0.8 * entered.density):
        member = family._ranking.ticket(density, {})
        floor = sum(int(m.sum()) for m in member.values()) * 0.05 + len(member)
        outside = sum(int((member[n] & ~entered[n]).sum()) for n in member)
        assert outside <= floor
        assert member.kept_elements > outside


def test_early_is_the_support_where_a_run_would_have_stopped(tmp_path):
    loose = "stop={window=2, tolerance=1.0, gain=1.0, gap=1.0}"
    more = (*QUICK, "epochs=4", "points=8", "optimizer.lam=1e-3", loose)
    run = train_tiny(tmp_path / "run", *more)
    drawer = Drawer(run)
    found = settled(drawer.path, window=2, tolerance=1.0, gain=1.0, gap=1.0)
    drawn = drawer.draw(Wish(early=True))
    assert drawn.ticket.origin["step"] == found.step
    support = drawer.path.support(step=found.step)
    alive = {n: drawn.ticket.mask_of(n) & ~support.mask_of(n) for n in support}
    assert not any(mask.any() for mask in alive.values())
    assert "the first point at which the path had settled" in drawn.reason


def test_a_path_that_never_settled_says_how_far_it_was(drawer):
    with pytest.raises(ValueError, match=r"this path never settled \(it has no two judged points"):
        drawer.draw(Wish(early=True))


def test_members_of_the_family_are_listed_from_large_to_small(drawer):
    members = drawer.members()
    densities = [member.ticket.density for member in members]
    assert densities == sorted(densities, reverse=True)
    assert len(members) > 5
    assert densities[0] == 1.0
    assert all(member.accuracy is not None for member in members)


def test_a_checkpoint_that_was_not_kept_is_one_sentence(drawer):
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint of step 4 \(kept are those of"):
        drawer.draw(Wish(density=0.3, step=4))


def test_a_run_without_any_checkpoint_says_so(tmp_path):
    run = own_copy(tmp_path)
    for folder in run.checkpoints.iterdir():
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint of step 4 \(none is kept\)"):
        Drawer(run).draw(Wish(density=0.3, step=4))


def test_without_its_data_a_run_still_gives_tickets(tmp_path, monkeypatch):
    with_data = Drawer(shared_run()).draw(Wish(density=0.3))

    def gone(root, download):
        raise FileNotFoundError("the files are gone")

    run = own_copy(tmp_path)
    name = Drawer(run).recipe.data
    made = DATA_SETS[name]
    monkeypatch.setitem(DATA_SETS, name, replace(made, read=gone))
    drawer = Drawer(run)
    drawn = drawer.draw(Wish(density=0.3))
    assert drawn.accuracy is None
    assert "not judged" in str(drawn)
    assert drawn.ticket == with_data.ticket
    with pytest.raises(FileNotFoundError, match="the files are gone"):
        drawer.draw(Wish(max_drop=1.0))


def test_an_unfinished_run_gives_tickets_of_a_moment(tmp_path):
    run = own_copy(tmp_path)
    run.model.unlink()
    run.scores.unlink()
    drawn = Drawer(run).draw(Wish(step=12))
    assert drawn.accuracy is None
    assert drawn.ticket.kept_elements
    with pytest.raises(ValueError, match="left no final scores"):
        Drawer(run).draw(Wish(density=0.3))


def test_a_moment_before_anything_entered_is_refused(drawer):
    with pytest.raises(ValueError, match="nothing had entered the support by step 3"):
        drawer.draw(Wish(step=3))


def test_a_moment_that_leaves_a_layer_empty_warns(drawer):
    with pytest.warns(UserWarning, match="nothing is left of conv1.weight"):
        drawer.draw(Wish(step=9))


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({}, "give a budget or a moment"),
        ({"density": 0.1, "macs": 0.5}, "give exactly one of --density and --macs"),
        ({"step": 3, "early": True}, "give exactly one of --step and --early"),
        ({"density": 0.1, "order": "size"}, "order='size' is not known"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(wish, says):
    with pytest.raises(ValueError, match=says):
        Wish(**wish)
