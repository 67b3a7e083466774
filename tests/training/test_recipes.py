# SPDX-License-Identifier: Apache-2.0
"""Recipes: those that are shipped, one's own, values set on top, and what is refused."""

import math
import tomllib

import pytest
import torch

from dessilbi.training.recipes import (
    OptimizerRecipe,
    Recipe,
    RecipeError,
    load_recipe,
    recipe_names,
)
from dessilbi.training.schedules import optimizer_of
from dessilbi.training.telling import to_toml

TOML = """
name = "mine"
model = "lenet"
data = "digits"
epochs = 3
batch_size = 16
validation = 100
[optimizer]
nu = 7
lam = inf
[structure]
"conv*.weight" = "filter"
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(TOML, encoding="utf-8")
    return file


def test_the_recipes_of_the_issue_are_shipped():
    assert {"digits-lenet", "mnist-lenet", "fashion-lenet"} <= set(recipe_names())


def test_a_recipe_of_ones_own_is_read_from_its_file(mine):
    recipe = load_recipe(str(mine))
    assert (recipe.name, recipe.epochs, recipe.optimizer.nu) == ("mine", 3, 7.0)
    assert recipe.optimizer.lam == math.inf
    assert recipe.structure == {"conv*.weight": "filter"}
    assert (recipe.points, recipe.seed, recipe.schedule.kind) == (100, 0, "constant")


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("optimizer.nu=50", lambda r: r.optimizer.nu, 50.0),
        (" optimizer.nu = 1e-3", lambda r: r.optimizer.nu, 0.001),
        ("optimizer.lam=inf", lambda r: r.optimizer.lam, math.inf),
        ('optimizer.lam="inf"', lambda r: r.optimizer.lam, math.inf),
        ("optimizer.nesterov=true", lambda r: r.optimizer.nesterov, True),
        ("optimizer.block_scale=sqrt", lambda r: r.optimizer.block_scale, "sqrt"),
        ("schedule.kind=cosine", lambda r: r.schedule.kind, "cosine"),
        ("schedule.milestones=[1, 2]", lambda r: r.schedule.milestones, (1, 2)),
        ("epochs=9", lambda r: r.epochs, 9),
        ("precision=bf16", lambda r: r.precision, "bf16"),
        ("accumulate=4", lambda r: r.accumulate, 4),
        ("clip_norm=1", lambda r: r.clip_norm, 1.0),
        ("compile=true", lambda r: r.compile, True),
        ("workers=0", lambda r: r.workers, 0),
        ("checkpoint_every=0.25", lambda r: r.checkpoint_every, 0.25),
        ("keep_checkpoints=1", lambda r: r.keep_checkpoints, 1),
        ("coupled=true", lambda r: r.coupled, True),
        ("augment=false", lambda r: r.augment, False),
        ("image_size=64", lambda r: r.image_size, 64),
        ("length=64", lambda r: r.length, 64),
        ("optimizer.R=3", lambda r: (r.optimizer.nu, r.optimizer.R), (None, 3.0)),
        ("finetune.schedule.kind=hold", lambda r: r.finetune.schedule.kind, "hold"),
        ("summary=two words = one text", lambda r: r.summary, "two words = one text"),
        (
            "structure.fc1.weight=channel",
            lambda r: r.structure,
            {"conv*.weight": "filter", "fc1.weight": "channel"},
        ),
        (
            'structure.conv*.weight={structure="kernel", lam=2}',
            lambda r: r.structure,
            {"conv*.weight": {"structure": "kernel", "lam": 2}},
        ),
    ],
)
def test_a_value_can_be_set_on_top(mine, assignment, read, value):
    assert read(load_recipe(str(mine), [assignment])) == value


def test_the_last_assignment_wins(mine):
    assert load_recipe(str(mine), ["epochs=1", "epochs=2"]).epochs == 2


def test_a_recipe_cannot_be_changed(mine):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(str(mine)).epochs = 5


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"no recipe 'lenett'; choose one of cifar10-.* or a"):
        load_recipe("lenett")


def test_a_recipe_file_that_is_not_there_is_refused_by_name(tmp_path):
    for place in (tmp_path / "no.toml", tmp_path):
        name = str(place) if place.suffix else str(place / ".toml")
        with pytest.raises(RecipeError, match=f"there is no recipe file {name}; name one that ex"):
            load_recipe(name)


@pytest.mark.parametrize("content", [b"name =", b"\xff\xfe", b"[a\n", b"x = " + b"[" * 5000])
def test_a_file_that_is_not_toml_is_refused(tmp_path, content):
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=f"recipe {file} is not TOML"):
        load_recipe(str(file))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs=0", "epochs=0 is not allowed: .* greater than or equal to 1"),
        ("epochs=1.5", "epochs=1.5 is not allowed: .*integer"),
        ("structure=filter", "structure='filter' is not allowed: it is a table; `dessilbi recipes"),
        ("batch_size=-1", "batch_size=-1 is not allowed"),
        ("validation=0", "validation=0 is not allowed"),
        ("points=0", "points=0 is not allowed"),
        ("seed=-1", "seed=-1 is not allowed"),
        ("name=../x", r"name='\.\./x' is not allowed"),
        ("optimizer.lr=0", "optimizer.lr=0 is not allowed: .* greater than 0"),
        ("optimizer.momentum=1", "optimizer.momentum=1 is not allowed: .* less than 1"),
        ("optimizer.lr=inf", "optimizer.lr=inf is not allowed: .* finite"),
        ("optimizer.nu=-1", "optimizer.nu=-1 is not allowed"),
        ("optimizer.lam=0", "optimizer.lam=0 is not allowed"),
        ("optimizer.lam=nan", "optimizer.lam=nan is not allowed"),
        ("optimizer.lam=lots", "optimizer.lam='lots' is not allowed: .* valid number"),
        ("optimizer.nu=", "optimizer.nu='' is not allowed"),
        ("optimizer.kappa=inf", "optimizer.kappa=inf is not allowed"),
        ("optimizer.momentum=-0.1", "optimizer.momentum=-0.1 is not allowed"),
        ("optimizer.block_scale=cube", "block_scale='cube' is not allowed: .*'unit' or 'sqrt'"),
        ("optimizer=3", "optimizer=3 is not allowed"),
        ("schedule.kind=warm", "schedule.kind='warm' is not allowed: .*'constant', 'step', 'cosi"),
        ("schedule.milestones=[2, 1]", r"milestones=.* is not allowed: must be ascending"),
        ("schedule.milestones=[0]", "milestones.0=0 is not allowed"),
        ("schedule.hold=1", "schedule.hold=1 is not allowed"),
        ("finetune.epochs=-1", "finetune.epochs=-1 is not allowed"),
        ("moving.lam=[[0, 0], [1, 1]]", "moving.lam.0.1=0 is not allowed: .* greater than 0"),
        ("moving.kappa=[[0, 0]]", "moving.kappa.0.1=0 is not allowed: .* greater than 0"),
        ("precision=fp8", "precision='fp8' is not allowed: .*'float32', 'bf16' or 'fp16'"),
        ("accumulate=0", "accumulate=0 is not allowed: .* greater than or equal to 1"),
        ("accumulate=3", "accumulate=3 is not allowed: batch_size=16 must be a multiple of it"),
        ("clip_norm=0", "clip_norm=0 is not allowed"),
        ("clip_norm=inf", "clip_norm=inf is not allowed: .* finite"),
        ("compile=perhaps", "compile='perhaps' is not allowed"),
        ("workers=-1", "workers=-1 is not allowed"),
        ("checkpoint_every=0", "checkpoint_every=0 is not allowed"),
        ("keep_checkpoints=0", "keep_checkpoints=0 is not allowed"),
        ("coupled=2", "coupled=2 is not allowed"),
        ("image_size=7", "image_size=7 is not allowed"),
        ("length=0", "length=0 is not allowed"),
        ("optimizer.R=0", "optimizer.R=0 is not allowed"),
        ("optimizer={nu = 1, R = 2}", "optimizer=.* is not allowed: give nu or R = T/nu, not both"),
        ("retrain.epochs=3", "retrain.lr is missing; retrain has momentum, nesterov, weight_decay"),
        ("retrain.mu=3", "retrain.epochs is missing"),
        ("structure=filter", "structure='filter' is not allowed"),
        ("epoch=3", r"epoch is not a field; a recipe has name, summary, .*epochs"),
        (
            "optimizer.mu=3",
            r"optimizer.mu is not a field; optimizer has base, lr, kappa, nu, R, lam",
        ),
        ("schedule.end=3", r"schedule.end is not a field; schedule has kind"),
        ("epochs", "--set 'epochs' is not of the form key=value"),
        ("=3", "--set '=3' is not of the form key=value"),
        ("optimizer..nu=3", "is not of the form key=value or part.key=value"),
        ("epochs.x=3", "--set 'epochs.x=3': epochs has no fields of its own"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_in_one_sentence(mine, assignment, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(mine), [assignment])
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(TOML.replace("epochs = 3\n", ""))
    with pytest.raises(RecipeError, match=f"recipe {file}: epochs is missing; a recipe has name"):
        load_recipe(str(file))


@pytest.mark.parametrize(
    "assignment", ["optimizer.dampening=nan", "optimizer.dampening=inf"], ids=str
)
def test_an_infinite_dampening_is_refused(mine, assignment):
    with pytest.raises(RecipeError, match=r"optimizer\.dampening"):
        load_recipe(str(mine), [assignment])


def test_a_recipe_that_was_written_down_is_read_back_as_it_was(mine):
    from dessilbi.files.storage import to_json

    recipe = load_recipe(str(mine))
    assert Recipe.model_validate_json(to_json(recipe.model_dump())) == recipe


def test_an_infinite_lam_of_a_rule_is_read_back_as_a_number(mine):
    from dessilbi.files.storage import to_json

    recipe = load_recipe(str(mine), ["structure.fc1.weight={lam=inf}"])
    assert Recipe.model_validate_json(to_json(recipe.model_dump())) == recipe


def test_the_last_of_nu_and_ratio_counts(mine):
    assert load_recipe(str(mine), ["optimizer.R=3", "optimizer.nu=5"]).optimizer.nu == 5
    assert load_recipe(str(mine), ["optimizer.nu=5", "optimizer.R=3"]).optimizer.R == 3


def test_without_nu_and_ratio_nu_is_that_of_the_optimizer(mine):
    from dessilbi import DessiLBI

    default = DessiLBI([torch.zeros(2)]).defaults["nu"]
    assert load_recipe(str(mine), ["optimizer={lr=0.1}"]).optimizer.nu == default


@pytest.mark.parametrize(("base", "expected"), [("sgd", 4 * 8.25), ("adamw", 8.25)])
def test_the_ratio_decides_nu_by_the_length_of_the_path(mine, base, expected):
    """T of "hold": a warm-up counts half (and half a step), a cosine half: 0.825 of the steps."""
    values = ["optimizer.R=10", "optimizer.lr=0.1", "optimizer.kappa=4", "schedule.kind=hold"]
    recipe = load_recipe(str(mine), [*values, f"optimizer.base={base}"])
    options = optimizer_of(recipe, 1000)
    assert options.nu == pytest.approx(expected, rel=0.002)
    assert options.R is None
    assert optimizer_of(load_recipe(str(mine)), 1000) == load_recipe(str(mine)).optimizer


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_written_out_reads_back_as_itself(tmp_path, name):
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(load_recipe(name)), encoding="utf-8")
    assert load_recipe(str(file)) == load_recipe(name)


def test_what_toml_has_no_word_for_is_written_out(mine, tmp_path):
    recipe = load_recipe(
        str(mine),
        [
            *("optimizer.lam=inf", 'summary=Γ "x" \\n', "optimizer.R=3", "clip_norm=2"),
            *('structure.fc1.weight=["all", 49]', "structure.fc2.weight=none"),
        ],
    )
    file = tmp_path / "again.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    again = load_recipe(str(file))
    assert again == recipe
    assert again.structure["fc1.weight"] == (None, 49)
    assert again.structure["fc2.weight"] is None


def test_rules_are_written_out_in_their_order(mine, tmp_path):
    """The first that matches decides, and TOML writes tables after plain values."""
    values = ['structure={"conv1*"={structure="none", lam=2}, "conv*"="filter", "*"=["all", 1]}']
    recipe = load_recipe(str(mine), values)
    file = tmp_path / "again.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(str(file)).structure == {
        "conv1*": {"structure": None, "lam": 2},
        "conv*": "filter",
        "*": (None, 1),
    }
    assert list(load_recipe(str(file)).structure) == list(recipe.structure)


def test_every_value_is_written_out(mine):
    told = tomllib.loads(to_toml(load_recipe(str(mine))))
    left_out = {
        "image_size",
        "length",
        "clip_norm",
        "judged",
        "retrain",
        "density",
        "freeze",
        "order_seed",
        "stop",
        "grow",
    }  # which have no value here
    assert set(told) == set(Recipe.model_fields) - left_out
    assert set(told["optimizer"]) == set(OptimizerRecipe.model_fields) - {
        "R",
        "lam_filter",
        "fused",
    }
