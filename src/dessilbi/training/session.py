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

from dessilbi.history import History
from dessilbi.monitors import coupling_gap
from dessilbi.path import Path
from dessilbi.runs import Run
from dessilbi.scores import save_scores
from dessilbi.sealing import reopen_seal
from dessilbi.storage import (
    DamagedFileError,
    check_begins,
    check_unlinked,
    cut_back,
    length_of,
    sweep,
    write_atomic,
)
from dessilbi.training.checkpoints import Checkpoint, Checkpoints, usable
from dessilbi.training.engine import Engine
from dessilbi.training.guards import Guard, OnNan
from dessilbi.training.judging import Judge
from dessilbi.training.position import Clock, Position, Totals, position_of
from dessilbi.training.randomness import random_states, set_random_states
from dessilbi.training.setting import Setting
from dessilbi.training.state import restore, templates, tensors_of, whole
from dessilbi.training.stopping import Stop
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
        self.setting, self.engine, self.run, self.watching = setting, engine, run, watching
        self.judge = Judge(setting, engine)
        self.checkpoints = Checkpoints(run.checkpoints, engine, keep=recipe.keep_checkpoints)
        self.clock, self.totals, self.position = Clock(), Totals(engine.device), Position()
        self.on_nan: OnNan = on_nan or _said(checkpoint) or recipe.on_nan
        with usable(checkpoint):
            if (
                checkpoint is not None and "steering" in checkpoint.facts
            ):  # else of an older version
                setting.steering.load_state_dict(checkpoint.facts["steering"])
            self.path = Path(
                setting.optimizer,
                every=self.judge.every,
                total_time=setting.total_time,
                file=run.path if engine.first else None,
                resume=checkpoint.facts["path"] if checkpoint else None,
            )
            if checkpoint is not None:
                self._restore(checkpoint)
            self._seen = int(checkpoint.facts["seen"]) if checkpoint else 0  # latest point told of
        self._told: dict[str, float] = {}
        self._began = time.monotonic() - self.position.seconds
        self._save_every = max(1, round(recipe.checkpoint_every * setting.steps_per_epoch))
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
            seed=recipe.seed,
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
        path, due = self.path, self._epoch_is_over
        if path.step % self.judge.every == 0 and path.step != self._seen:
            self._at_point()
            due = True
        setting = self.setting
        setting.steering.look(self.position.step, setting.model, setting.data, self.engine)
        if self._epoch_is_over:
            self._close_epoch()
        return due

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

    def _at_point(self, *, final: bool = False) -> None:
        """Judge the point that was just recorded, if it is one to judge, and tell."""
        path, optimizer = self.path, self.setting.optimizer
        self._seen = path.step
        facts: dict[str, float] = {"epoch": path.step / self.setting.steps_per_epoch}
        if final or self.judge.wants(path.step):
            with self.clock.of("judging"):
                facts |= self.judge.at_point(path.step)
            self._told["acc"] = facts["val_accuracy"]
        path.log(**facts)
        self._told |= {"loss": self.totals.loss, "density": path.points[-1].density}
        curves: dict[str, float] = {}
        if self.engine.any(bool(self.watching.trackers))[0]:
            curves = {name: value for name, value in facts.items() if "accuracy" in name}
            curves = {f"accuracy/{name}": value for name, value in curves.items()}
            layers = path.support(step=path.step).densities()
            curves |= {f"density/{name}": value for name, value in layers.items()}
            curves |= {"density": self._told["density"], "path_time": path.time}
            curves |= {"coupling": coupling_gap(optimizer)}
            curves |= {"lr": float(optimizer.param_groups[0]["lr"])}
        self.watching.point(path.step, self._told, curves)

    def _close_epoch(self) -> None:
        """Write down what an epoch came to, and begin the next."""
        position, path = self.position, self.path
        with self.clock.of("judging"):
            validation = self.judge.validation(path.step)
        loss, correct, answers = self.engine.totals(self.totals.read())
        position.epoch, position.batch = position.epoch + 1, 0
        mean = loss / answers if answers else math.nan  # every step was passed over
        self.setting.steering.hear(position.epoch, mean, first=self.engine.first)
        place = {"epoch": position.epoch, "step": path.step}
        metrics = {
            "time": path.time,
            "loss": mean,
            "train_accuracy": correct / answers if answers else math.nan,
            "val_accuracy": validation,
            "lr": float(self.setting.optimizer.param_groups[0]["lr"]),
        } | self.setting.steering.metrics()
        if self.on_nan == "skip":
            metrics["skipped"], position.skipped = position.skipped, 0
        times = {name: round(seconds, 4) for name, seconds in self.clock.lap().items()}
        self.watching.epoch(place | metrics, place | times)
        self.totals.clear()

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
            score = self.judge.validation(self.path.step) if self.position.batch == 0 else None
            facts: dict[str, Any] = {
                "step": self.position.step,
                "score": score,
                "position": asdict(self.position),
                "seen": self._seen,
                "engine": setting.facts,
                "steering": setting.steering.state_dict(),
                "on_nan": self.on_nan,
                "samples": self._samples,
                "scaler": engine.scaler.state_dict() if engine.scaler is not None else None,
            }
            if engine.first:
                facts["path"] = self.path.state_dict()
                facts["logs"] = {log.name: length_of(log) for log in logs_of(self.run)}
            self.checkpoints.save(tensors, facts, ranks)

    def finish(self) -> dict[str, float]:
        """Judge the end of the path, write the final files, and return the outcome."""
        path, run = self.path, self.run
        self.setting.steering.finish()

        def open_ends() -> tuple[bool, bool]:
            at_end = bool(path.points) and path.points[-1].step == path.step
            return not at_end, not (at_end and "accuracy" in path.points[-1].metrics)

        to_record, to_judge = self.engine.on_first(open_ends)
        if to_record:
            path.record()
        if to_judge:
            self._at_point(final=True)
        weights = whole(self.setting.model.state_dict())
        scores = path.scores()
        if self.engine.first:
            write_atomic(run.model, safetensors.torch.save(weights))
            save_scores(scores, run.scores)
        last = path.points[-1] if path.points else None
        return {
            "steps": path.step,
            "seconds": time.monotonic() - self._began,
            "accuracy": last.metrics["accuracy"] if last else 0.0,
            "density": last.density if last else 0.0,
        }


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
        cut_back(run.path, checkpoint.facts["path"]["file"]["bytes"])

    check_unlinked(run.folder)
    store = Checkpoints(run.checkpoints, engine, keep=1)
    store.sweep()
    reopen_seal(run.folder)
    sweep(run.folder, [f.name for f in (*run.final_files, run.status, run.checksums)])
    checkpoint = store.newest(fits, trusted=trusted)
    if checkpoint is None:
        for file in (run.metrics, run.times, run.path):
            file.unlink(missing_ok=True)
    return checkpoint


def _said(checkpoint: Checkpoint | None) -> OnNan | None:
    said: OnNan | None = checkpoint.facts.get("on_nan") if checkpoint else None
    return said


def logs_of(run: Run) -> tuple[FilePath, FilePath]:
    """Return the logs whose lengths a checkpoint keeps."""
    return run.metrics, run.times


def check_logs(run: Run, checkpoint: Checkpoint) -> None:
    """Check that the logs hold what was written until a checkpoint was saved.

    Raises:
        DamagedFileError: They do not, or the checkpoint does not say it as it should.
    """
    try:
        for log in logs_of(run):
            length = checkpoint.facts["logs"][log.name]
            check_begins(log, int(length["bytes"]), int(length["crc"]))
        History.check_position(run.path, checkpoint.facts["path"]["file"])
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"the checkpoint {checkpoint.folder} lacks {error}") from None
