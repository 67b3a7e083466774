# SPDX-License-Identifier: Apache-2.0
"""A run folder in numbers."""

import json

import pytest
from tiny import own_copy, shared_run

from dessilbi import Path
from dessilbi.files.storage import to_json
from dessilbi.path.history import History
from dessilbi.reporting.summary import METRICS, summarise, thinned

KEYS = [
    *("step", "epoch", "time", "density", "accuracy", "ticket_accuracy", "gamma_accuracy"),
    *("val_accuracy", "val_ticket_accuracy", "layers"),
]


def test_a_summary_holds_the_points_of_the_path():
    path, rows = Path.load(shared_run().folder), summarise(shared_run().folder).rows
    assert len(rows) == len(path.points) == 4
    for row, point in zip(rows, path.points, strict=True):
        assert (row.step, row.time, row.density) == (point.step, point.time, point.density)
        assert {name: getattr(row, name) for name in METRICS} == point.metrics
        assert row.layers == path.support(step=point.step).densities()


def test_a_summary_knows_its_recipe_and_its_folder():
    summary = summarise(str(shared_run().folder))
    assert summary.recipe["name"] == "tiny"
    assert summary.folder == shared_run().folder


def test_the_json_has_exactly_the_keys_that_are_promised():
    value = summarise(shared_run().folder).to_json()
    assert list(value) == ["points"]
    assert [list(point) for point in value["points"]] == [KEYS] * 4
    assert list(value["points"][0]["layers"]) == Path.load(shared_run().folder).names


def test_the_json_is_strict_and_an_infinite_number_is_a_word(tmp_path):
    run = own_copy(tmp_path)
    history = History.load(run.path)
    history.file = run.path
    history.log({"gamma_accuracy": float("inf")})

    def refuse(word):
        raise AssertionError(word)

    told = json.loads(to_json(summarise(run.folder).to_json()), parse_constant=refuse)
    assert told["points"][-1]["gamma_accuracy"] == "inf"
    assert type(told["points"][-1]["accuracy"]) is float


def test_points_that_were_not_judged_have_no_accuracy(tmp_path):
    run = own_copy(tmp_path)
    lines = run.path.read_text().splitlines(keepends=True)
    run.path.write_text("".join(lines[:2]))
    (row,) = summarise(run.folder).rows
    assert (row.step, row.accuracy, row.epoch) == (3, None, None)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        summarise(tmp_path)


@pytest.mark.parametrize(("total", "count"), [(0, 5), (1, 5), (5, 5), (6, 5), (100, 20), (7, 2)])
def test_thinning_rows_keeps_the_first_and_the_last(total, count):
    found = thinned(range(total), count)
    assert len(found) == min(total, count)
    assert found[:1] == [0][:total]
    assert found[-1:] == [total - 1][:total]
    assert found == sorted(set(found))
