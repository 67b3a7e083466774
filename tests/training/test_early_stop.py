# SPDX-License-Identifier: Apache-2.0
"""A search that ends when its ticket has been found: the same however often it is cut."""

import json
import signal
from unittest.mock import patch

import pytest
import tiny
from commands import call
from tiny import FEW, Recorder, denormals_kept, train_tiny
from torch import nn

from dessilbi import Path
from dessilbi.files.runs import Run
from dessilbi.files.storage import read_lines
from dessilbi.models import IMAGE_MODELS, MODELS
from dessilbi.path.settling import settled
from dessilbi.training import loop
from dessilbi.training.data import DATA_SETS

# 5 steps an epoch, 15 in all, a point at each.
SHORT = (
    *("data=few", "model=drop", "validation=100", "batch_size=20", "epochs=3", "points=15"),
    *("optimizer.lam=0.02", "optimizer.nu=0.5", 'structure={"1.weight" = "filter"}'),
)
LOOSE = {"window": 6, "tolerance": 1.0, "gain": 1.0, "gap": 1.0}
STOP = (*SHORT, "stop={window=6, tolerance=1.0, gain=1.0, gap=1.0}", "judged=1")
SAME = ("model", "scores", "path", "metrics", "recipe", "early")


def drop(num_classes, in_channels):
    """Draws random numbers in every step, and has batch statistics."""
    layers = (nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


class Cut(Recorder):
    """Ends a run when it hears of a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def update(self, step, facts):
        super().update(step, facts)
        if step == self.step:
            signal.raise_signal(signal.SIGINT)


def resume(folder, **options):
    with denormals_kept():
        return loop.resume(folder, **options)


@pytest.fixture(autouse=True, scope="module")
def _small_model():
    with (
        patch.dict(MODELS, drop=drop),
        patch.dict(IMAGE_MODELS, drop=drop),
        patch.dict(DATA_SETS, few=FEW),
    ):
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("stopped") / "run", *STOP)


def test_it_ends_at_the_first_point_at_which_the_path_had_settled(stopped):
    path, told = Path.load(stopped.folder), stopped.read_status()
    found = settled(path, **LOOSE)
    assert told["status"] == "finished"
    assert told["steps"] == told["settled"]["step"] == found.step == path.points[-1].step < 15
    assert told["epochs"] == found.step / 5
    assert told["epochs_saved"] == 3 - found.step / 5 > 0
    assert stopped.scores.is_file()


def test_every_point_carries_the_accuracies_it_is_decided_by(stopped):
    points = Path.load(stopped.folder).points
    assert all({"val_accuracy", "val_ticket_accuracy"} <= set(p.metrics) for p in points)
    assert sum("accuracy" in p.metrics for p in points) == 1  # the test split: only at the end


def test_the_epoch_it_ends_in_is_written_down_as_a_part(stopped):
    lines = list(read_lines(stopped.metrics))
    step = stopped.read_status()["steps"]
    assert step % 5
    assert lines[-1]["step"] == step
    assert lines[-1]["epoch"] == step / 5


def test_until_then_it_is_the_run_that_does_not_stop(stopped, tmp_path):
    whole = train_tiny(tmp_path / "run", *SHORT)
    one, other = Path.load(stopped.folder), Path.load(whole.folder)
    step = one.points[-1].step
    assert one.support(step=step) == other.support(step=step)
    assert other.points[-1].step > step


def test_it_stops_at_the_same_step_however_often_it_was_cut(stopped, tmp_path):
    step = stopped.read_status()["steps"]
    assert step > 4
    for cut_at in (3, step - 1, step):
        run = Run(tmp_path / str(cut_at))
        try:
            train_tiny(run.folder, *STOP, reporter=Cut(cut_at))
        except KeyboardInterrupt:
            resume(run.folder)
        for name in SAME:
            same = getattr(run, name).read_bytes() == getattr(stopped, name).read_bytes()
            assert same, (cut_at, name)
        told = [r.read_status() for r in (run, stopped)]
        assert {**told[0], "seconds": 0} == {**told[1], "seconds": 0}


def test_a_run_that_was_killed_after_it_had_decided_decides_again(stopped, tmp_path, monkeypatch):
    def killed(self):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(loop.Session, "finish", killed)
        with pytest.raises(OSError, match="gone"):
            train_tiny(tmp_path / "run", *STOP, "checkpoint_every=0.2")
    run = Run(tmp_path / "run")
    assert run.read_status()["status"] == "failed"
    reporter = Recorder()
    resume(run.folder, reporter=reporter)
    for name in ("model", "scores", "path", "metrics"):
        assert getattr(run, name).read_bytes() == getattr(stopped, name).read_bytes(), name


def test_a_run_that_never_settles_trains_all_epochs(tmp_path):
    run = train_tiny(tmp_path / "run", *SHORT, "stop.window=1000")
    told = run.read_status()
    assert (told["settled"], told["epochs_saved"], told["steps"]) == (None, 0.0, 15)


@pytest.mark.usefixtures("command_line")
def test_the_command_line_says_how_many_epochs_were_saved(tmp_path):
    (tmp_path / "tiny.toml").write_text(tiny.TOML)
    sets = [a for s in SHORT for a in ("--set", s)]
    result = call("train", "tiny.toml", *sets, "--stop-when-ticket")
    assert result.exit_code == 0, result.output
    assert "The support never settled: all epochs were trained." in result.stdout
    again = call("train", "tiny.toml", *sets, "--set", STOP[-2], "--json")
    assert json.loads(again.stdout)["epochs_saved"] > 0


def test_a_network_that_grows_is_not_told_to_stop(tmp_path):
    with patch.object(loop, "train") as train:
        result = call("train", "grow-digits", "--stop-when-ticket", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "it does not go with stop: a network that grows has its own end" in result.stderr
    assert not train.called
