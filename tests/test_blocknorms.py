# SPDX-License-Identifier: Apache-2.0
"""Norms of filters along the path: recorded, read back, and moved with the blocks."""

import json

import pytest
import torch
from tiny import QUICK, own_copy, shared_run, train_tiny
from torch.testing import assert_close

from dessilbi import DessiLBI, Path
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.files.storage import DamagedFileError
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.path.blocknorms import MOST, followed, norms_of
from dessilbi.path.history import History
from dessilbi.path.lines import Point

FILTERS = TensorSpec((6, 4, 3, 3), (1, None, None, None))
SINGLE = TensorSpec((8, 5), (1, 1))
SPECS = {"conv": FILTERS, "fc": SINGLE}


def history_of(file=None, points=3):
    history = History(SPECS, {}, file)
    drawn = torch.Generator().manual_seed(0)
    for k in range(1, points + 1):
        masks = {n: torch.rand(s.grid, generator=drawn) < 0.5 for n, s in SPECS.items()}
        history.add(Point(10 * k, float(k), 0.5), masks)
        history.weigh({"conv": torch.rand(6, 1, 1, 1, generator=drawn)})
    return history


def test_whole_filters_are_followed_and_single_weights_are_not():
    tiles = TensorSpec((8, 8), (4, 4))
    heads = TensorSpec((64, 128), (16, None))
    assert followed({**SPECS, "tiles": tiles, "heads": heads}) == ("conv", "heads")


def test_layers_that_no_longer_fit_are_left_out_whole():
    many = {str(k): TensorSpec((MOST // 2, 3), (1, None)) for k in range(3)}
    assert followed(many) == ("0", "1")


def test_the_norms_are_those_of_the_weights_of_each_tensor_by_itself():
    torch.manual_seed(0)
    one, two = torch.nn.Parameter(torch.randn(6, 5)), torch.nn.Parameter(torch.randn(6, 3))
    group = {"params": [("a", one), ("b", two)], "structure": "neuron", "unit": "u"}
    optimizer = DessiLBI([group], lr=0.1)
    found = norms_of(optimizer, ("b",))
    assert list(found) == ["b"]
    assert_close(found["b"].reshape(-1), two.detach().norm(dim=1))


def test_what_a_file_gives_back_is_what_was_recorded(tmp_path):
    history = history_of(tmp_path / "path.jsonl")
    loaded = History.load(tmp_path / "path.jsonl")
    assert loaded.norms.steps == history.norms.steps == [10, 20, 30]
    for step in (10, 20, 30):
        before, after = (h.norms.at(step, SPECS)["conv"] for h in (history, loaded))
        assert before.shape == FILTERS.grid
        assert torch.equal(before, after)
        assert bool(before.any())


def test_norms_go_with_the_points_that_are_thinned_away():
    history = history_of(points=4)
    history.thin(20)
    assert history.norms.steps == [point.step for point in history.points] == [20, 40]


def test_norms_are_told_once_for_a_point(tmp_path):
    history = history_of(tmp_path / "path.jsonl")
    size = history.position()["bytes"]
    history.weigh({"conv": torch.rand(6, 1, 1, 1)})
    assert history.position()["bytes"] == size


def test_norms_move_with_the_blocks_of_a_network_that_grows(tmp_path):
    history = history_of(tmp_path / "path.jsonl")
    before = history.norms.at(20, SPECS)["conv"].flatten()
    grown = {"conv": TensorSpec((4, 4, 3, 3), FILTERS.block), "fc": SINGLE}
    takes = {"conv": [[5, -1, 0, 2], [0], [0], [0]], "fc": [list(range(8)), list(range(5))]}
    history.reshape(grown, takes, step=30)
    for told in (history, History.load(tmp_path / "path.jsonl")):
        after = told.norms.at(20, told.specs)["conv"].flatten()
        assert torch.equal(after[[0, 2, 3]], before[[5, 0, 2]])
        assert bool(after[1].isnan())


@pytest.mark.parametrize("values", ["", "AAAA", "not base64!"])
def test_norms_of_another_number_of_blocks_are_refused(tmp_path, values):
    history = history_of(tmp_path / "path.jsonl", points=1)
    history.add(Point(20, 2.0, 0.5), history.support(0))
    history._write({"norms": {"step": 20, "values": values}})
    with pytest.raises(DamagedFileError, match="not a readable path"):
        History.load(tmp_path / "path.jsonl")


def test_a_run_records_the_norms_of_its_filters_at_every_point():
    run = shared_run()
    path = Path.load(run.folder)
    assert path.history.norms.names == ("conv1.weight", "conv2.weight", "conv3.weight")
    assert path.history.norms.steps == [point.step for point in path.points]
    weights = load_tensors(run.model)
    last = path.history.norms.at(path.step, path.specs)
    for name, norms in last.items():
        assert_close(norms.flatten(), weights[name].flatten(1).norm(dim=1))


def test_a_path_without_norms_is_read_as_before(tmp_path):
    run = own_copy(tmp_path)
    sound = Path.load(run.folder)
    old = History(sound.specs, sound.units, tmp_path / "old.jsonl")
    for index, point in enumerate(sound.points):
        old.add(Point(point.step, point.time, point.density), sound.history.support(index))
    run.path.write_bytes((tmp_path / "old.jsonl").read_bytes())
    loaded = Path.load(run.folder)
    assert loaded.history.norms.steps == []
    assert [p.step for p in loaded.points] == [p.step for p in sound.points]


def test_single_weights_add_nothing_to_the_file(tmp_path):
    run = train_tiny(tmp_path / "run", *QUICK, 'structure={"*" = "element"}')
    kinds = [json.loads(line) for line in run.path.read_text().splitlines()]
    assert any("point" in line for line in kinds)
    assert not any("norms" in line for line in kinds)
