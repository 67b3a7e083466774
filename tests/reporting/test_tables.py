# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny import shared_run

from dessilbi.reporting.summary import Row, Summary, summarise
from dessilbi.reporting.tables import outcome_table, path_table, percent
from dessilbi.training.finetune import Outcome


def shown(table, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


def row_of(step, num_layers, accuracy=0.987):
    layers = {f"layer{i}.0.conv{i}.weight": 1.0 for i in range(num_layers)}
    return Row(step, step / 10, step / 5, 1.0, *([accuracy] * 5), layers)


def summary_of(count, num_layers, **options):
    rows = tuple(row_of(k, num_layers, **options) for k in range(1, count + 1))
    return Summary(Path("runs/x"), {"name": "a-recipe-with-quite-a-long-name-of-its-own"}, rows)


@pytest.mark.parametrize("num_layers", [1, 5, 6, 60])
def test_a_path_table_fits_80_columns(num_layers):
    lines = shown(path_table(summary_of(100, num_layers)))
    assert max(map(len, lines)) <= 80
    table = lines[: lines.index("")]
    assert sum("98.7" in line for line in table) == 20


def test_the_path_table_of_a_run_says_what_the_run_says():
    summary = summarise(shared_run().folder)
    text = "\n".join(shown(path_table(summary)))
    for row in summary.rows:
        assert percent(row.accuracy) in text
        assert percent(row.ticket_accuracy) in text
        assert percent(row.density) in text
    for word in ("tiny", "4 of 4 points", "conv1", "fc2", "Γ"):
        assert word in text


def test_many_layers_have_curves_but_no_columns_rather_than_being_squeezed():
    lines = shown(path_table(summary_of(3, 6)))
    table = "\n".join(lines[: lines.index("")])
    assert "conv" not in table
    assert sum(line.startswith("layer") for line in lines) == 6


def test_what_was_not_measured_is_a_dash():
    lines = shown(path_table(summary_of(1, 2, accuracy=None)))
    assert any(line.split().count("-") == 3 for line in lines)


def test_a_run_without_points_has_an_empty_table():
    assert "0 of 0 points" in " ".join(shown(path_table(summary_of(0, 1)))).replace("  ", " ")


def test_a_table_of_tickets_fits_80_columns_and_has_a_row_each():
    outcomes = [Outcome(d, d + 0.01, 0.5, 0.75) for d in (0.5, 0.25, 0.125)]
    lines = shown(outcome_table(outcomes, 0.99, 5))
    assert max(map(len, lines)) <= 80
    assert sum("50.0" in line and "75.0" in line for line in lines) == 3
    text = " ".join(" ".join(lines).split())
    assert "5 masked epochs; the dense W has 99.0" in text


def test_percentages_have_one_digit():
    assert [percent(v) for v in (0.0, 0.98765, 1.0, None)] == ["0.0", "98.8", "100.0", "-"]
