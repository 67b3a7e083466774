# SPDX-License-Identifier: Apache-2.0
"""Recipes: those that are shipped, one's own, values set on top, and what is refused."""

import math

import pytest

from dessilbi.training.data import DATA_SETS
from dessilbi.training.recipes import Recipe, RecipeError, load_recipe, recipe_names

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


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_under_its_name_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.source
    assert recipe.data in DATA_SETS


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
    with pytest.raises(
        RecipeError, match=r"no recipe 'lenett'; choose one of digits-lenet, .* or a"
    ):
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
        ("batch_size=-1", "batch_size=-1 is not allowed"),
        ("validation=0", "validation=0 is not allowed"),
        ("points=0", "points=0 is not allowed"),
        ("seed=-1", "seed=-1 is not allowed"),
        ("name=../x", r"name='\.\./x' is not allowed"),
        ("optimizer.lr=0", "optimizer.lr=0 is not allowed: .* greater than 0"),
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
        ("structure=filter", "structure='filter' is not allowed"),
        ("epoch=3", r"epoch is not a field; a recipe has name, summary, .*epochs"),
        ("optimizer.mu=3", r"optimizer.mu is not a field; optimizer has base, lr, kappa, nu, lam"),
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
    from dessilbi.storage import to_json

    recipe = load_recipe(str(mine))
    assert Recipe.model_validate_json(to_json(recipe.model_dump())) == recipe


def test_an_infinite_lam_of_a_rule_is_read_back_as_a_number(mine):
    from dessilbi.storage import to_json

    recipe = load_recipe(str(mine), ["structure.fc1.weight={lam=inf}"])
    assert Recipe.model_validate_json(to_json(recipe.model_dump())) == recipe
