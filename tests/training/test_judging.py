# SPDX-License-Identifier: Apache-2.0
"""Which points are judged, what an epoch sums up to, and where the time goes."""

import io
import itertools
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny import FEW, QUICK, Recorder, shared_run, tiny_recipe, train_tiny

from dessilbi import Path
from dessilbi.files.runs import Run
from dessilbi.files.storage import read_lines
from dessilbi.reporting.summary import summarise
from dessilbi.reporting.tables import path_table
from dessilbi.training.data import DATA_SETS
from dessilbi.training.engine import engine_for
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.finetune import load_trained
from dessilbi.training.judging import PASSES, SHARE, Judge
from dessilbi.training.position import Clock, Totals
from dessilbi.training.setting import prepare
from dessilbi.training.watching import Watching

CPU = torch.device("cpu")


@pytest.fixture
def judge_of(tmp_path, monkeypatch):
    """The judge of a recipe, without training it."""
    monkeypatch.setitem(DATA_SETS, "few", FEW)

    def made(*assignments):
        recipe = tiny_recipe(tmp_path, *QUICK, *assignments)
        with engine_for(device="cpu") as engine:
            return Judge(prepare(recipe, engine), engine)

    return made


def judged_steps(judge):
    total = judge.setting.total_steps
    points = [s for s in range(1, total + 1) if s % judge.every == 0 or s == total]
    return [step for step in points if judge.wants(step)], points


@pytest.mark.parametrize("judged", [1, 3, 7, 50, 1000])
def test_about_as_many_points_are_judged_as_asked_for_and_always_the_last(judge_of, judged):
    judge = judge_of("epochs=50", "points=50", f"judged={judged}")
    found, points = judged_steps(judge)
    assert len(points) == 50
    assert judged / 2 < len(found) <= max(judged, 1) + 1 or found == points
    assert found[-1] == judge.setting.total_steps
    gaps = {b - a for a, b in itertools.pairwise(found[:-1])}
    assert len(gaps) <= 1  # evenly spread


def by_default(judge):
    """The judge of the same recipe that does not say how many points to judge."""
    recipe = judge.setting.recipe.model_copy(update={"judged": None})
    return Judge(replace(judge.setting, recipe=recipe), judge.engine)


def cost(judge):
    """Of judging and of training, in samples."""
    data = judge.setting.data
    judging = len(judged_steps(judge)[0]) * (3 * len(data.test) + 2 * len(data.validation))
    return judging, PASSES * judge.setting.recipe.epochs * len(data.train)


def test_by_default_judging_stays_within_its_share_of_the_training(judge_of):
    shares = []
    for epochs in (30, 100, 400):
        judge = by_default(judge_of(f"epochs={epochs}", "points=100"))
        judging, training = cost(judge)
        shares.append(judging / training)
        assert judging <= SHARE * training
    assert max(shares) > SHARE / 2


def test_a_net_with_batch_norm_is_judged_less_often(judge_of):
    plain = by_default(judge_of("epochs=100", "points=100"))
    norms = by_default(judge_of("epochs=100", "points=100", "model=resnet8", "structure={}"))
    assert len(judged_steps(norms)[0]) < len(judged_steps(plain)[0])


def test_points_that_are_not_judged_are_recorded_all_the_same(tmp_path):
    run = train_tiny(tmp_path / "run", *QUICK, "epochs=6", "points=6", "judged=2")
    summary = summarise(run.folder)
    assert [row.accuracy is not None for row in summary.rows] == [False, False, True] * 2
    assert [row.epoch for row in summary.rows] == [1, 2, 3, 4, 5, 6]
    assert summary.judged == summary.rows[2::3]
    console = Console(width=80, file=io.StringIO())
    console.print(path_table(summary))
    text = console.file.getvalue()
    assert "2 of 6 points" in text
    assert " - " not in text


def test_the_last_point_says_what_the_saved_weights_are_worth():
    run = shared_run()
    trained = load_trained(run)
    last = Path.load(run.folder).points[-1]
    data, model = trained.data, trained.model
    ticket = masked(model, Path.load(run.folder).support(step=last.step), data.train)
    expected = {
        "accuracy": accuracy(model, data.test),
        "val_accuracy": accuracy(model, data.validation),
        "ticket_accuracy": accuracy(ticket, data.test),
        "val_ticket_accuracy": accuracy(ticket, data.validation),
    }
    assert {name: last.metrics[name] for name in expected} == expected
    assert list(read_lines(run.metrics))[-1]["val_accuracy"] == expected["val_accuracy"]


def test_totals_add_up_over_pieces_and_come_back_from_numbers():
    totals = Totals(CPU)
    outputs, targets = torch.eye(4)[:, :3], torch.tensor([0, 1, 0, 0])
    totals.add(torch.tensor(2.0), outputs, targets)
    totals.add(torch.tensor(1.0), outputs[:1], targets[:1])
    assert totals.read() == [9.0, 4.0, 5.0]
    assert totals.loss == 1.0
    other = Totals(CPU)
    other.set(totals.read(), totals.loss)
    assert (other.read(), other.loss) == (totals.read(), totals.loss)
    assert other.finite
    other.add(torch.tensor(float("inf")), outputs, targets)
    assert not other.finite
    other.clear()
    assert other.read() == [0.0, 0.0, 0.0]


def test_a_clock_tells_where_a_lap_went():
    clock = Clock()
    with clock.of("saving"):
        time.sleep(0.02)

    def slow():
        for i in range(2):
            time.sleep(0.01)
            yield i, i

    assert list(clock.waiting("data", slow())) == [(0, 0), (1, 1)]
    told = clock.lap()
    assert set(told) == {"seconds", "data", "judging", "saving"}
    assert told["saving"] >= 0.02
    assert told["data"] >= 0.02
    assert told["judging"] == 0
    assert told["seconds"] >= told["saving"] + told["data"]
    assert clock.lap()["saving"] == 0


class Tracker:
    """Keeps what it is told."""

    def __init__(self):
        self.told, self.ended = [], []

    def log_metrics(self, metrics, step=None):
        self.told.append((step, metrics))

    def finalize(self, status):
        self.ended.append(status)


def test_a_tracker_hears_of_points_and_epochs_and_of_the_end(tmp_path):
    tracker = Tracker()
    run = train_tiny(tmp_path / "run", *QUICK, trackers=[tracker])
    assert [step for step, _ in tracker.told] == [2, 2, 4, 4]
    names = set().union(*(metrics for _, metrics in tracker.told))
    assert {"loss", "density", "density/fc2.weight", "coupling", "path_time", "lr"} <= names
    assert {"accuracy/train", "accuracy/accuracy", "accuracy/val_ticket_accuracy"} <= names
    assert tracker.told[-1][1]["loss"] == list(read_lines(run.metrics))[-1]["loss"]
    assert tracker.ended == ["finished"]


def test_only_the_first_process_writes_and_tells(tmp_path):
    tracker, reporter = Tracker(), Recorder()
    watching = Watching(Run(tmp_path), reporter, [tracker], first=False)
    watching.point(1, {"loss": 1.0}, {"loss": 1.0})
    watching.epoch({"step": 1}, {"step": 1})
    watching.close("finished")
    assert (tracker.told, tracker.ended, reporter.told, reporter.finished) == ([], [], [], 0)
    assert not list(tmp_path.iterdir())
