# SPDX-License-Identifier: Apache-2.0
"""Retraining a ticket: from which weights, masked or compacted, on which data."""

import signal
import warnings

import pytest
import safetensors.torch
import tiny
import torch
from tiny import QUICK, Recorder, denormals_kept, own_copy, shared_run, train_tiny
from torch.nn.functional import cross_entropy

from dessilbi import Path, Ticket, close
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.files.runs import Run
from dessilbi.files.storage import read_json
from dessilbi.training import loop
from dessilbi.training.data import DATA_SETS, DataSet
from dessilbi.training.data.generated import synthetic
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.finetune import load_trained
from dessilbi.training.ingredients import groups_of, model_of
from dessilbi.training.recipes import RecipeError
from dessilbi.training.retraining import (
    MODES,
    Wish,
    data_for,
    head_of,
    modes_of,
    recipe_of,
    retraining,
)
from dessilbi.training.schedules import optimizer_of
from dessilbi.training.setting import build_optimizer
from dessilbi.training.starting import load_start

pytestmark = pytest.mark.filterwarnings("ignore:layers that keep less")


def other(num_classes=10, in_channels=1):
    """Another set of a few images."""

    def read(root, download):
        (images, labels), (test, answers) = synthetic(num_train=1000, num_test=50)
        repeat = (1, in_channels, 1, 1)
        parts = ((images.flip(-1), labels), (test.flip(-1), answers))
        return tuple((x.repeat(repeat), y % num_classes) for x, y in parts)

    shape = {"num_classes": num_classes, "in_channels": in_channels}
    return DataSet(read, mean=0.1, std=0.15, **shape)


@pytest.fixture(autouse=True, scope="module")
def _sets():
    sets = {
        "few": tiny.FEW,
        "other": other(),
        "seven": other(num_classes=7),
        "colour": other(in_channels=3),
    }
    with pytest.MonkeyPatch.context() as patch, denormals_kept():
        for name, made in sets.items():
            patch.setitem(DATA_SETS, name, made)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of LeNet and one of a residual net with batch norm, with their models and tickets."""
    folder = tmp_path_factory.mktemp("resnet") / "run"
    resnet = train_tiny(folder, "model=resnet8-small", *QUICK, "epochs=4")
    found = {}
    for name, run in (("lenet", shared_run()), ("resnet", resnet)):
        trained = load_trained(run)
        example = trained.data.train.examples(1)[0]
        ticket = Path.load(run.folder).ticket(
            density=0.4, model=trained.model, example_inputs=example
        )
        found[name] = run, trained, ticket
    return found


def begin(found, mode="rewind", **wanted):
    run, trained, ticket = found
    wish = Wish(mode=mode, **wanted)
    return retraining(run, trained, ticket, wish, data_for(trained, wish, root=None))


def weights(file):
    return safetensors.torch.load_file(file)


def same(left, right, names):
    return all(torch.equal(left[name], right[name]) for name in names)


# what it begins with


@pytest.mark.parametrize(
    ("mode", "file"), [("finetune", "model"), ("rewind", "init"), ("early-rewind", "early")]
)
def test_a_mode_begins_with_the_weights_of_its_name(runs, mode, file):
    run, _, ticket = runs["lenet"]
    _, start = begin(runs["lenet"], mode)
    saved = weights(getattr(run, file))
    assert start.ticket == ticket
    assert same(start.weights, saved, saved)
    assert start.trained == (mode == "finetune")


def test_the_early_weights_are_those_after_the_first_epoch(tmp_path):
    run = train_tiny(tmp_path / "run", *QUICK, "rewind_at=1.0", "keep_checkpoints=9")
    saved = weights(run.checkpoints / "step-0000000002" / "state.safetensors")
    early = weights(run.early)
    assert all(torch.equal(early[name], saved[f"model/{name}"]) for name in early)
    assert not same(early, weights(run.init), ["fc1.weight"])


def test_a_reinit_has_the_ticket_and_other_weights_each_time(runs):
    run, _, ticket = runs["lenet"]
    first, again, second = (begin(runs["lenet"], "reinit", number=n)[1] for n in (0, 0, 1))
    names = ["conv1.weight", "fc2.weight"]
    assert first.ticket == second.ticket == ticket
    assert same(first.weights, again.weights, names)
    for one, two in ((first.weights, second.weights), (first.weights, weights(run.init))):
        assert not any(torch.equal(one[name], two[name]) for name in names)


def test_a_random_ticket_keeps_as_much_of_every_layer_and_begins_as_the_run_did(runs):
    run, trained, ticket = runs["resnet"]
    starts = [begin(runs["resnet"], "random", number=n)[1] for n in (0, 1)]
    specs = Path.load(run.folder).specs
    for start in starts:
        assert same(start.weights, weights(run.init), ["conv1.weight"])
        assert start.ticket != ticket
        assert start.ticket == close(
            start.ticket, trained.model, example_inputs=trained.data.train.examples(1)[0]
        )
        for name in specs:  # filters: those with anything alive
            counts = [t.mask_of(name).flatten(1).any(1).sum() for t in (ticket, start.ticket)]
            assert 0 < counts[1] <= counts[0], name  # closing takes what nobody reads
    assert starts[0].ticket != starts[1].ticket


def test_dense_has_no_ticket(runs):
    _, start = begin(runs["lenet"], "dense")
    assert start.ticket is None
    assert start.told["density"] == 1.0


def test_repetitions_see_another_order_and_the_same_validation_samples(runs):
    trained = runs["lenet"][1]
    recipes = [recipe_of(trained.recipe, Wish(mode="rewind", number=n)) for n in (0, 1)]
    assert [r.seed for r in recipes] == [trained.recipe.seed] * 2
    assert [r.seed_of_order for r in recipes] == [trained.recipe.seed, trained.recipe.seed + 1]


def test_settings_are_those_of_the_table_of_the_mode(runs):
    recipe = runs["lenet"][1].recipe
    told = recipe_of(recipe, Wish(mode="finetune"))
    assert (told.epochs, told.optimizer.lr) == (recipe.finetune.epochs, recipe.finetune.lr)
    assert told.schedule == recipe.finetune.schedule
    told = recipe_of(recipe, Wish(mode="rewind"))
    assert (told.epochs, told.schedule) == (recipe.epochs, recipe.schedule)
    for name in ("base", "lr", "kappa", "momentum", "weight_decay", "nesterov"):
        assert getattr(told.optimizer, name) == getattr(recipe.optimizer, name), name
    assert recipe_of(recipe, Wish(mode="rewind", epochs=7)).epochs == 7


def test_rescaled_weights_are_divided_by_the_root_of_what_a_living_row_keeps(runs):
    run, _, ticket = runs["lenet"]
    _, start = begin(runs["lenet"], "rewind", rescale=True)
    init = weights(run.init)
    mask = ticket.mask_of("fc1.weight")
    share = mask[mask.any(1)].double().mean()
    assert 0 < share < 1
    torch.testing.assert_close(
        start.weights["fc1.weight"], (init["fc1.weight"] / share.sqrt()).float()
    )
    assert same(start.weights, init, ["fc1.bias"])


def test_a_layer_that_keeps_almost_nothing_is_warned_about(runs):
    run, trained, _ = runs["lenet"]
    example = trained.data.train.examples(1)[0]
    thin = Path.load(run.folder).ticket(
        density=0.02, model=trained.model, example_inputs=example, order="weight"
    )
    with pytest.warns(UserWarning, match=r"less than 2 % of their weights .*fc1\.weight"):
        begin((run, trained, thin))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin((run, trained, runs["lenet"][2]))


# training


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_compacted_and_masked_training_are_the_same_step_for_step(runs, name):
    trained = runs[name][1]
    settings = "finetune" if name == "resnet" else "rewind"  # batch norms with a life behind them
    both = []
    for compact in (False, True):
        recipe, start = begin(runs[name], settings, compact=compact)
        model = start.build(recipe, trained.data).double().train()
        groups = groups_of(recipe, model, trained.data)
        options = optimizer_of(recipe, 10).model_copy(update={"weight_decay": 0.01, "lr": 0.05})
        optimizer = build_optimizer(groups, options)
        start.ticket.enforce(model, optimizer)
        both.append((model, optimizer))
    big, small = (sum(p.numel() for p in model.parameters()) for model, _ in both)
    assert small < 0.8 * big
    first = None
    for number, (inputs, targets) in enumerate(
        trained.data.train.batches(0, batch_size=10, seed=1)
    ):
        losses = []
        for model, optimizer in both:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs.double()), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        first = first or losses[0]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        if number == 7:
            break
    assert abs(losses[0] - first) > 1e-3  # it did move


def test_the_loop_keeps_dead_what_is_dead_and_tells_the_outcome(runs, tmp_path):
    recipe, start = begin(runs["lenet"], "finetune", epochs=1)
    run = loop.train(recipe, tmp_path / "run", start=start, device="cpu")
    trained = load_trained(run)
    for name in start.ticket:
        dead = ~start.ticket.mask_of(name)
        value = trained.model.state_dict()[name]
        assert not value[dead].any()
    assert not same(start.weights, trained.model.state_dict(), ["fc2.bias"])
    told = run.read_status()
    assert told["accuracy"] == trained.accuracy
    assert told["density"] == start.ticket.density
    assert told["before"]["accuracy"] == accuracy(
        masked(runs["lenet"][1].model, start.ticket, trained.data.train), trained.data.test
    )
    assert not run.path.exists()
    assert not run.early.exists()


def test_a_compacted_retraining_is_a_run_of_the_smaller_model(runs, tmp_path):
    recipe, start = begin(runs["resnet"], "finetune", epochs=1, compact=True)
    run = loop.train(recipe, tmp_path / "run", start=start, device="cpu")
    small, big = load_trained(run), runs["resnet"][1]
    count = [sum(p.numel() for p in t.model.parameters()) for t in (small, big)]
    assert start.told["params"] == count[0] < count[1]
    assert run.read_status()["accuracy"] == small.accuracy


class Cut(Recorder):
    def update(self, step, facts):
        super().update(step, facts)
        if step == 3:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("compact", [False, True])
def test_a_retraining_that_was_cut_ends_as_if_it_never_was(runs, tmp_path, compact):
    recipe, start = begin(runs["resnet"], "finetune", epochs=3, compact=compact)
    recipe = recipe.model_copy(update={"points": 100})
    whole = loop.train(recipe, tmp_path / "whole", start=start, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe, tmp_path / "cut", start=start, device="cpu", reporter=Cut())
    cut = Run(tmp_path / "cut")
    assert not cut.model.exists()
    loop.resume(cut.folder)
    for file in ("model", "init", "metrics", "ticket", "start"):
        assert getattr(cut, file).read_bytes() == getattr(whole, file).read_bytes(), file
    told = [run.read_status() for run in (cut, whole)]
    assert {**told[0], "seconds": 0} == {**told[1], "seconds": 0}
    assert "before" in told[0]


def test_statistics_are_estimated_again_before_judging_unless_told_not_to(runs, tmp_path):
    told = {}
    for again in (True, False):
        recipe, start = begin(runs["resnet"], "finetune", epochs=1, recalibrate=again)
        run = loop.train(recipe, tmp_path / str(again), start=start, device="cpu")
        told[again] = weights(run.model)
    assert torch.equal(told[True]["conv1.weight"], told[False]["conv1.weight"])
    assert not torch.equal(told[True]["norm1.running_mean"], told[False]["norm1.running_mean"])


def test_a_damaged_start_is_one_sentence(runs, tmp_path):
    recipe, start = begin(runs["lenet"], "finetune", epochs=1)
    run = loop.train(recipe, tmp_path / "run", start=start, device="cpu")
    assert load_start(run).ticket == start.ticket
    run.ticket.write_bytes(run.ticket.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"start\.json cannot be used .*restore the run folder"):
        load_trained(run)


# transfer


@pytest.mark.parametrize(("data", "classes"), [("other", 10), ("seven", 7)])
def test_on_other_data_only_the_head_begins_afresh_and_whole(runs, data, classes):
    run, trained, ticket = runs["lenet"]
    recipe, start = begin(runs["lenet"], "finetune", data=data)
    assert head_of(trained.recipe, trained.data) == {"fc2.weight", "fc2.bias"}
    saved = weights(run.model)
    body = [name for name in saved if not name.startswith("fc2")]
    assert same(start.weights, saved, body)
    assert start.weights["fc2.weight"].shape == (classes, 84)
    fresh = model_of(recipe, data_for(trained, Wish(data=data), root=None)).state_dict()
    assert torch.equal(start.weights["fc2.weight"], fresh["fc2.weight"])
    assert start.ticket.mask_of("fc1.weight").equal(ticket.mask_of("fc1.weight"))
    alive = ticket.mask_of("fc1.weight").any(1)
    assert "fc1.bias" not in ticket or ticket.mask_of("fc1.bias").equal(alive)
    if alive.all():
        assert "fc2.weight" not in start.ticket
    else:
        assert torch.equal(start.ticket.mask_of("fc2.weight").all(0), alive)
    assert not start.trained


def test_a_transfer_trains_on_the_other_data(runs, tmp_path):
    recipe, start = begin(runs["lenet"], "rewind", data="seven", epochs=1)
    run = loop.train(recipe, tmp_path / "run", start=start, device="cpu")
    assert load_trained(run).data.name == "seven"
    assert read_json(run.start)["told"]["found_on"] == runs["lenet"][1].data.name


# what cannot be


def test_data_with_other_channels_is_refused(runs):
    with pytest.raises(RecipeError, match="reads 28x28 images of 1 channel, not of 3"):
        begin(runs["lenet"], "rewind", data="colour")
    with pytest.raises(ValueError, match=r"this ticket is for another model: it needs conv1\.weig"):
        begin(runs["resnet"], "rewind", data="colour")


def test_a_ticket_of_another_architecture_is_refused(runs):
    run, trained, _ = runs["lenet"]
    with pytest.raises(ValueError, match="this ticket is for another model: it needs"):
        begin((run, trained, runs["resnet"][2]))
    spec = TensorSpec((3, 3), (1, None))
    foreign = Ticket({"w": torch.ones(3, 1, dtype=torch.bool)}, {"w": spec})
    with pytest.raises(ValueError, match="needs w with shape"):
        begin((run, trained, foreign))


@pytest.mark.parametrize(("mode", "file"), [("rewind", "init"), ("early-rewind", "early")])
def test_a_run_without_the_weights_to_rewind_to_is_refused(runs, tmp_path, mode, file):
    run = own_copy(tmp_path)
    getattr(run, file).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file}.safetensors, so nothing can be re"):
        begin((run, *runs["lenet"][1:]), mode)
    assert set(MODES) - set(modes_of(run)) == ({mode} if file == "early" else set())


def test_an_unknown_mode_is_refused(runs):
    with pytest.raises(ValueError, match="mode='fly' is not known: use one of finetune, rewind"):
        begin(runs["lenet"], "fly")
