# SPDX-License-Identifier: Apache-2.0
"""Every recipe that is shipped: it says what it is, and trains three steps on made-up data."""

import math

import pytest
import torch
from tiny import denormals_kept

from dessilbi.files.storage import read_lines
from dessilbi.training.ingredients import data_of, groups_of, model_of
from dessilbi.training.loop import train
from dessilbi.training.objective import loss_of
from dessilbi.training.recipes import RecipeError, load_recipe, recipe_names
from dessilbi.training.schedules import optimizer_of
from dessilbi.training.setting import build_optimizer

OURS = {"digits": "mnist", "fashion-mnist": "mnist"}
SMALL = {"imagenet-alexnet": 64}  # AlexNet reads nothing smaller


def made_up(name):
    """Assignments for three steps on data of the recipe's shape, as small as it goes."""
    recipe = load_recipe(name)
    data = OURS.get(recipe.data, recipe.data)
    yield from ("epochs=1", "batch_size=4", "validation=4", "points=1", "accumulate=1", "workers=0")
    if data == "tinyshakespeare":
        yield from ("length=16", f"data=generated:{data}:16")
        return
    if data in ("imagenet", "folder"):
        yield f"image_size={SMALL.get(name, 32)}"
    yield f"data=generated:{data}:16"


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_takes_three_steps(name):
    recipe = load_recipe(name, list(made_up(name)))
    data = data_of(recipe, root=None)
    model = model_of(recipe, data)
    optimizer = build_optimizer(groups_of(recipe, model, data), optimizer_of(recipe, 3))
    before = [parameter.detach().clone() for parameter in model.parameters()]

    losses = []
    for inputs, targets in data.train.batches(0, batch_size=4, seed=0):
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert not any(map(torch.equal, before, model.parameters()))
    assert optimizer.support().densities()


@pytest.mark.parametrize("name", ["cifar10-resnet20", "shakespeare-gpt"])
# Three steps are too few for anything to enter, and for R = 10.
@pytest.mark.filterwarnings("ignore:no block can enter Gamma", "ignore:kappa alpha/nu is")
def test_images_and_text_go_through_the_loop(tmp_path, name):
    with denormals_kept():
        run = train(load_recipe(name, list(made_up(name))), tmp_path / "run")
    assert (run.read_status()["status"], run.read_status()["steps"]) == ("finished", 3)
    assert 0 <= run.read_status()["accuracy"] <= 1
    (metrics,) = read_lines(run.metrics)
    assert math.isfinite(metrics["loss"])


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_under_its_name_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.source.startswith(("this project", "the authors'", "as mnist-lenet"))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_ours_holds_the_learning_rate_while_the_support_grows(name):
    recipe = load_recipe(name)
    if recipe.grow is not None:  # it does so while it grows, whatever follows
        return
    ours = recipe.source.startswith("this project")
    assert ours == (recipe.schedule.kind == "hold")


def test_what_the_authors_ran_is_shipped():
    assert {
        *("mnist-lenet", "imagenet-alexnet", "imagenet-resnet18", "imagenet-resnet50"),
        *("cifar10-resnet56-bottleneck", "cifar10-vgg16", "cifar10-resnet50-lasso"),
        *("cifar10-vgg16-lasso", "cifar10-vgg16-weights"),
    } <= set(recipe_names())


def test_filters_have_a_threshold_of_their_own_unless_a_rule_says_otherwise():
    values = ["data=generated:cifar10", "validation=9", "optimizer.lam=0.5"]
    recipe = load_recipe("cifar10-resnet18", [*values, "model=resnet8", "optimizer.lam_filter=7"])
    rules = {"stage1.*conv*": {"lam": 3.0}, "stage2.*conv*": "element", "stage3.*": None}
    data = data_of(recipe, root=None)
    found = {}
    for chosen in (recipe, recipe.model_copy(update={"structure": rules})):
        model = model_of(chosen, data)
        optimizer = build_optimizer(groups_of(chosen, model, data), optimizer_of(chosen, 100))
        for group in optimizer.param_groups:
            for name in group["param_names"]:
                found.setdefault(name, []).append((group["structure"], group["lam"]))
    assert found["conv1.weight"] == [("filter", 7), ("filter", 7)]
    assert found["stage1.0.conv1.weight"] == [("filter", 7), ("filter", 3.0)]
    assert found["stage2.0.conv1.weight"] == [("filter", 7), ("element", 0.5)]
    assert found["fc.weight"] == [("element", 0.5), ("element", 0.5)]
    assert found["stage3.0.conv1.weight"][1][0] is None


@pytest.mark.parametrize(
    "assignment",
    [
        "data=mni",
        "validation=500",
        "model=gpt",
        "model=resnet",
        "batch_size=999",
        "structure.x=filter",
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence_that_names_the_recipe_once(tmp_path, assignment):
    values = ["data=generated:cifar10:30", "validation=5", "batch_size=5", assignment]
    with pytest.raises(RecipeError, match=r"^recipe cifar10-resnet20: ") as caught:
        train(load_recipe("cifar10-resnet20", values), tmp_path / "run")
    assert str(caught.value).count("cifar10-resnet20") == 1
    assert "\n" not in str(caught.value)
