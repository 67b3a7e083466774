# SPDX-License-Identifier: Apache-2.0
"""The loop: what a run leaves behind, finished, failed, interrupted or out of space."""

import errno
import json
import math

import pytest
import safetensors.torch
import torch
from tiny import QUICK, Recorder, denormals_kept, shared_run, tiny_recipe, train_tiny
from torch.testing import assert_close

from dessilbi import Path
from dessilbi.files.runs import Run
from dessilbi.files.storage import read_lines
from dessilbi.models import build_model
from dessilbi.training.loop import TrainingError, train


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_a_run_folder_is_complete():
    run = shared_run()
    assert names(run.folder) == {
        *("checksums.json", "recipe.json", "environment.json", "init.safetensors"),
        *("model.safetensors", "early.safetensors", "metrics.jsonl", "times.jsonl"),
        *("path.jsonl", "scores.safetensors", "status.json"),
        *("checkpoints", ".lock"),
    }


def test_the_status_tells_how_a_run_ended():
    told = shared_run().read_status()
    path = Path.load(shared_run().folder)
    assert (told["status"], told["schema"], told["steps"]) == ("finished", 1, 12)
    assert told["accuracy"] == path.points[-1].metrics["accuracy"]
    assert told["density"] == path.points[-1].density
    assert told["seconds"] > 0


def test_there_is_a_line_of_metrics_per_epoch():
    lines = list(read_lines(shared_run().metrics))
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 6), (2, 12)]
    assert_close([line["time"] for line in lines], [0.6, 1.2])
    assert all(0 <= line["train_accuracy"] <= 1 and line["loss"] > 0 for line in lines)


def test_every_point_is_judged_and_the_path_grows():
    path = Path.load(shared_run().folder)
    assert [p.step for p in path.points] == [3, 6, 9, 12]
    assert [p.metrics["epoch"] for p in path.points] == [0.5, 1.0, 1.5, 2.0]
    accuracies = {"accuracy", "ticket_accuracy", "gamma_accuracy"}
    accuracies |= {"val_accuracy", "val_ticket_accuracy"}
    for point in path.points:
        assert set(point.metrics) == accuracies | {"epoch"}
        assert all(0 <= point.metrics[name] <= 1 for name in accuracies)
    assert 0 < path.points[-1].density < 1
    assert path.points[0].density < path.points[-1].density


def test_the_initialisation_is_that_of_the_seed():
    expected = build_model("lenet", num_classes=10, in_channels=1, seed=0).state_dict()
    found = safetensors.torch.load_file(shared_run().init)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_recipe_of_the_run_is_written_down(tmp_path):
    assert shared_run().read_recipe() == json.loads(tiny_recipe(tmp_path).model_dump_json())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("quick") / "run", *QUICK)


def test_the_same_seed_gives_the_same_run_to_the_bit(tmp_path, quick):
    torch.manual_seed(123)
    again = train_tiny(tmp_path / "run", *QUICK)
    for file in ("init", "model", "scores", "path", "metrics", "recipe"):
        assert getattr(again, file).read_bytes() == getattr(quick, file).read_bytes()


def test_another_seed_gives_another_run(tmp_path, quick):
    other = train_tiny(tmp_path / "run", *QUICK, "seed=1")
    assert other.init.read_bytes() != quick.init.read_bytes()
    assert other.model.read_bytes() != quick.model.read_bytes()


def test_training_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_tiny(tmp_path / "run", *QUICK, "epochs=1", "points=1")
    assert torch.equal(torch.get_rng_state(), before)


def test_training_leaves_denormals_as_they_were(tmp_path):
    with denormals_kept():
        train(tiny_recipe(tmp_path, "epochs=1", "points=1"), tmp_path / "run")
        assert (torch.tensor([1e-39]) * 1.0).item() > 0


def test_the_last_step_is_always_a_point(tmp_path):
    run = train_tiny(tmp_path / "run", *QUICK, "epochs=5", "points=3")
    assert [p.step for p in Path.load(run.folder).points] == [3, 6, 9, 10]


def test_the_reporter_hears_of_start_points_and_end(tmp_path):
    reporter = Recorder()
    train_tiny(tmp_path / "run", *QUICK, reporter=reporter)
    assert reporter.told[0][1] == 4
    assert [step for step, _ in reporter.told[1:]] == [2, 4]
    assert set(reporter.told[1][1]) == {"loss", "acc", "density"}
    assert reporter.finished == 1


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_path(tmp_path):
    reporter = Recorder()
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step (\d+): lower .* is kept$"):
        train_tiny(
            *(tmp_path / "run", *QUICK, "points=100", "epochs=20", "optimizer.lr=1e6"),
            reporter=reporter,
        )
    run = Run(tmp_path / "run")
    told = run.read_status()
    path = Path.load(run.folder)
    assert told["status"] == "failed"
    assert f"at step {path.step + 1}:" in told["reason"]
    assert len(path.points) == path.step >= 1
    assert all(math.isfinite(p.metrics["accuracy"]) for p in path.points)
    assert reporter.finished == 1
    assert not run.model.exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt("stop"), "interrupted"), (RuntimeError("broken"), "failed")],
    ids=["interrupted", "failed"],
)
def test_a_run_that_is_cut_short_says_so_and_keeps_its_path(tmp_path, error, status):
    reporter = Recorder(error)
    with pytest.raises(type(error)):
        train_tiny(tmp_path / "run", *QUICK, reporter=reporter)
    run = Run(tmp_path / "run")
    expected = {"schema": 1, "status": status, "reason": str(error)}
    assert run.read_status() == expected
    assert [p.step for p in Path.load(run.folder).points] == [2]
    assert reporter.finished == 1


def test_a_full_disk_while_the_path_is_written_keeps_what_was_there(tmp_path, monkeypatch):
    from dessilbi.path import history

    append, calls = history.append_line, []

    def full(path, value):
        calls.append(value)
        if len(calls) > 3:  # the header, a point and what was logged to it
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append(path, value)

    monkeypatch.setattr(history, "append_line", full)
    with pytest.raises(OSError, match="No space left on device"):
        train_tiny(tmp_path / "run", *QUICK)
    run = Run(tmp_path / "run")
    assert run.read_status()["status"] == "failed"
    assert "No space left" in run.read_status()["reason"]
    path = Path.load(run.folder)
    assert [p.step for p in path.points] == [2]
    assert "accuracy" in path.points[0].metrics


def test_a_disk_too_full_even_for_the_status_raises_the_first_error(tmp_path, monkeypatch):
    reporter = Recorder(RuntimeError("broken"))
    set_status = Run.set_status

    def full(self, status, **facts):
        if status != "running":
            raise OSError(errno.ENOSPC, "No space left on device")
        set_status(self, status, **facts)

    monkeypatch.setattr(Run, "set_status", full)
    with pytest.raises(RuntimeError, match="broken"):
        train_tiny(tmp_path / "run", *QUICK, reporter=reporter)


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="a run is never overwritten"):
        train_tiny(tmp_path, *QUICK)
    assert names(tmp_path) == {"mine"}


@pytest.mark.parametrize(
    ("assignment", "error", "message"),
    [
        ("model=alexnet", ValueError, "alexnet"),
        ("model=gpt", ValueError, "reads text"),
        ("model=timm:vit_tiny_patch16_22", ValueError, "did you mean"),
        ("model=timm:levit_128s", ValueError, r"not read samples of shape .1, 28, 28.* another im"),
        ("data=cifar", ValueError, "data='cifar' is not known"),
        ("validation=200", ValueError, "validation split of 200 "),
        ("data=mnist", ValueError, "mnist"),
        ("structure.conv9=filter", ValueError, "'conv9' matches no parameter"),
        ("optimizer.nesterov=true", ValueError, "nesterov=True"),
    ],
)
def test_what_cannot_be_prepared_writes_nothing(tmp_path, assignment, error, message):
    more = ("optimizer.momentum=0",) if "nesterov" in assignment else ()
    with pytest.raises(error, match=message):
        train_tiny(tmp_path / "run", *QUICK, assignment, *more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule", ["step", "cosine", "hold"])
def test_the_clock_of_the_run_is_the_schedules(tmp_path, schedule):
    from dessilbi.training.schedules import path_time

    settings = (*QUICK, "points=1", f"schedule.kind={schedule}", "schedule.milestones=[1]")
    run = train_tiny(tmp_path / "run", *settings)
    recipe = tiny_recipe(tmp_path, *settings)
    expected = path_time(recipe.schedule, recipe.optimizer.lr, 4, 2)
    assert 0 < expected <= 0.4
    assert_close(Path.load(run.folder).time, expected)
