# SPDX-License-Identifier: Apache-2.0
"""Figures of a run."""

import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from tiny import own_copy, shared_run

from dessilbi.files.sealing import sealed
from dessilbi.files.storage import write_json
from dessilbi.reporting.figures import save_path_figure
from dessilbi.reporting.summary import summarise

pytest.importorskip("matplotlib")


def test_a_path_becomes_a_figure_with_every_layer_named(tmp_path):
    file = tmp_path / "path.svg"
    save_path_figure(summarise(shared_run().folder), file)
    assert ET.parse(file).getroot().tag.endswith("svg")
    text = file.read_text(encoding="utf-8")
    for word in ("conv1", "fc2", "epoch", "test accuracy"):
        assert f"<!-- {word}" in text or f">{word}" in text


def test_a_figure_is_the_same_every_time_but_for_its_ids(tmp_path):
    summary = summarise(shared_run().folder)
    sizes = []
    for name in ("a.svg", "b.svg"):
        save_path_figure(summary, tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] == sizes[1]


def test_a_judged_family_is_drawn_as_well(tmp_path):
    run = own_copy(tmp_path)
    plain, wide = tmp_path / "plain.svg", tmp_path / "wide.svg"
    save_path_figure(summarise(run.folder), plain)
    tickets = [{"density": d, "before": d, "after": 0.9} for d in (0.5, 0.1)]
    write_json(run.family, sealed({"accuracy": 0.95, "tickets": tickets}))
    save_path_figure(summarise(run.folder), wide)
    assert "family of models" not in plain.read_text(encoding="utf-8")
    assert "family of models" in wide.read_text(encoding="utf-8")


def many_layers(summary):
    rows = [replace(r, layers={f"l{i}.weight": 0.5 for i in range(20)}) for r in summary.rows]
    return replace(summary, rows=tuple(rows))


def test_a_net_of_many_layers_is_drawn_without_a_warning(tmp_path):
    save_path_figure(many_layers(summarise(shared_run().folder)), tmp_path / "path.svg")


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)docx.*svg") as caught:
        save_path_figure(summarise(shared_run().folder), tmp_path / "path.docx")
    assert "\n" not in str(caught.value)


def test_a_run_without_judged_points_is_refused(tmp_path):
    summary = replace(summarise(shared_run().folder), rows=())
    with pytest.raises(ValueError, match="has no judged points to draw: let the run go on"):
        save_path_figure(summary, tmp_path / "path.svg")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dessilbi\[figures\]'"):
        save_path_figure(summarise(shared_run().folder), tmp_path / "path.svg")


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        save_path_figure(summarise(shared_run().folder), tmp_path / "no" / "path.svg")
