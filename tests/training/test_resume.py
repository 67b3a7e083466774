# SPDX-License-Identifier: Apache-2.0
"""Resuming: however often a run is cut, its outcome is that of a run that never was, to the bit."""

import json
import shutil
import signal
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from tiny import FEW, Recorder, denormals_kept, train_tiny
from torch import nn

from dessilbi import Path
from dessilbi.files.runs import BusyError, Run, TrainingError, locked
from dessilbi.files.storage import DamagedFileError, read_json, read_lines, write_json
from dessilbi.models import IMAGE_MODELS, MODELS
from dessilbi.training import checkpoints, loop
from dessilbi.training.data import DATA_SETS

# 5 steps an epoch, 15 in all, a point at each; a checkpoint at the end of each epoch.
SHORT = (
    *("data=few", "model=drop", "validation=100", "batch_size=20", "epochs=3", "points=15"),
    *("optimizer.lam=0.02", "optimizer.nu=0.5", "judged=5"),
    *('structure={"1.weight" = "filter"}',),
)
SAME = ("init", "model", "scores", "path", "metrics", "recipe")


def drop(num_classes, in_channels):
    """Draws random numbers in every step."""
    layers = (nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


@pytest.fixture(autouse=True, scope="module")
def _small_model():
    with (
        patch.dict(MODELS, drop=drop),
        patch.dict(IMAGE_MODELS, drop=drop),
        patch.dict(DATA_SETS, few=FEW),
    ):
        yield


class Cut(Recorder):
    """Ends a run when it hears of a step, by a signal or an error."""

    def __init__(self, step, how):
        super().__init__()
        self.step, self.how = step, how

    def update(self, step, facts):
        super().update(step, facts)
        if step == self.step:
            if isinstance(self.how, BaseException):
                raise self.how
            signal.raise_signal(self.how)


def resume(folder, **options):
    with denormals_kept():
        return loop.resume(folder, **options)


def cut_run(folder, step, how=signal.SIGINT, more=()):
    """A run that was cut at a step."""
    error = KeyboardInterrupt if how is signal.SIGINT else type(how)
    with pytest.raises(error):
        train_tiny(folder, *SHORT, *more, reporter=Cut(step, how))
    return Run(folder)


def assert_same(left, right):
    for name in SAME:
        assert getattr(left, name).read_bytes() == getattr(right, name).read_bytes(), name


VARIANTS = {
    "sgd": (),
    "sgd in pieces": ("accumulate=4", "clip_norm=0.5"),
    "adamw": ("optimizer.base=adamw", "optimizer.lr=0.01", "optimizer.nu=0.05"),
    "adamw in pieces": ("optimizer.base=adamw", "optimizer.lr=0.01", "accumulate=2"),
    "fp16": ("precision=fp16", "accumulate=2", "clip_norm=0.5"),
}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """Runs that were never cut, by variant."""
    made = {}

    def run_of(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp("uncut") / "run"
            made[variant] = train_tiny(folder, *SHORT, *VARIANTS[variant])
        return made[variant]

    return run_of


def test_the_runs_compared_here_select_and_learn(uncut):
    path = Path.load(uncut("sgd").folder)
    assert 0 < path.points[-1].density < 1
    assert len({point.density for point in path.points}) > 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_cut_twice_inside_epochs_ends_as_if_it_never_was(tmp_path, variant, uncut):
    run = cut_run(tmp_path / "run", 3, more=VARIANTS[variant])
    assert run.read_status() == {"schema": 1, "status": "interrupted", "step": 3}
    with pytest.raises(KeyboardInterrupt):
        resume(run.folder, reporter=Cut(9, signal.SIGINT))
    assert not run.model.exists()
    reporter = Recorder()
    resume(run.folder, reporter=reporter)
    assert run.read_status()["status"] == "finished"
    assert "after step 9" in reporter.said[0]
    assert [step for step, _ in reporter.told[1:]] == [10, 11, 12, 13, 14, 15]
    assert_same(run, uncut(variant))
    ends = [r.checkpoints / "step-0000000015" for r in (run, uncut(variant))]
    for name in ("state.safetensors", "ranks.json"):  # the optimizer, and random states
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    scalers = [read_json(end / "checkpoint.json")["scaler"] for end in ends]
    assert scalers[0] == scalers[1]
    assert (scalers[0] is not None) == (variant == "fp16")


@pytest.mark.parametrize("step", [7, 10], ids=["inside an epoch", "at its end"])
def test_who_stops_a_run_does_not_wait_for_judging(tmp_path, uncut, step, monkeypatch):
    taken = loop.step

    def interrupted(session, inputs, targets):
        taken(session, inputs, targets)
        if session.position.step == step - 1:  # the step is taken, but not yet counted
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", *SHORT)
    run = Run(tmp_path / "run")
    assert run.read_status()["step"] == step
    assert Path.load(run.folder).points[-1].step == step
    assert Path.load(run.folder).points[-1].metrics == {}
    monkeypatch.undo()
    resume(run.folder)
    assert_same(run, uncut("sgd"))


def test_a_checkpoint_of_a_newer_release_is_refused_by_its_version(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(checkpoints, "VERSION", 2)
        run = cut_run(tmp_path / "run", 3)
    with (
        pytest.warns(UserWarning, match="has format version 2, and this release reads 1"),
        pytest.raises(DamagedFileError),
    ):
        resume(run.folder)


def test_what_was_logged_after_the_checkpoint_is_cut(tmp_path, uncut):
    run = cut_run(tmp_path / "run", 8, RuntimeError("power cut"))
    assert len(Path.load(run.folder).points) == 8
    reporter = Recorder()
    resume(run.folder, reporter=reporter)
    assert "after step 5" in reporter.said[0]
    assert_same(run, uncut("sgd"))
    assert [line["epoch"] for line in read_lines(run.times)] == [1, 2, 3]


def test_a_run_without_a_checkpoint_starts_from_the_beginning(tmp_path, uncut):
    run = cut_run(tmp_path / "run", 4, RuntimeError("power cut"))
    assert not run.checkpoints.exists()
    resume(run.folder)
    assert_same(run, uncut("sgd"))


def test_a_line_torn_by_a_crash_does_no_harm(tmp_path, uncut):
    run = cut_run(tmp_path / "run", 8, RuntimeError("power cut"))
    for log in (run.path, run.metrics, run.times):
        with log.open("ab") as file:
            file.write(b'{"torn')
    resume(run.folder)
    assert_same(run, uncut("sgd"))


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["state.safetensors", "ranks.json", "checkpoint.json"])
@pytest.mark.parametrize("how", [damage, lambda file: file.unlink()], ids=["bit", "gone"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, uncut, name, how):
    run = cut_run(tmp_path / "run", 12, RuntimeError("power cut"))
    how(run.checkpoints / "step-0000000010" / name)
    reporter = Recorder()
    with pytest.warns(UserWarning, match=r"step-0000000010 is damaged .* kept as aside-step-"):
        resume(run.folder, reporter=reporter)
    assert "after step 5" in reporter.said[0]
    assert (run.checkpoints / "aside-step-0000000010").is_dir()
    assert_same(run, uncut("sgd"))


def test_where_no_checkpoint_can_be_used_the_run_is_left_alone(tmp_path):
    run = cut_run(tmp_path / "run", 8, RuntimeError("power cut"))
    damage(run.checkpoints / "step-0000000005" / "state.safetensors")
    before = run.path.read_bytes()
    refused = pytest.raises(DamagedFileError, match=r"no checkpoint in .* can be used: restore one")
    with pytest.warns(UserWarning, match="damaged"), refused:
        resume(run.folder)
    with refused:  # and it is not begun again the second time
        resume(run.folder)
    assert run.path.read_bytes() == before


def test_a_damaged_old_checkpoint_does_not_stop_a_run(tmp_path, uncut):
    class Damaging(Recorder):
        def update(self, step, facts):
            if step == 7:
                damage(Run(tmp_path / "run").checkpoints / "step-0000000005" / "checkpoint.json")

    run = train_tiny(tmp_path / "run", *SHORT, reporter=Damaging())
    assert_same(run, uncut("sgd"))


@pytest.mark.parametrize("log", ["path", "metrics"])
def test_a_log_that_lost_lines_is_refused(tmp_path, log):
    run = cut_run(tmp_path / "run", 8, RuntimeError("power cut"))
    getattr(run, log).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="no longer holds the .* bytes that were written"),
        pytest.raises(DamagedFileError),
    ):
        resume(run.folder)


def test_a_finished_run_is_left_alone(uncut):
    run, reporter = uncut("sgd"), Recorder()
    before = {f: f.stat().st_mtime_ns for f in run.folder.rglob("*")}
    resume(run.folder, reporter=reporter)
    assert reporter.said == [f"{run.folder} is finished: there is nothing to resume"]
    assert {f: f.stat().st_mtime_ns for f in run.folder.rglob("*")} == before


def test_a_run_that_was_killed_while_it_ended_ends_again(tmp_path, uncut):
    run = Run(shutil.copytree(uncut("sgd").folder, tmp_path / "run"))
    run.set_status("running")
    run.model.unlink()
    resume(run.folder)
    assert_same(run, uncut("sgd"))


def test_a_run_in_use_is_refused(tmp_path):
    run = cut_run(tmp_path / "run", 3)
    with locked(run), pytest.raises(BusyError, match="is in use by another process: wait until"):
        resume(run.folder)
    assert run.read_status()["status"] == "interrupted"


def test_the_latest_checkpoints_stay_and_the_best(tmp_path):
    more = ("epochs=8", "points=1", "keep_checkpoints=2", "checkpoint_every=0.6")
    run = train_tiny(tmp_path / "run", *SHORT, *more)
    found = sorted(f.name for f in run.checkpoints.iterdir())
    accuracies = {
        line["step"]: line["val_accuracy"]
        for line in read_lines(run.metrics)
        if line["step"] % 3 == 0  # saved every three steps, scored at the end of an epoch
    }
    best = max(accuracies, key=lambda step: (accuracies[step], step))
    assert found == sorted({f"step-{step:010d}" for step in (best, 36, 39)})


def test_a_checkpoint_in_one_process_holds_no_pickle(uncut):
    for folder in uncut("sgd").checkpoints.iterdir():
        assert {f.name for f in folder.iterdir()} == {
            *("checkpoint.json", "ranks.json", "state.safetensors"),
        }
        tensors = safetensors.torch.load_file(folder / "state.safetensors")
        assert {name.split("/")[0] for name in tensors} == {"model", "optimizer"}
        assert any(name.endswith("/v") for name in tensors)


def test_other_conditions_are_warned_about(tmp_path):
    run = cut_run(tmp_path / "run", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=rf"threads {threads} -> {threads + 1}\): its last"):
            resume(run.folder)
    finally:
        torch.set_num_threads(threads)


def test_a_second_interrupt_ends_at_once_and_tears_nothing(tmp_path, uncut):
    class Twice(Cut):
        def update(self, step, facts):
            super().update(step, facts)
            if step == self.step:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="twice"):
        train_tiny(tmp_path / "run", *SHORT, reporter=Twice(8, signal.SIGINT))
    run = Run(tmp_path / "run")
    assert run.read_status()["status"] == "interrupted"
    assert [f.name for f in run.checkpoints.iterdir()] == ["step-0000000005"]
    resume(run.folder)
    assert_same(run, uncut("sgd"))


def test_what_a_killed_process_left_half_written_is_swept(tmp_path):
    run = cut_run(tmp_path / "run", 3)
    left = [run.folder / ".status.json.abcdefgh", run.checkpoints / ".step-0000000005.abcdefgh"]
    left[0].write_text("half")
    left[1].mkdir()
    resume(run.folder)
    assert not any(file.exists() for file in left)


@pytest.mark.filterwarnings("ignore:many units are dead")
def test_a_loss_that_is_not_finite_is_met_again(tmp_path):
    run = Run(tmp_path / "run")
    more = ("optimizer.lr=1e9", "precision=float32")
    with pytest.raises(TrainingError) as first:
        train_tiny(run.folder, *SHORT, *more)
    with pytest.raises(TrainingError) as second:
        resume(run.folder)
    assert str(first.value) == str(second.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        resume(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = cut_run(tmp_path / "run", 3)
    recipe = read_json(run.recipe)
    write_json(run.recipe, {**recipe, "model": "lenet", "structure": {}})
    run.checksums.unlink()  # or the change would be found out sooner
    with pytest.raises(ValueError, match=r"another run|other tensors|does not fit"):
        resume(run.folder)


def test_times_tell_where_the_seconds_went(uncut):
    for line in read_lines(uncut("sgd").times):
        assert set(line) == {"epoch", "step", "seconds", "data", "judging", "saving"}
        assert 0 < line["data"] + line["judging"] + line["saving"] < line["seconds"]
    text = json.dumps(list(read_lines(uncut("sgd").metrics)))
    assert "seconds" not in text
