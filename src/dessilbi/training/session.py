# SPDX-License-Identifier: Apache-2.0
"""Session: one stretch of a run, from its beginning or a checkpoint to its end or the next stop.

It holds what the loop moves, and does what is due between steps: judging points, closing epochs,
saving. What it saves is all that decides the rest of the run, so that the rest is the same to the
bit however often the run is cut.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
from torch import Tensor

from dessilbi.files.runs import Run
from dessilbi.files.sealing import add_to_seal, reopen_seal
from dessilbi.files.storage import (
    DamagedFileError,
    append_line,
    check_begins,
    check_unlinked,
    cut_back,
    length_of,
    sweep,
    write_atomic,
)
from dessilbi.path.history import History
from dessilbi.training.checkpoints import Checkpoint, Checkpoints, usable
from dessilbi.training.engine import Engine
from dessilbi.training.growing import Growing
from dessilbi.training.guards import Guard, OnNan
from dessilbi.training.position import Clock, Position, Totals, position_of
from dessilbi.training.randomness import random_states, set_random_states
from dessilbi.training.setting import Setting
from dessilbi.training.state import restore, templates, tensors_of, whole
from dessilbi.training.stopping import Stop
from dessilbi.training.tracing import PathTrace, trace_of
from dessilbi.training.watching import Watching

PATIENCE = 10  # steps between questions that all processes, or an accelerator, must answer


class Session:
    """What one stretch of a run works on; every process makes one.

    Args:
        setting: The recipe made real.
        engine: Where it computes.
        watching: Who hears of it, and the run folder.
        checkpoint: Where to go on from; None: the beginning.
        on_nan: In place of what the checkpoint or the recipe says; kept in checkpoints from now on.
    """

    def __init__(
        self,
        setting: Setting,
        engine: Engine,
        watching: Watching,
        checkpoint: Checkpoint | None,
        on_nan: OnNan | None = None,
    ):
        recipe, run = setting.recipe, watching.run
        self.growing = Growing(setting, engine) if recipe.grow else None
        if self.growing and checkpoint is not None:
            setting = self.growing.restore(setting, checkpoint.facts["growing"])
        elif self.growing:
            append_line(run.growth, self.growing.start())
        self.setting, self.engine, self.run, self.watching = setting, engine, run, watching
        self.checkpoints = Checkpoints(run.checkpoints, engine, keep=recipe.keep_checkpoints)
        self.clock, self.totals, self.position = Clock(), Totals(engine.device), Position()
        self.on_nan: OnNan = on_nan or _said(checkpoint) or recipe.on_nan
        with usable(checkpoint):
            told = checkpoint.facts.get("steering") if checkpoint else None  # older ones had none
            if told and setting.steering is not None:
                setting.steering.load_state_dict(told)
            self.trace = trace_of(setting, engine, watching, self.clock, checkpoint)
            if checkpoint is not None:
                self._restore(checkpoint)
        self.judge = self.trace.judge
        self._began = time.monotonic() - self.position.seconds
        self._save_every = max(1, round(recipe.checkpoint_every * setting.steps_per_epoch))
        self._early = max(1, round(recipe.rewind_at * setting.steps_per_epoch))
        self.guard = Guard(
            setting,
            engine,
            self.totals,
            self.position,
            run=run,
            checkpoints=self.checkpoints,
            on_nan=self.on_nan,
        )

    @property
    def _samples(self) -> list[int]:
        data = self.setting.data
        return [len(data.train), len(data.validation), len(data.test)]

    def _restore(self, checkpoint: Checkpoint) -> None:
        if (before := checkpoint.facts.get("samples", self._samples)) != self._samples:
            raise ValueError(
                f"the data has {self._samples} samples to train, choose and test with, and had "
                f"{before} when {checkpoint.folder} was saved: put back what it had"
            )
        model, optimizer = self.setting.model, self.setting.optimizer
        tensors = checkpoint.tensors(lambda listed: templates(model, optimizer, listed))
        restore(model, optimizer, tensors)
        self.position = position_of(checkpoint.facts["position"])
        if self.position.step:
            self.setting.set_lr(self.position.step - 1)  # told where an epoch is closed only now
        if self.engine.scaler is not None and checkpoint.facts["scaler"]:
            self.engine.scaler.load_state_dict(checkpoint.facts["scaler"])
        ranks = checkpoint.ranks
        if len(ranks) == self.engine.world_size:
            self.totals.set(**ranks[self.engine.rank]["totals"])
            set_random_states(ranks[self.engine.rank]["random"], self.engine.device)
        elif self.engine.first:
            parts = [rank["totals"]["sums"] for rank in ranks]
            self.totals.set([sum(part) for part in zip(*parts, strict=True)], loss=0.0)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of the batches that are left of the epoch."""
        recipe, position = self.setting.recipe, self.position
        left = self.setting.data.train.batches(
            position.epoch,
            batch_size=recipe.batch_size,
            seed=recipe.seed_of_order,
            start=position.batch,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            device=self.engine.device,
        )
        return self.clock.waiting("data", left)

    def after_step(self, stop: Stop) -> bool:
        """Do what is due after a step; return whether the run is to stop here.

        Who stops a run does not wait for judging: it is done when the run goes on.
        """
        self.position.step += 1
        self.position.batch += 1
        if self.position.step == self._early:
            self._keep_early()
        to_save = self.position.step % self._save_every == 0
        to_look = self.guard.watchful or self.position.step % PATIENCE == 0
        asked = (to_look or to_save or self._epoch_is_over) and self._look_around(stop)
        if not asked and self.settle():
            asked = self._look_around(stop)
        if asked or to_save:
            self.save()
        return asked

    def settle(self) -> bool:
        """Judge the point and close the epoch that the latest step completed; return if it did."""
        due = self._epoch_is_over
        if self.trace.look(self.totals):
            due = True
        setting = self.setting
        if setting.steering is not None:
            setting.steering.look(self.position.step, setting.model, setting.data, self.engine)
        if self._epoch_is_over:
            self._close_epoch()
        return due

    def ended(self) -> bool:
        """Whether all epochs are over, or a run that may stop before that has found its ticket."""
        return self._last_epoch_is_over or self.trace.settled is not None

    def _keep_early(self) -> None:
        """Keep the weights to rewind to; a run that grows, or has no path, is not rewound."""
        if isinstance(self.trace, PathTrace) and self.growing is None:
            with self.clock.of("saving"):
                weights = whole(self.setting.model.state_dict())
                if self.engine.first:
                    write_atomic(self.run.early, safetensors.torch.save(weights))
                    add_to_seal(self.run.early)

    @property
    def _last_epoch_is_over(self) -> bool:
        """Whether all epochs are over: where the network grows, those after it has grown."""
        setting, epoch = self.setting, self.position.epoch
        if setting.final_from is None:
            return False
        return epoch >= setting.final_from // setting.steps_per_epoch + setting.recipe.epochs

    @property
    def _epoch_is_over(self) -> bool:
        return self.position.batch == self.setting.steps_per_epoch

    def _look_around(self, stop: Stop) -> bool:
        """Agree with all processes on whether somebody asked to stop, and that losses are sound."""
        asked, broken = self.engine.any(stop.asked, not (self.guard.watchful or self.totals.finite))
        if broken:
            self.guard.refuse(f"the loss is {self.totals.loss}")
        if asked:
            stop.tell()
        return asked

    def _close_epoch(self) -> None:
        """Write down what an epoch came to, and begin the next."""
        position, trace = self.position, self.trace
        with self.clock.of("judging"):
            validation = self.judge.validation(trace.step)
        loss, correct, answers = self.engine.totals(self.totals.read())
        whole_epoch = self._epoch_is_over
        position.epoch, position.batch = position.epoch + 1, 0
        epoch = position.epoch if whole_epoch else position.step / self.setting.steps_per_epoch
        mean = loss / answers if answers else math.nan  # every step was passed over
        steering = self.setting.steering
        if steering is not None and whole_epoch:
            steering.hear(position.epoch, mean, first=self.engine.first)
        place = {"epoch": epoch, "step": trace.step}
        metrics = {
            "time": trace.time,
            "loss": mean,
            "train_accuracy": correct / answers if answers else math.nan,
            "val_accuracy": validation,
            "lr": float(self.setting.optimizer.param_groups[0]["lr"]),
        } | (steering.metrics() if steering is not None else {})
        if self.on_nan == "skip":
            metrics["skipped"], position.skipped = position.skipped, 0
        times = {name: round(seconds, 4) for name, seconds in self.clock.lap().items()}
        self.watching.epoch(place | metrics, place | times)
        self.totals.clear()
        if self.growing and self.growing.is_due(position.epoch):
            self._change_sizes(self.growing, validation)

    def _change_sizes(self, growing: Growing, validation: float) -> None:
        """Let the network grow where its support asks for it, and write down its sizes."""
        epoch = self.position.epoch
        trace = self.trace
        assert isinstance(trace, PathTrace)  # what grows has a structure
        setting, line = growing.check(self.setting, trace.path, epoch=epoch, accuracy=validation)
        self.setting = self.guard.setting = setting
        trace.follow(setting)
        append_line(self.run.growth, line)
        told = ", ".join(f"{name} {width}" for name, width in line["sizes"].items())
        self.watching.reporter.say(f"after epoch {epoch}: {told}")

    def save(self) -> None:
        """Write a checkpoint; what the logs hold by now belongs to it."""
        with self.clock.of("saving"):
            engine, setting = self.engine, self.setting
            tensors = tensors_of(setting.model, setting.optimizer)
            self.guard.check_state(tensors)
            self.position.seconds = time.monotonic() - self._began
            totals = {"sums": self.totals.read(), "loss": self.totals.loss}
            own = {"random": random_states(engine.device), "totals": totals}
            ranks = engine.gather(own)
            score = self.judge.validation(self.trace.step) if self.position.batch == 0 else None
            facts: dict[str, Any] = {
                "step": self.position.step,
                "score": score,
                "position": asdict(self.position),
                **self.trace.facts(),
                "engine": setting.facts,
                "steering": setting.steering.state_dict() if setting.steering else None,
                "on_nan": self.on_nan,
                "samples": self._samples,
                "growing": self.growing.state_dict() if self.growing else None,
                "scaler": engine.scaler.state_dict() if engine.scaler is not None else None,
            }
            if engine.first:
                facts["logs"] = {log.name: length_of(log) for log in logs_of(self.run)}
            self.checkpoints.save(tensors, facts, ranks)

    def finish(self) -> dict[str, Any]:
        """Judge the end, write the final files, and return the outcome."""
        if self.position.batch:  # stopped inside an epoch
            self._close_epoch()
        if self.setting.steering is not None:
            self.setting.steering.finish()
        told = self.trace.finish(self.totals)
        weights = whole(self.setting.model.state_dict())
        if self.engine.first:
            write_atomic(self.run.model, safetensors.torch.save(weights))
        seconds = time.monotonic() - self._began
        told |= self._grown() | self._stopped()
        return {"steps": self.trace.step, "seconds": seconds, **told}

    def _grown(self) -> dict[str, Any]:
        """What a run that grows says of its end; a line of its log tells it, too."""
        if self.growing is None:
            return {}
        step = self.trace.step
        place = {"epoch": self.position.epoch, "step": step}
        line = self.growing.finish(self.setting, **place, accuracy=self.judge.validation(step))
        append_line(self.run.growth, line)
        return {"training_macs": line["training_macs"]}

    def _stopped(self) -> dict[str, Any]:
        """What a run that was to stop by itself says of it."""
        if self.setting.recipe.stop is None:
            return {}
        found, setting = self.trace.settled, self.setting
        epochs = self.position.step / setting.steps_per_epoch
        told = {"epochs": epochs, "epochs_saved": setting.recipe.epochs - epochs}
        return told | {"settled": asdict(found) if found is not None else None}


def find_checkpoint(run: Run, engine: Engine, *, trusted: bool = False) -> Checkpoint | None:
    """Bring a run folder back to its newest checkpoint, or to its beginning, and return it.

    Only the process with the lock may call this: logs are cut back to where the checkpoint was
    saved, and what killed processes left half-written is removed.

    Args:
        run: The run.
        engine: Where it computes.
        trusted: Whether a checkpoint may be read with pickle.

    Raises:
        DamagedFileError: There are checkpoints, but none can be used, or the folder holds links.
        UntrustedError: The checkpoint is read with pickle, and that is not allowed.
    """

    def fits(checkpoint: Checkpoint) -> None:
        check_logs(run, checkpoint)
        for log in logs_of(run):
            cut_back(log, checkpoint.facts["logs"][log.name]["bytes"])
        if (file := checkpoint.facts["path"].get("file")) is not None:  # else there is no path
            cut_back(run.path, file["bytes"])

    check_unlinked(run.folder)
    store = Checkpoints(run.checkpoints, engine, keep=1)
    store.sweep()
    reopen_seal(run.folder)
    sweep(run.folder, [f.name for f in (*run.final_files, run.early, run.status, run.checksums)])
    checkpoint = store.newest(fits, trusted=trusted)
    if checkpoint is None:
        for file in (run.metrics, run.times, run.path, run.growth):
            file.unlink(missing_ok=True)
    return checkpoint


def _said(checkpoint: Checkpoint | None) -> OnNan | None:
    said: OnNan | None = checkpoint.facts.get("on_nan") if checkpoint else None
    return said


def logs_of(run: Run) -> tuple[FilePath, ...]:
    """Return the logs whose lengths a checkpoint keeps."""
    return run.metrics, run.times, *([run.growth] if run.growth.is_file() else [])


def check_logs(run: Run, checkpoint: Checkpoint) -> None:
    """Check that the logs hold what was written until a checkpoint was saved.

    Raises:
        DamagedFileError: They do not, or the checkpoint does not say it as it should.
    """
    try:
        for log in logs_of(run):
            length = checkpoint.facts["logs"][log.name]
            check_begins(log, int(length["bytes"]), int(length["crc"]))
        if (file := checkpoint.facts["path"].get("file")) is not None:  # else there is no path
            History.check_position(run.path, file)
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"the checkpoint {checkpoint.folder} lacks {error}") from None
