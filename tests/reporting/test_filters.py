# SPDX-License-Identifier: Apache-2.0
"""The filters of a run's layer in the order of first entry, and their figure."""

import sys
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
import torch
from commands import assert_failed, call
from tiny import QUICK, own_copy, shared_run, train_tiny
from torch import nn

from dessilbi import Path
from dessilbi.outcomes.tickets import Drawer
from dessilbi.reporting import filters as filters_module
from dessilbi.reporting.filters import Filter, Filters, filters_of

QUICKLY = {"steps": 2}
pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(scope="module")
def conv3():
    return filters_of(shared_run().folder, "conv3", **QUICKLY)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """A run whose filters enter one after the other, and not all of them."""
    rule = 'structure={"conv*.weight" = {structure = "filter", lam = 0.25}}'
    folder = tmp_path_factory.mktemp("spread") / "run"
    return train_tiny(folder, rule, "optimizer.lam=0.01", "points=12", "judged=1")


def first_entries(run, name):
    """The step at which each filter had its first block in Gamma, asked point by point."""
    path, found = Path.load(run.folder), {}
    for point in path.points:
        inside = path.support(step=point.step).mask_of(name).flatten(1).any(1)
        for i in inside.nonzero().flatten().tolist():
            found.setdefault(i, point.step)
    return found


def test_filters_are_sorted_by_first_entry_ties_by_norm_and_the_rest_comes_last(spread):
    all_steps, model = [], Drawer(spread).model
    for layer in ("conv1", "conv2", "fc1"):  # in fc1 single weights enter
        found = filters_of(spread.folder, layer, **QUICKLY)
        entries = first_entries(spread, f"{layer}.weight")
        assert {each.index: each.step for each in found.entered} == entries
        assert found.total_entered == len(entries)
        assert found.total == len(found.filters) == len(found.entered) + len(found.never)
        steps = [each.step for each in found.filters]
        assert steps == sorted(entries.values()) + [None] * (found.total - len(entries))
        norms = model.get_parameter(f"{layer}.weight").detach().flatten(1).norm(dim=1)
        for step in set(steps):
            tied = [float(norms[each.index]) for each in found.filters if each.step == step]
            assert tied == sorted(tied, reverse=True)
        all_steps.append(set(steps))
    assert max(map(len, all_steps)) > 2
    assert any(None in steps for steps in all_steps)


def test_epochs_are_those_of_the_points_and_what_left_is_known(spread):
    path, found = Path.load(spread.folder), filters_of(spread.folder, "conv1", weights=True)
    epochs = {point.step: point.metrics["epoch"] for point in path.points}
    assert all(each.epoch == pytest.approx(epochs[each.step]) for each in found.entered)
    assert {each.epoch for each in found.never} <= {None}
    last = path.support(step=path.step)["conv1.weight"].flatten()
    assert all(each.stays == bool(last[each.index]) for each in found.filters)
    assert found.entered


def test_only_so_many_are_taken_and_the_count_stays(conv3):
    few = filters_of(shared_run().folder, "conv3.weight", most=3, **QUICKLY)
    assert [each.index for each in few.filters] == [each.index for each in conv3.filters[:3]]
    assert (few.total, few.total_entered) == (conv3.total, conv3.total_entered)
    torch.testing.assert_close(few.filters[1].image, conv3.filters[1].image)


def test_weights_are_the_kernels_of_the_layer_that_reads_the_image():
    found = filters_of(shared_run().folder, "conv1", weights=True)
    weight = Drawer(shared_run()).model.conv1.weight
    assert [each.after for each in found.filters] == [None] * 6
    for each in found.filters:
        assert torch.equal(each.image, weight[each.index])


def test_filters_of_a_transposed_convolution_are_its_outputs():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    rows = filters_module._rows(layer.weight, layer)
    assert rows.shape == (6, 2 * 9)
    torch.testing.assert_close(rows[4], layer.weight[2:, 1].flatten())


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """A run in which one layer has no structure."""
    rule = 'structure={"fc2.weight" = "none"}'
    with pytest.MonkeyPatch.context() as patch:
        from tiny import FEW

        from dessilbi.training.data import DATA_SETS

        patch.setitem(DATA_SETS, "few", FEW)
        return train_tiny(tmp_path_factory.mktemp("partly") / "run", *QUICK, rule)


def test_a_layer_without_blocks_is_one_sentence(partly):
    result = call("filters", partly.folder, "--layer", "fc2")
    assert_failed(result, 1, "fc2 has no blocks", "name one of conv1, conv2, conv3, fc1")


def test_a_run_without_points_is_one_sentence(tmp_path):
    run = own_copy(tmp_path)
    run.path.write_bytes(run.path.read_bytes().splitlines(keepends=True)[0])
    result = call("filters", run.folder, "--layer", "conv1")
    assert_failed(result, 1, "no recorded points", "let the run go on")


def test_a_run_that_has_not_finished_is_one_sentence(tmp_path):
    run = own_copy(tmp_path)
    run.model.unlink()
    assert_failed(call("filters", run.folder, "--layer", "conv1"), 1, "let the run finish")


def test_a_model_of_text_is_one_sentence(tmp_path):
    text = ("model=gpt", "data=generated:tinyshakespeare:40", "length=8", "structure={}")
    small = ("validation=10", "batch_size=10", "epochs=1", "points=1", "judged=1")
    run = train_tiny(tmp_path / "run", *text, *small, "optimizer.lr=1e-3")
    result = call("filters", run.folder, "--layer", "blocks.0.up")
    assert_failed(result, 1, "was trained on a text")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--layer", "conv4"], 1, ["no layer 'conv4'", "did you mean conv"]),
        (["--layer", "conv2", "--weights"], 1, ["weights of conv2 are no images"]),
        (["--layer", "conv1", "--out", "x.docx"], 2, ["x.docx is no image", ".png"]),
        (["--layer", "conv1", "--out", "mine.png"], 1, ["mine.png exists", "never overwritten"]),
        (["--layer", "conv1", "--weights", "--out", "no/x.png"], 1, ["no/x.png"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(tmp_path, arguments, code, words):
    (tmp_path / "mine.png").write_text("mine")
    assert_failed(call("filters", shared_run().folder, *arguments), code, *words)
    assert (tmp_path / "mine.png").read_text() == "mine"


def test_json_tells_the_order_and_what_was_reached_and_draws_nothing():
    import json

    result = call("filters", shared_run().folder, "--layer", "conv2", "--steps", 2, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["layer"], told["total"], told["file"]) == ("conv2", 16, None)
    expected = filters_of(shared_run().folder, "conv2", **QUICKLY)
    keys = {"index", "step", "epoch", "stays", "before", "after"}
    assert all(set(each) == keys for each in told["filters"])
    assert [each["index"] for each in told["filters"]] == [f.index for f in expected.filters]
    assert told["filters"][0]["after"] == expected.filters[0].after
    assert not shared_run().figures.exists()


def test_the_command_tells_and_draws_into_the_run(tmp_path):
    pytest.importorskip("matplotlib")
    run = own_copy(tmp_path)
    for name in ("filters-conv1.png", "filters-conv1-2.png"):
        result = call("filters", run.folder, "--layer", "conv1", "--steps", 2)
        assert result.exit_code == 0, result.output
        assert f"saved as {run.figures / name}" in result.stdout
        assert (run.figures / name).read_bytes().startswith(b"\x89PNG")
    assert "conv1 of tiny: 0 of 6 entered Γ" in result.stdout
    assert "--weights shows its kernels" in result.stdout
    assert "figures" not in call("verify", run.folder).stdout


def made(entered, never, layer="conv3", image=(1, 4, 4)):
    """Filters that entered one after the other, and others."""
    filters = tuple(
        Filter(i, i if i < entered else None, i / 2 if i < entered else None, i % 2 == 0, 0, 1, x)
        for i, x in enumerate(torch.rand(entered + never, *image))
    )
    total = entered + never
    return Filters(FilePath("run"), "tiny", layer, "maximised", filters, total, entered, False)


def text_of(file):
    """What an SVG says, in order: matplotlib keeps it in comments beside the outlines."""
    import re

    return re.findall(r"<!-- (.*?) -->", file.read_text(encoding="utf-8"))


def test_the_figure_shows_those_that_entered_in_order_above_the_others(tmp_path):
    pytest.importorskip("matplotlib")
    from dessilbi.reporting.mosaic import save_mosaic

    save_mosaic(made(3, 2), tmp_path / "f.svg")
    told = text_of(tmp_path / "f.svg")
    assert [text for text in told if text.startswith(("#", "(#"))] == [
        *("#0 · 0.0", "(#1 · 0.5)", "#2 · 1.0"),
        *("#3", "#4"),
    ]
    assert any(text.startswith("3 of 5 entered") for text in told)
    assert "2 of 5 never entered Γ (index)" in told


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_figure_is_the_same_every_time(tmp_path, ending):
    pytest.importorskip("matplotlib")
    from dessilbi.reporting.mosaic import save_mosaic

    found = made(14, 1)
    for name in ("a", "b"):
        save_mosaic(found, tmp_path / f"{name}.{ending}")
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


@pytest.mark.parametrize(
    "found",
    [made(2, 0), made(0, 2), made(1, 0, r"$\frac{1$_{"), made(2, 1, "x" * 300, (5, 4, 4))],
    ids=["all", "none", "formula", "long, five channels"],
)
def test_every_layer_can_be_drawn(tmp_path, found):
    pytest.importorskip("matplotlib")
    from dessilbi.reporting.mosaic import save_mosaic

    save_mosaic(found, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_inputs_that_are_no_images_are_refused_in_one_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    from dessilbi.reporting.mosaic import save_mosaic

    with pytest.raises(ValueError, match=r"inputs of shape \(7,\) are no images"):
        save_mosaic(made(2, 0, image=(7,)), tmp_path / "f.png")


def test_without_matplotlib_nothing_is_computed_and_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(filters_module, "maximise", None)
    result = call("filters", shared_run().folder, "--layer", "conv1")
    assert_failed(result, 1, "pip install 'dessilbi[figures]'")


def test_weights_of_another_shape_than_the_path_are_a_damaged_run(monkeypatch):
    path = Path.load(shared_run().folder)
    spec = path.specs["conv1.weight"]
    other = {"conv1.weight": replace(spec, shape=(12, 1, 5, 5))}
    monkeypatch.setattr(Path, "specs", property(lambda _: other))
    with pytest.raises(ValueError, match="restore the run folder from a copy"):
        filters_of(shared_run().folder, "conv1")
