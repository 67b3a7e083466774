# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning tickets of a finished run."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import denormals_kept, own_copy, shared_run
from torch import nn

from dessilbi import Path
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.training import loop
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.finetune import finetune, judge_ticket, judge_tickets, load_trained
from dessilbi.training.recipes import FinetuneRecipe
from dessilbi.training.retraining import Wish, retraining


@pytest.fixture(autouse=True)
def _denormals():
    with denormals_kept():
        yield


@pytest.fixture(scope="module")
def trained():
    return load_trained(shared_run())


@pytest.fixture(scope="module")
def path():
    return Path.load(shared_run().folder)


def test_a_finished_run_is_loaded_with_its_weights_and_their_accuracy(trained):
    told = shared_run().read_status()
    assert trained.accuracy == told["accuracy"]
    assert trained.recipe.name == "tiny"


def test_dead_blocks_stay_exactly_zero_and_living_ones_move(trained, path):
    ticket = path.ticket(density=0.3)
    tuned = finetune(trained, ticket, FinetuneRecipe(epochs=1, weight_decay=0.01))
    before = dict(trained.model.named_parameters())
    for name, param in tuned.named_parameters():
        if name in ticket:
            mask = ticket.mask_of(name)
            assert 0 < mask.sum() < mask.numel()
            assert not param[~mask].any()
            assert not torch.equal(param[mask], before[name][mask])
        else:
            assert not torch.equal(param, before[name])


def test_fine_tuning_leaves_the_trained_model_untouched(trained, path):
    before = {name: p.clone() for name, p in trained.model.state_dict().items()}
    finetune(trained, path.ticket(density=0.2), FinetuneRecipe(epochs=1))
    assert all(torch.equal(p, before[n]) for n, p in trained.model.state_dict().items())


def test_fine_tuning_is_the_same_every_time(trained, path):
    ticket = path.ticket(density=0.2)
    one, two = (finetune(trained, ticket, FinetuneRecipe(epochs=1)) for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def test_it_ends_where_the_loop_of_retraining_ends(trained, path, tmp_path):
    ticket = path.ticket(
        density=0.3, model=trained.model, example_inputs=trained.data.train.examples(1)[0]
    )
    recipe, start = retraining(shared_run(), trained, ticket, Wish(mode="finetune"), trained.data)
    run = loop.train(recipe, tmp_path / "run", start=start, device="cpu")
    tuned = finetune(trained, ticket, trained.recipe.finetune).state_dict()
    for name, value in load_file(run.model).items():
        torch.testing.assert_close(value, tuned[name])
        assert not torch.allclose(value, ticket.apply_(deepcopy(trained.model)).state_dict()[name])


def test_no_epochs_give_the_masked_model(trained, path):
    ticket = path.ticket(density=0.2)
    tuned = finetune(trained, ticket, FinetuneRecipe(epochs=0))
    expected = masked(trained.model, ticket, trained.data.train)
    assert all(map(torch.equal, tuned.state_dict().values(), expected.state_dict().values()))


def test_no_epochs_give_statistics_that_fit_the_masked_model(trained, path):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(784)
    model = nn.Sequential(nn.Flatten(), norm, nn.Linear(784, 10)).eval()
    ticket = Ticket(
        {"2.weight": torch.tensor([[True]])}, {"2.weight": TensorSpec((10, 784), (None, None))}
    )
    own = replace(trained, model=model)
    tuned = finetune(own, ticket, FinetuneRecipe(epochs=0))
    assert not norm.running_mean.any()
    assert tuned[1].running_mean.any()


def test_a_ticket_is_judged_before_and_after(trained, path):
    ticket = path.ticket(density=0.2)
    outcome = judge_ticket(trained, ticket)
    before = accuracy(masked(trained.model, ticket, trained.data.train), trained.data.test)
    tuned = finetune(trained, ticket, trained.recipe.finetune)
    assert (outcome.before, outcome.after) == (before, accuracy(tuned, trained.data.test))
    assert outcome.density == ticket.density
    assert outcome.density_of_model == ticket.density_of_model(trained.model)


def test_tickets_are_judged_in_the_order_asked_for(trained, path, monkeypatch):
    monkeypatch.setattr("dessilbi.training.finetune.judge_ticket", lambda _, ticket: ticket)
    found = judge_tickets(trained, path, [0.5, 0.2], order="weight")
    assert found == [path.ticket(density=d, order="weight") for d in (0.5, 0.2)]


def test_an_unfinished_run_says_so(tmp_path):
    run = own_copy(tmp_path)
    run.model.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no model\.safetensors: the run did not finish; t"
    ):
        load_trained(run)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other"])
def test_weights_that_do_not_fit_are_refused_in_one_sentence(tmp_path, damage):
    run = own_copy(tmp_path)
    content = run.model.read_bytes()
    other = run.scores.read_bytes()
    run.model.write_bytes({"truncated": content[:-9], "foreign": b"x" * 99, "other": other}[damage])
    said = "does not hold this recipe's" if damage == "other" else "cannot be read as safetensors"
    with pytest.raises(ValueError, match=f"{run.model} {said}") as caught:
        load_trained(run)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    from dessilbi.files.runs import Run

    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        load_trained(Run(tmp_path))
