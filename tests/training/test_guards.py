# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite, memory that runs out, processes that die: one sentence, all kept."""

import math
import os
import shutil
import signal
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from tiny import FEW, Recorder, denormals_kept, train_tiny
from torch import nn

from dessilbi import Path
from dessilbi.files.runs import Run, TrainingError
from dessilbi.files.storage import read_lines
from dessilbi.models import IMAGE_MODELS, MODELS
from dessilbi.training import guards, loop
from dessilbi.training.data import DATA_SETS, load_data
from dessilbi.training.guards import resuming

# 5 steps an epoch, 15 in all; a checkpoint at the end of each epoch.
SHORT = (
    *("data=few", "model=frail", "validation=100", "batch_size=20", "epochs=3", "points=15"),
    *("optimizer.lam=0.02", "optimizer.nu=0.5", "judged=3"),
    *('structure={"1.weight" = "filter"}',),
)


class Frail(nn.Sequential):
    """Gives NaN, or something else that is wrong, in the training steps that are named."""

    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.last = nn.Linear(8, num_classes)

    def forward(self, x):
        out = super().forward(x)
        return out if Frail.step is None else Frail.harm(Frail.step, out)

    step = None

    @staticmethod
    def harm(step, out):
        return out


@pytest.fixture(autouse=True)
def _frail_model(monkeypatch):
    taken = loop.step

    def counted(session, inputs, targets):
        Frail.step = session.position.step + 1
        taken(session, inputs, targets)
        Frail.step = None

    monkeypatch.setattr(Frail, "step", None)
    monkeypatch.setattr(loop, "step", counted)
    with (
        patch.dict(MODELS, frail=Frail),
        patch.dict(IMAGE_MODELS, frail=Frail),
        patch.dict(DATA_SETS, few=FEW),
    ):
        yield


def nan_loss(*steps):
    return lambda step, out: out * math.nan if step in steps else out


class _Bad(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def bad_gradient(*steps):
    return lambda step, out: _Bad.apply(out) if step in steps else out


def harmed(monkeypatch, harm):
    monkeypatch.setattr(Frail, "harm", staticmethod(harm))
    monkeypatch.setattr(Frail, "step", None)


def resume(folder, **options):
    with denormals_kept():
        return loop.resume(folder, **options)


@pytest.mark.parametrize(
    ("harm", "what"),
    [(nan_loss(8), "the loss is nan"), (bad_gradient(8), r"the gradient is not finite \(the loss")],
    ids=["loss", "gradient"],
)
def test_a_number_that_is_not_finite_stops_the_run_at_its_step(tmp_path, monkeypatch, harm, what):
    harmed(monkeypatch, harm)
    run = Run(tmp_path / "run")
    advice = (
        rf"{what}.* at step 8: lower optimizer.lr .* go on from the last good checkpoint "
        rf"\(step-0000000005\) and pass over such batches with: dessilbi train --resume "
        rf"{run.folder} --on-nan skip"
    )
    with pytest.raises(TrainingError, match=advice):
        train_tiny(run.folder, *SHORT)
    assert Path.load(run.folder).points[-1].step == 7
    saved = run.checkpoints / "step-0000000005" / "state.safetensors"
    assert all(t.isfinite().all() for t in safetensors.torch.load_file(saved).values())


@pytest.mark.parametrize("harm", [nan_loss(3, 8, 9), bad_gradient(3, 8, 9)], ids=["loss", "grad"])
def test_steps_that_are_not_finite_are_passed_over_and_counted(tmp_path, monkeypatch, harm):
    harmed(monkeypatch, harm)
    run = train_tiny(tmp_path / "run", *SHORT, "on_nan=skip")
    assert [line["skipped"] for line in read_lines(run.metrics)] == [1, 2, 0]
    assert all(math.isfinite(line["loss"]) for line in read_lines(run.metrics))
    assert Path.load(run.folder).step == 12
    weights = safetensors.torch.load_file(run.model)
    assert all(t.isfinite().all() for t in weights.values())
    assert int(weights["2.num_batches_tracked"]) == 12


def test_a_step_that_is_passed_over_changes_nothing(tmp_path, monkeypatch):
    """Two runs that differ in what a step would have done are the same to the bit."""
    ends = []
    for number, harm in enumerate((nan_loss(4), bad_gradient(4))):
        harmed(monkeypatch, harm)
        ends.append(train_tiny(tmp_path / f"run-{number}", *SHORT, "on_nan=skip"))
    for name in ("model", "scores", "path", "metrics"):
        assert getattr(ends[0], name).read_bytes() == getattr(ends[1], name).read_bytes(), name


def test_a_run_that_passes_over_steps_and_is_cut_ends_as_if_it_never_was(tmp_path, monkeypatch):
    harm = nan_loss(3, 8, 9)
    harmed(monkeypatch, harm)
    whole = train_tiny(tmp_path / "whole", *SHORT, "on_nan=skip")
    harmed(monkeypatch, harm)

    class Cut(Recorder):
        def update(self, step, facts):
            if step == 7:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", *SHORT, "on_nan=skip", reporter=Cut())
    run = resume(tmp_path / "run")
    for name in ("model", "scores", "path", "metrics"):
        assert getattr(run, name).read_bytes() == getattr(whole, name).read_bytes(), name
    last = "checkpoints/step-0000000015/state.safetensors"
    assert (run.folder / last).read_bytes() == (whole.folder / last).read_bytes()


def test_a_run_that_stopped_goes_on_without_the_step(tmp_path, monkeypatch):
    harmed(monkeypatch, nan_loss(8))
    with pytest.raises(TrainingError):
        train_tiny(tmp_path / "run", *SHORT)
    monkeypatch.setattr(Frail, "step", None)
    run = resume(tmp_path / "run", on_nan="skip")
    assert run.read_status()["status"] == "finished"
    assert [line.get("skipped") for line in read_lines(run.metrics)] == [None, 1, 0]


def test_a_run_that_passes_over_everything_ends_after_all(tmp_path, monkeypatch):
    harmed(monkeypatch, lambda step, out: out * math.nan if step > 6 else out)
    monkeypatch.setattr(guards, "MOST", 8)
    with pytest.raises(TrainingError, match="8 steps in a row had no finite loss and gradient"):
        train_tiny(tmp_path / "run", *SHORT, "on_nan=skip")
    told = list(read_lines(Run(tmp_path / "run").metrics))
    assert [line["skipped"] for line in told] == [0, 4]


def test_an_epoch_without_a_single_step_has_no_loss(tmp_path, monkeypatch):
    harmed(monkeypatch, lambda step, out: out * math.nan if 5 < step <= 10 else out)
    run = train_tiny(tmp_path / "run", *SHORT, "on_nan=skip")
    assert [line["loss"] == "nan" for line in read_lines(run.metrics)] == [False, True, False]


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    taken = loop.step

    def spoiled(session, inputs, targets):
        taken(session, inputs, targets)
        if session.position.step == 9:  # the next checkpoint is due
            with torch.no_grad():
                session.setting.model.last.weight[0, 0] = math.inf

    monkeypatch.setattr(loop, "step", spoiled)
    with pytest.raises(TrainingError, match=r"model/last.weight is not finite .*step-0000000005"):
        train_tiny(tmp_path / "run", *SHORT)
    assert [f.name for f in Run(tmp_path / "run").checkpoints.iterdir()] == ["step-0000000005"]


ERRORS = {
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore ..."),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_memory_that_runs_out_is_one_sentence_and_the_run_goes_on(tmp_path, monkeypatch, kind):
    def fail(step, out):
        if step == 8:
            raise ERRORS[kind]
        return out

    harmed(monkeypatch, fail)
    advice = r"memory ran out with batch_size=20 in 1 piece \(float32\): try accumulate=2, batch"
    with pytest.raises(TrainingError, match=advice) as found:
        train_tiny(tmp_path / "run", *SHORT)
    assert "\n" not in str(found.value)
    harmed(monkeypatch, nan_loss())
    run = resume(tmp_path / "run")
    whole = train_tiny(tmp_path / "whole", *SHORT)
    assert run.model.read_bytes() == whole.model.read_bytes()


def test_any_other_error_keeps_its_kind(tmp_path, monkeypatch):
    def fail(step, out):
        raise RuntimeError("a bug")

    harmed(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train_tiny(tmp_path / "run", *SHORT)


# folders of images

IMAGES = (
    *("data=folder:pictures", "image_size=8", "validation=4", "batch_size=4", "epochs=2"),
    *("points=4", "judged=1", "structure={}", "model=small", "checkpoint_every=0.5"),
)


@pytest.fixture
def pictures(tmp_path):
    pytest.importorskip("torchvision")
    from PIL import Image

    drawn = torch.Generator().manual_seed(0)
    for part, count in (("train", 10), ("val", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / "pictures" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                image = torch.randint(256, (3, 10, 10), generator=drawn, dtype=torch.uint8)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    with patch.dict(MODELS, small=small), patch.dict(IMAGE_MODELS, small=small):
        yield tmp_path / "data"


def small(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, num_classes))


class After(Recorder):
    """Does something when it hears of a step."""

    def __init__(self, step, what):
        super().__init__()
        self.step, self.what = step, what

    def update(self, step, facts):
        if step == self.step:
            self.what()


def test_an_image_that_vanishes_is_one_sentence_and_the_run_goes_on_when_it_is_back(
    tmp_path, pictures
):
    away = tmp_path / "away"
    whole = train_tiny(tmp_path / "whole", *IMAGES, "workers=0", data_root=pictures)

    def vanish():
        shutil.move(pictures / "pictures" / "train", away)

    options = {"data_root": pictures, "reporter": After(2, vanish)}
    with pytest.raises(ValueError, match=r"\.png is not there any more: put it back") as found:
        train_tiny(tmp_path / "run", *IMAGES, "workers=0", **options)
    again = f"go on with: dessilbi train --resume {tmp_path / 'run'} --data {pictures}"
    assert found.value.__notes__[0].endswith(again)
    shutil.move(away, pictures / "pictures" / "train")
    run = resume(tmp_path / "run", data_root=pictures)
    assert run.model.read_bytes() == whole.model.read_bytes()


@pytest.mark.parametrize("name", ["digits", "generated:mnist"])
def test_the_command_to_go_on_with_names_no_data_where_none_are_read(name):
    data = load_data(name, root="data", validation=9, seed=0)
    assert resuming(Run("my runs/a"), data) == "dessilbi train --resume 'my runs/a'"


def test_a_run_does_not_go_on_with_other_samples(tmp_path, pictures):
    with pytest.raises(KeyboardInterrupt):
        train_tiny(
            *(tmp_path / "run", *IMAGES, "workers=0"),
            data_root=pictures,
            reporter=After(2, lambda: signal.raise_signal(signal.SIGINT)),
        )
    (pictures / "pictures" / "val" / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"the data has \[16, 4, 7\] samples .* had \[16, 4, 8\]"):
        resume(tmp_path / "run", data_root=pictures)


def test_a_worker_that_dies_is_one_sentence(tmp_path, pictures):
    from dessilbi.training.data import folders

    class Deadly(folders._Decoded):
        def __getitem__(self, key):
            os.kill(os.getpid(), signal.SIGKILL)

    def only_in_a_worker(loader):
        loader.dataset.__class__ = Deadly
        return alive(loader)

    alive = folders._alive
    with patch.object(folders, "_alive", only_in_a_worker):
        advice = "a process that decodes images died .* set workers=0 or fewer"
        with pytest.raises(ChildProcessError, match=advice):
            train_tiny(tmp_path / "run", *IMAGES, "workers=1", data_root=pictures)


def test_torchrun_begins_again_and_the_run_goes_on(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from dessilbi.cli import app

    def call(*arguments):
        with denormals_kept():
            return CliRunner().invoke(app, ["train", *map(str, arguments)])

    sets = [part for s in SHORT if "structure" not in s for part in ("--set", s)]
    recipe = ["digits-lenet", *sets, "--set", "structure={}", "--out", tmp_path / "run"]
    with pytest.raises(KeyboardInterrupt):
        train_until_step_3(tmp_path, recipe)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    told = call(*recipe, "--set", "epochs=2")
    assert told.exit_code == 2
    assert "is the run of another recipe" in told.stderr
    told = call(*recipe[:-2])
    assert "name one with --out, and it goes on by itself" in told.stderr
    told = call(*recipe)
    assert told.exit_code == 0, told.output
    assert "resuming" in told.stderr
    assert Run(tmp_path / "run").read_status()["status"] == "finished"


def train_until_step_3(folder, recipe):
    from dessilbi.training.recipes import load_recipe

    chosen = load_recipe(recipe[0], [a for a in recipe[1:-2] if a != "--set"])
    with denormals_kept():
        stop = After(3, lambda: signal.raise_signal(signal.SIGINT))
        loop.train(chosen, folder / "run", reporter=stop)
