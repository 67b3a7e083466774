# SPDX-License-Identifier: Apache-2.0
"""dessilbi plan: what a recipe could remove, without data."""

import json

import pytest
import torch
from commands import call

from dessilbi import plan
from dessilbi.models import build_model
from dessilbi.training.data import DATA_SETS

pytestmark = pytest.mark.usefixtures("command_line")

RESNET = ("plan", "mnist-lenet", "--set", "model=resnet8", "--set", "structure={}")


def resnet_plan(*, coupled):
    model = build_model("resnet8", num_classes=10, in_channels=1, seed=0)
    return plan(model, example_inputs=torch.zeros(1, 1, 28, 28), coupled=coupled)


def test_plan_prints_the_plan_of_a_recipe_and_needs_no_data():
    result = call(*RESNET)
    assert result.exit_code == 0
    assert result.stdout == f"{resnet_plan(coupled=False)}\n"


def test_plan_couples_on_request():
    result = call(*RESNET, "--coupled")
    assert result.stdout == f"{resnet_plan(coupled=True)}\n"


def test_plan_json_is_the_plan_in_strict_json():
    told = json.loads(call(*RESNET, "--json").stdout)
    planned = resnet_plan(coupled=False)
    assert told["removable_parameters"] == planned.removable_parameters
    assert [unit["name"] for unit in told["units"]] == [unit.name for unit in planned.units]


def test_plan_uses_the_rules_of_the_recipe():
    arguments = ("plan", "mnist-lenet", "--set", "structure.conv3.weight=none", "--json")
    told = json.loads(call(*arguments).stdout)
    assert [u["name"] for u in told["units"] if u["removal"] == "never"] == ["conv3.weight"]


@pytest.mark.filterwarnings("default")
def test_plan_warns_on_standard_error_where_nothing_goes():
    result = call("plan", "mnist-lenet", "--set", 'structure={"*" = "none"}')
    assert result.exit_code == 0
    assert "WARNING: nothing of it can be removed" in result.stdout
    assert result.stderr.startswith("warning: nothing in LeNet can be removed")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model=lenett", "model='lenett' is not known"),
        ("data=mnistt", "data="),
        ("structure.conv9=filter", "the rule 'conv9' matches no parameter"),
        ("model=vgg16-bn", "reads 32x32 images of 3 channels, not of 1"),
    ],
)
def test_plan_refuses_a_recipe_that_does_not_fit_in_one_sentence(change, words):
    result = call("plan", "mnist-lenet", "--set", change)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: recipe mnist-lenet: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_plan_knows_the_samples_of_every_data_set():
    for name in DATA_SETS:
        result = call(*RESNET, "--set", f"data={name}")
        assert result.exit_code == 0, result.stderr


def test_plan_reads_a_text_recipe():
    result = call("plan", "shakespeare-gpt")
    assert result.exit_code == 0, result.stderr
    assert "removable" in result.stdout
