# SPDX-License-Identifier: Apache-2.0
"""grow on the command line: its JSON, what works with a grown run afterwards, errors."""

import json

import pytest
from commands import call

# What a net of a few filters, trained for a few steps, is rightly warned about.
pytestmark = [
    pytest.mark.usefixtures("command_line"),
    pytest.mark.filterwarnings("ignore:many units are dead", "ignore:no block can enter"),
]

SMALL = (
    *("data=few", "validation=100", "batch_size=50", "epochs=1", "points=2", "judged=1"),
    *("grow.every=1", "grow.max_rounds=2", "optimizer.lam=1e-4", "grow.target_accuracy=1.0"),
)


def settings(*more):
    return [part for value in (*SMALL, *more) for part in ("--set", value)]


def test_a_run_grows_and_its_smaller_model_is_saved_and_verified():
    result = call("grow", "grow-digits", *settings(), "--json", "--out", "run")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    wanted = {"epoch", "sizes", "params", "macs", "accuracy", "max_abs_diff"}
    assert [wanted <= line.keys() for line in told["rounds"]] == [True] * 4
    sizes = [line["sizes"]["conv3"] for line in told["rounds"]]
    assert sizes == [4, 10, 16, 16]
    assert told["training_macs"] > 0
    compacted = call("compact", "run", "--density", "0.5", "--json")
    assert compacted.exit_code == 0, compacted.output
    folder = json.loads(compacted.stdout)["folder"]
    assert json.loads(compacted.stdout)["removed"] > 0
    assert call("verify", folder).exit_code == 0
    assert call("verify", "run").exit_code == 0
    assert call("ticket", "run", "--density", "0.5").exit_code == 0
    again = call("grow", "--resume", "run")
    assert again.exit_code == 0
    assert "finished" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("digits-lenet",), 2, "recipe digits-lenet does not grow: choose one of grow-"),
        ((), 2, "give either a recipe to grow or --resume RUN"),
        (("grow-digits", "--max-params", "10"), 2, "max_params=10 is below the start"),
        (("grow-digits", "--max-width", "3"), 2, "below the start of conv1"),
        (("grow-digits", "--set", "grow.start.conv9=4"), 2, "grow.start"),
        (("grow-digits", "--target-accuracy", "7"), 2, "grow.target_accuracy"),
        (("--resume", "nowhere"), 1, "nowhere is not a run folder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, code, message):
    more = settings() if arguments and arguments[0] == "grow-digits" else []
    result = call("grow", *arguments[:1], *more, *arguments[1:])
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
