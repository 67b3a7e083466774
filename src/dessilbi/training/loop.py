# SPDX-License-Identifier: Apache-2.0
"""The loop: a recipe becomes a run folder with the weights, the path and its metrics."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from dessilbi.files.runs import Run, TrainingError
from dessilbi.files.sealing import close_seal
from dessilbi.training.checkpoints import Checkpoint
from dessilbi.training.engine import Engine, Strategy, engine_for, num_processes
from dessilbi.training.environment import flushed_denormals
from dessilbi.training.guards import OnNan, explained, resuming
from dessilbi.training.objective import loss_of
from dessilbi.training.opening import compare, new_run, owned, watching_of
from dessilbi.training.progress import Reporter, Silent
from dessilbi.training.randomness import seeded
from dessilbi.training.recipes import Recipe, validate_recipe
from dessilbi.training.session import Session, find_checkpoint
from dessilbi.training.setting import Setting, prepare
from dessilbi.training.starting import Start, load_start
from dessilbi.training.stopping import Stop, stoppable
from dessilbi.training.watching import Tracker, Watching, check_tensorboard

__all__ = ["TrainingError", "resume", "train"]


def fit(session: Session, stop: Stop) -> bool:
    """Train from where the session stands; return whether the end was reached, or enough found."""
    session.setting.module.train()  # asked of the session each time: a network may grow
    session.settle()  # what the checkpoint left open
    while not session.ended():
        for inputs, targets in session.batches():
            session.setting.set_lr(session.position.step)
            step(session, inputs, targets)
            if session.after_step(stop):
                return False
            if session.ended():
                break
    return True


def step(session: Session, inputs: Tensor, targets: Tensor) -> None:
    """Take one optimizer step on one batch, in as many pieces as the recipe says."""
    setting, engine, totals = session.setting, session.engine, session.totals
    recipe, module = setting.recipe, setting.module
    session.guard.begin()
    setting.stepper.zero_grad()
    parts = inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate)
    left = len(parts[0])
    for given, wanted in zip(*parts, strict=True):
        left -= 1
        with engine.unsynchronised(module, when=left > 0):
            outputs = module(given)
            loss = loss_of(outputs, wanted)
            totals.add(loss, outputs, wanted)
            session.guard.check_loss()
            engine.backward(loss * (len(wanted) / len(targets)))
    if not session.guard.passes():
        return
    if recipe.clip_norm is not None:
        engine.clip(module, setting.stepper, recipe.clip_norm)
    setting.stepper.step()


def train(
    recipe: Recipe,
    out: str | FilePath | None = None,
    *,
    data_root: str | FilePath | None = None,
    download: bool = False,
    reporter: Reporter | None = None,
    device: str = "auto",
    strategy: Strategy | None = None,
    trackers: Sequence[Tracker] = (),
    draw: bool = False,
    start: Start | None = None,
) -> Run:
    """Train a recipe and return its run folder.

    Args:
        recipe: What to train.
        out: The run folder; it must not hold files. By default the first free one under "runs".
        data_root: Folder of the data sets in torchvision's layout.
        download: Fetch missing data.
        reporter: Hears of the progress.
        device: "auto", "cpu", "cuda" or "mps".
        strategy: How the processes that torchrun started share the work: "ddp" or "fsdp2".
        trackers: Hear of every value; any logger of Lightning will do.
        draw: Also write curves for TensorBoard into the run folder.
        start: What to begin with instead of a fresh model.

    Raises:
        ValueError, FileNotFoundError, ImportError: As :func:`prepare`; nothing has been written.
        FileExistsError: ``out`` holds files.
        TrainingError: The loss is not finite.
        OSError: The disk is full or not writable; what was written stays.

    A :class:`TrainingError` also says that memory ran out, or that another process has died.
    """
    if draw:
        check_tensorboard()
    with engine_for(recipe.precision, device=device, strategy=strategy) as engine:
        with explained(recipe, engine):
            setting = prepare(recipe, engine, data_root=data_root, download=download, start=start)
        run = engine.on_first(lambda: new_run(setting, out, data_root))
        with owned(run, engine):
            watching = watching_of(run, engine, reporter, trackers, draw=draw, step=0)
            _go(setting, engine, watching, None)
    return run


def resume(
    folder: str | FilePath,
    *,
    data_root: str | FilePath | None = None,
    reporter: Reporter | None = None,
    device: str | None = None,
    strategy: Strategy | None = None,
    trackers: Sequence[Tracker] = (),
    draw: bool = False,
    on_nan: OnNan | None = None,
    trust_checkpoint: bool = False,
) -> Run:
    """Go on with a run from its newest checkpoint, or from its beginning if it has none.

    On the same machine the outcome is the same to the bit as if it had never been cut. Arguments
    are those of :func:`train`; the device is by default that of the run. ``data_root`` must be
    given again where the data are files: nothing outside of a run folder is read on its word.

    Args:
        folder: The run folder.
        data_root: See :func:`train`.
        reporter: See :func:`train`.
        device: See :func:`train`.
        strategy: See :func:`train`.
        trackers: See :func:`train`.
        draw: See :func:`train`.
        on_nan: From here on do this where loss or gradient is not finite: "stop" or "skip".
        trust_checkpoint: Allow a checkpoint of strategy "fsdp2", which is read with pickle and can
            execute code: only for folders of your own.

    Raises:
        FileNotFoundError: The folder is no run folder.
        ValueError: A file of it is damaged, or its checkpoint needs to be trusted.
        BusyError: Another process works on it.
        TrainingError, OSError: As :func:`train`.
    """
    run = Run(FilePath(folder))
    recipe = validate_recipe(run.read_recipe(), origin=str(run.recipe))
    before, start = run.read_environment(), load_start(run)
    if draw:
        check_tensorboard()
    reporter, trained_on = reporter or Silent(), before.get("engine")
    trained_on = trained_on if isinstance(trained_on, dict) else {}  # of another release
    if _is_finished(run):
        reporter.say(f"{run.folder} is finished: there is nothing to resume")
        return run
    device = device or trained_on.get("device", "auto")
    if num_processes() > 1:
        strategy = strategy or trained_on.get("strategy")
    with (
        engine_for(recipe.precision, device=device, strategy=strategy) as engine,
        owned(run, engine),
    ):
        if engine.on_first(lambda: _is_finished(run)):  # while we waited for the lock
            return run
        with explained(recipe, engine):
            setting = prepare(recipe, engine, data_root=data_root, start=start)
        checkpoint = engine.on_first(lambda: find_checkpoint(run, engine, trusted=trust_checkpoint))
        done = checkpoint.step if checkpoint else 0
        watching = watching_of(run, engine, reporter, trackers, draw=draw, step=done)
        watching.reporter.say(f"resuming {run.folder} after step {done}")
        if checkpoint is not None and engine.first:
            compare(checkpoint.facts["engine"], setting.facts)
        _go(setting, engine, watching, checkpoint, on_nan)
    return run


def _go(
    setting: Setting,
    engine: Engine,
    watching: Watching,
    checkpoint: Checkpoint | None,
    on_nan: OnNan | None = None,
) -> None:
    """Train, and write down how it ended; a signal that ended it is passed on at last."""
    recipe, run, status = setting.recipe, watching.run, "running"
    with stoppable() as stop:
        try:
            _set_status(run, engine, status)
            with (
                explained(recipe, engine),
                flushed_denormals(),
                seeded((recipe.seed_of_order, engine.rank), engine.device),
            ):
                session = Session(setting, engine, watching, checkpoint, on_nan)
                upto = "up to " if recipe.grow else ""
                told = f"{recipe.longest} epochs, {setting.total_steps:,} steps"
                title = f"{recipe.name}: {upto}{told}"
                done = session.position.step
                watching.reporter.start(f"{title} -> {run.folder}", setting.total_steps, done)
                if setting.steering is not None:
                    watching.reporter.say(setting.steering.describe())
                finished = fit(session, stop)
                facts = session.finish() if finished else {"step": session.position.step}
                if finished and engine.first:
                    close_seal(run.folder, run.final_files)
            status = "finished" if finished else "interrupted"
            _set_status(run, engine, status, **facts)
            if not finished:
                told = f"saved after step {session.position.step}"
                watching.reporter.say(f"{told}; go on with: {resuming(run, setting.data)}")
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(OSError):
                _set_status(run, engine, status, reason=str(error))
            if isinstance(error, OSError | ValueError):
                again = resuming(run, setting.data)
                error.add_note(f"what was saved is kept, go on with: {again}")
            raise
        finally:
            watching.close(status)


def _is_finished(run: Run) -> bool:
    return bool(run.read_status()["status"] == "finished")


def _set_status(run: Run, engine: Engine, status: str, **facts: Any) -> None:
    if engine.first:
        run.set_status(status, **facts)
