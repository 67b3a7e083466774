# SPDX-License-Identifier: Apache-2.0
"""Runs whose network grows: the rule, the caps, the run folder, and going on to the bit."""

import itertools
import json
import math
import signal
from unittest.mock import patch

import pytest
import torch
from tiny import FEW, Recorder, denormals_kept

from dessilbi import Path, grow
from dessilbi.files.storage import read_lines
from dessilbi.graph import read_graph
from dessilbi.growth.widening import find_change, widths_of
from dessilbi.models import build_model
from dessilbi.outcomes.tickets import Drawer
from dessilbi.outcomes.tickets import Wish as DrawnBy
from dessilbi.training.data import DATA_SETS
from dessilbi.training.finetune import load_trained
from dessilbi.training.growth_table import GrowRecipe
from dessilbi.training.loop import resume, train
from dessilbi.training.recipes import RecipeError, load_recipe, validate_recipe
from dessilbi.training.retraining import Wish, retraining
from dessilbi.training.starting import Start
from dessilbi.training.widths import costs_after, start_of, wanted, within

# What a net of a few filters, trained for a few steps, is rightly warned about.
pytestmark = pytest.mark.filterwarnings("ignore:many units are dead", "ignore:no block can enter")

VALUES = {
    "name": "growing",
    "model": "lenet",
    "data": "few",
    "epochs": 1,
    "batch_size": 25,
    "validation": 100,
    "points": 4,
    "judged": 1,
    "optimizer": {"lr": 0.05, "nu": 5.0, "lam": 0.001},
    "structure": {"fc1.weight": "neuron", "fc2.weight": None},
}
GROW = {
    "start": {"conv1": 2, "*": 3},
    "every": 1,
    "step": {"conv3": 5, "*": 2},
    "max_rounds": 3,
    "max_width": {"conv1": 4},
}


def recipe_with(grow=None, **values):
    return validate_recipe({**VALUES, **values, "grow": {**GROW, **(grow or {})}}, origin="test")


def run_of(recipe, place, **options):
    with denormals_kept(), patch.dict(DATA_SETS, few=FEW):
        return train(recipe, place, **options)


def rounds_of(run):
    return list(read_lines(run.growth))


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    return run_of(recipe_with(), tmp_path_factory.mktemp("grown") / "run")


@pytest.fixture(scope="module")
def graph():
    model = build_model("lenet", num_classes=10, in_channels=1, seed=0)
    return model, read_graph(model, torch.zeros(2, 1, 28, 28))


def test_layers_in_the_support_widen_by_the_rule_until_the_rounds_are_over(grown):
    rounds = rounds_of(grown)
    assert [line["epoch"] for line in rounds] == [0, 1, 2, 3, 4]
    assert rounds[0]["sizes"] == {"conv1": 2, "conv2": 3, "conv3": 3, "fc1": 3}
    assert rounds[1]["sizes"] == {"conv1": 4, "conv2": 5, "conv3": 8, "fc1": 5}
    assert rounds[1]["shares"] == dict.fromkeys(rounds[0]["sizes"], 1.0)
    assert all(line["sizes"]["conv1"] <= 4 for line in rounds)
    assert [line["final"] for line in rounds] == [False, False, False, True, True]
    assert rounds[2]["params"] > rounds[1]["params"] > rounds[0]["params"]
    assert grown.read_status()["status"] == "finished"


def test_the_function_stays_at_every_growth(grown):
    gaps = [line["max_abs_diff"] for line in rounds_of(grown) if line.get("grown")]
    assert len(gaps) >= 2
    assert max(gaps) <= 1e-5


def test_the_cost_of_training_counts_every_size(grown):
    rounds = rounds_of(grown)
    samples, spent = 100, 0  # of an epoch: what validation leaves of 200 images
    for before, after in itertools.pairwise(rounds):
        spent += 3 * before["macs"] * samples * (after["epoch"] - before["epoch"])
        assert after["training_macs"] == spent
    assert grown.read_status()["training_macs"] == spent > 0


def test_path_ticket_and_weights_of_a_grown_run_have_its_final_sizes(grown):
    path = Path.load(grown.folder)
    last = rounds_of(grown)[-1]["sizes"]
    assert path.history.specs["conv3.weight"].shape[0] == last["conv3"] > 3
    births = path.history.births["conv3.weight"].flatten()
    assert births[:3].tolist() == [0, 0, 0]
    assert births.unique().tolist() == [0, 4, 8, 12]
    with denormals_kept(), patch.dict(DATA_SETS, few=FEW):
        trained = load_trained(grown)
    assert trained.model.conv3.out_channels == last["conv3"]
    ticket = path.ticket(density=0.5)
    assert ticket.specs["conv3.weight"].shape == tuple(trained.model.conv3.weight.shape)


def test_tickets_of_a_grown_run_are_drawn_at_its_final_sizes(grown):
    with denormals_kept(), patch.dict(DATA_SETS, few=FEW):
        drawer = Drawer(grown)
        drawn = drawer.draw(DrawnBy(density=0.5))
        with pytest.raises(ValueError, match="its checkpoints have other widths than its end"):
            drawer.draw(DrawnBy(density=0.5, step=rounds_of(grown)[1]["step"]))
    shape = tuple(drawer.model.fc1.weight.shape)
    assert drawn.ticket.specs["fc1.weight"].shape == shape
    assert shape[0] == rounds_of(grown)[-1]["sizes"]["fc1"] > 3


def test_the_outcome_of_a_run_that_grows_tells_what_its_training_took(grown):
    status = grown.read_status()
    assert status["status"] == "finished"
    assert status["training_macs"] == rounds_of(grown)[-1]["training_macs"] > 0
    assert status["steps"] == rounds_of(grown)[-1]["step"]
    assert status["accuracy"] == Path.load(grown.folder).points[-1].metrics["accuracy"]


def test_no_other_run_begins_with_the_weights_of_a_grown_one(grown):
    ticket = Path.load(grown.folder).ticket(density=0.5)
    with denormals_kept(), patch.dict(DATA_SETS, few=FEW):
        trained = load_trained(grown)
    with pytest.raises(RecipeError, match="grew while it was trained"):
        retraining(grown, trained, ticket, Wish(), trained.data)


def test_a_run_that_grows_begins_with_a_fresh_model(grown, tmp_path):
    with denormals_kept(), patch.dict(DATA_SETS, few=FEW):
        start = Start(dict(load_trained(grown).model.state_dict()))
    with pytest.raises(RecipeError, match="grows from a fresh narrow model"):
        run_of(recipe_with(), tmp_path / "run", start=start)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop": {}}, "it does not go with stop"),
        ({"structure": {"*": None}}, "give it a structure"),
    ],
)
def test_what_does_not_go_with_growing_is_refused(tmp_path, values, message):
    with pytest.raises(RecipeError, match=message):
        run_of(recipe_with(**values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Stopped(Recorder):
    """Interrupts a run at a step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def update(self, step, facts):
        super().update(step, facts)
        if step >= self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("at", [3, 7, 8])
def test_a_cut_run_goes_on_to_the_bit(grown, tmp_path, at):
    with pytest.raises(KeyboardInterrupt):
        run_of(recipe_with(), tmp_path / "run", reporter=Stopped(at))
    with denormals_kept(), patch.dict(DATA_SETS, few=FEW):
        run = resume(tmp_path / "run")
    assert run.read_status()["status"] == "finished"
    for file in ("model", "path", "scores", "metrics", "growth"):
        assert getattr(run, file).read_bytes() == getattr(grown, file).read_bytes(), file


def test_what_never_entered_goes_while_others_grow(tmp_path):
    rules = VALUES["structure"] | {"conv2.weight": {"structure": "filter", "lam": 1e3}}
    recipe = recipe_with({"prune_after": 1, "start": 4, "max_rounds": 2}, structure=rules)
    run = run_of(recipe, tmp_path / "run")
    rounds = rounds_of(run)
    assert [line["sizes"]["conv2"] for line in rounds] == [4, 2, 2, 2]
    assert rounds[1]["pruned"] == {"conv2": 2}
    assert rounds[1]["sizes"]["conv3"] > 4
    assert run.read_status()["status"] == "finished"
    assert Path.load(run.folder).history.specs["conv2.weight"].shape[0] == 2


def test_growing_ends_at_the_target_accuracy_or_where_no_layer_grows(tmp_path):
    run = run_of(recipe_with({"target_accuracy": 0.01}), tmp_path / "target")
    assert [line["epoch"] for line in rounds_of(run)] == [0, 1, 2]
    assert len({json.dumps(line["sizes"]) for line in rounds_of(run)}) == 1


def test_what_a_change_will_cost_is_known_before_it_is_made(graph):
    model, read = graph
    change = find_change(read, {"conv2": 20, "fc1": 90})
    grown = grow(model, {"conv2": 20, "fc1": 90}, example_inputs=torch.zeros(2, 1, 28, 28))
    proof = grown.proof
    assert costs_after(read, model, change) == (proof.params_after, proof.macs_after)
    assert costs_after(read, model, find_change(read, {})) == (
        proof.params_before,
        proof.macs_before,
    )


@pytest.mark.parametrize(("cap", "least"), [("max_params", 20_000), ("max_macs", 200_000)])
def test_a_cap_is_never_exceeded_and_halves_what_is_too_much(graph, cap, least):
    model, read = graph
    found = []
    cost = costs_after(read, model, find_change(read, {}))[cap == "max_macs"]
    for room in (0, least // 10, least, 10 * least):
        options = GrowRecipe(start=4, step=16, **{cap: cost + room})
        widths = wanted(read, options, dict.fromkeys(widths_of(read), 1.0))
        macs = costs_after(read, model, find_change(read, {}))[1]
        change = within(read, model, options, widths, macs=macs)
        after = (0, 0) if change is None else costs_after(read, model, change)
        assert after[cap == "max_macs"] <= cost + room
        found.append(after[0])
    assert found[0] == 0 < found[2] < found[3]


def test_the_rule_is_the_larger_of_a_step_and_a_tenth(graph):
    _, read = graph
    options = GrowRecipe(start=4, step={"conv1": 2, "*": 4}, share={"conv1": 0.5, "*": 0.8})
    shares = {"conv1.weight": 0.5, "conv2.weight": 0.79, "conv3.weight": 0.8, "fc1.weight": 1.0}
    assert wanted(read, options, shares) == {
        "conv1.weight": 6 + 2,
        "conv3.weight": math.floor(1.1 * 120),
        "fc1.weight": 84 + math.floor(0.1 * 84),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": {"conv9": 4}}, "names 'conv9', which matches no layer"),
        ({"start": 1}, "grow.start"),
        ({"start": 4, "max_width": 3}, "max_width=3 is below the start of conv1, 4"),
        ({"max_params": 10}, "max_params=10 is below the start"),
        ({"max_macs": 10}, "max_macs=10 is below the start"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(tmp_path, options, message):
    grow = {key: value for key, value in GROW.items() if key != "max_width"} | options
    with pytest.raises((RecipeError, ValueError), match=message) as caught:
        run_of(validate_recipe({**VALUES, "grow": grow}, origin="test"), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_layers_that_no_glob_names_stay_as_they_are(graph):
    _, read = graph
    options = GrowRecipe(start={"conv*": 4})
    widths = start_of(read, options)
    assert widths == {"conv1.weight": 4, "conv2.weight": 4, "conv3.weight": 4, "fc1.weight": 84}
    more = wanted(read, options, dict.fromkeys(widths, 1.0))
    assert more.keys() == widths.keys() - {"fc1.weight"}


@pytest.mark.parametrize("name", ["grow-digits", "grow-mnist-lenet"])
def test_shipped_recipes_start_narrow(name):
    recipe = load_recipe(name)
    assert recipe.grow is not None
    assert recipe.longest > recipe.epochs
