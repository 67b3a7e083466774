# SPDX-License-Identifier: Apache-2.0
"""Rounds: a ticket seeds the next search on a smaller model, which is compacted again."""

import pytest
import tiny
import torch
from tiny import QUICK, denormals_kept, shared_run, train_tiny

from dessilbi import Path, load_compact
from dessilbi.files.runs import Run
from dessilbi.files.storage import read_json
from dessilbi.outcomes.compacting import save_shrunk, shrink
from dessilbi.training import loop
from dessilbi.training.data import DATA_SETS
from dessilbi.training.evaluation import accuracy
from dessilbi.training.finetune import load_trained
from dessilbi.training.iterating import next_round
from dessilbi.training.recipes import RecipeError
from dessilbi.training.retraining import Wish, retraining


@pytest.fixture(autouse=True, scope="module")
def _sets():
    with pytest.MonkeyPatch.context() as patch, denormals_kept():
        patch.setitem(DATA_SETS, "few", tiny.FEW)
        yield


def ticket_of(run, density):
    trained = load_trained(run)
    example = trained.data.train.examples(1)[0]
    path = Path.load(run.folder)
    return trained, path.ticket(density=density, model=trained.model, example_inputs=example)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """A run of a residual net, and the next two rounds from a ticket of the one before."""
    folder = tmp_path_factory.mktemp("rounds")
    found = [train_tiny(folder / "1", "model=resnet8-small", *QUICK)]
    for number in (2, 3):
        trained, ticket = ticket_of(found[-1], 0.5)
        ticket.save(folder / "ticket")
        recipe, start = next_round(found[-1].folder, folder / "ticket", trained.recipe)
        found.append(loop.train(recipe, folder / str(number), start=start, device="cpu"))
        (folder / "ticket").unlink()
    return found


def params(run):
    return sum(p.numel() for p in load_trained(run).model.parameters())


def test_every_round_is_smaller_names_its_parent_and_has_a_path(rounds):
    counts = [params(run) for run in rounds]
    assert counts[2] < 0.8 * counts[1] < 0.64 * counts[0]
    for before, after, number in zip(rounds, rounds[1:], (2, 3), strict=False):
        told = read_json(after.start)["told"]
        assert (told["parent"], told["round"]) == (str(before.folder), number)
        assert Path.load(after.folder).points


def test_a_round_begins_where_the_masked_net_of_the_one_before_stood(rounds):
    trained, ticket = ticket_of(rounds[0], 0.5)
    from dessilbi.training.starting import load_start

    small = load_start(rounds[1]).build(trained.recipe, trained.data).eval()
    big = ticket.apply_(trained.model).eval()
    x, _ = trained.data.test.examples(20)
    with torch.no_grad():
        torch.testing.assert_close(small(x), big(x), rtol=1e-4, atol=1e-4)


def test_a_model_of_a_later_round_is_compacted_saved_and_loaded(rounds, tmp_path):
    trained, ticket = ticket_of(rounds[2], 0.5)
    shrunk = shrink(trained, ticket, latency_repeats=0)
    place = save_shrunk(shrunk, tmp_path / "small", rounds[2], trained)
    again = load_compact(None, place)  # from the model of the recipe, in one cut
    assert sum(p.numel() for p in again.parameters()) < params(rounds[2])
    assert accuracy(again, trained.data.test) == shrunk.accuracy_after


def test_a_ticket_of_a_later_round_is_retrained_on_its_smaller_model(rounds, tmp_path):
    trained, ticket = ticket_of(rounds[1], 0.5)
    wish = Wish(mode="rewind", epochs=1, compact=True)
    recipe, start = retraining(rounds[1], trained, ticket, wish, trained.data)
    run = loop.train(recipe, tmp_path / "run", start=start, device="cpu")
    assert params(run) < params(rounds[1])


def test_the_next_round_has_model_and_data_of_its_parent(tmp_path):
    run = shared_run()
    trained, ticket = ticket_of(run, 0.5)
    ticket.save(tmp_path / "t")
    other = trained.recipe.model_copy(update={"model": "resnet8"})
    with pytest.raises(RecipeError, match="model='resnet8' is not that of"):
        next_round(run.folder, tmp_path / "t", other)
    with pytest.raises(FileNotFoundError, match="there is no ticket file"):
        next_round(run.folder, tmp_path / "none", trained.recipe)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        next_round(Run(tmp_path).folder, tmp_path / "t", trained.recipe)
