# SPDX-License-Identifier: Apache-2.0
"""Tracing: what a run keeps beside its weights. A search has a path; masked training has none."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.optim import Optimizer

from dessilbi.dynamics.monitors import coupling_gap
from dessilbi.optimizers import dual
from dessilbi.optimizers.optimizer import is_phantom_step
from dessilbi.path.blocknorms import norms_of
from dessilbi.path.path import Path
from dessilbi.path.scores import save_scores
from dessilbi.path.settling import Settled, settled
from dessilbi.training.checkpoints import Checkpoint
from dessilbi.training.engine import Engine
from dessilbi.training.evaluation import recalibrated
from dessilbi.training.judging import Judge
from dessilbi.training.position import Clock, Totals
from dessilbi.training.setting import Setting
from dessilbi.training.watching import Watching


class Trace(ABC):
    """What a session asks of it; every process asks at the same steps.

    Args:
        setting: Of the run.
        engine: Of the run.
        watching: Who hears of it, and the run folder.
        clock: Counts the seconds spent on judging.
        checkpoint: Where to go on from; None: the beginning.
    """

    settled: Settled | None = None  # why the run may stop before its end

    def __init__(
        self,
        setting: Setting,
        engine: Engine,
        watching: Watching,
        clock: Clock,
        checkpoint: Checkpoint | None,
    ):
        self.setting, self.engine, self.watching, self.clock = setting, engine, watching, clock
        self.judge = Judge(setting, engine)
        self._begin(checkpoint)

    @abstractmethod
    def _begin(self, checkpoint: Checkpoint | None) -> None:
        """Start, or go on from a checkpoint."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    @abstractmethod
    def time(self) -> float:
        """Path time so far."""

    @abstractmethod
    def look(self, totals: Totals) -> bool:
        """Judge what the latest step completed; return whether there was anything."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""

    @abstractmethod
    def finish(self, totals: Totals) -> dict[str, Any]:
        """Judge the end, write final files, and return the outcome."""


def trace_of(
    setting: Setting,
    engine: Engine,
    watching: Watching,
    clock: Clock,
    checkpoint: Checkpoint | None,
) -> Trace:
    """Return the trace of a run: its path, or the little that a run without structure leaves."""
    made = PathTrace if dual.members(setting.optimizer) else MaskedTrace
    return made(setting, engine, watching, clock, checkpoint)


class PathTrace(Trace):
    """The path of a search, judged here and there, and asked whether it has settled."""

    def _begin(self, checkpoint: Checkpoint | None) -> None:
        setting, engine, watching = self.setting, self.engine, self.watching
        self.path = Path(
            setting.optimizer,
            every=self.judge.every,
            total_time=setting.total_time,
            file=watching.run.path if engine.first else None,
            resume=checkpoint.facts["path"] if checkpoint else None,
        )
        self._told: dict[str, float] = {}
        self._seen: int = checkpoint.facts["seen"] if checkpoint else 0  # the latest point told of
        self.settled = self._asked()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.path.step

    @property
    def time(self) -> float:
        """Path time so far."""
        return self.path.time

    def look(self, totals: Totals) -> bool:
        """Judge the point that was just recorded, if there is one."""
        path = self.path
        if path.step % self.judge.every or path.step == self._seen:
            return False
        self._at_point(totals)
        self.settled = self._asked()
        return True

    def _asked(self) -> Settled | None:
        """Whether the path has settled; the first process, which has all of it, answers for all."""
        wish = self.setting.recipe.stop
        if wish is None or not self._seen:
            return None
        return self.engine.on_first(lambda: settled(self.path, **wish.model_dump()))

    def _at_point(self, totals: Totals, *, final: bool = False) -> None:
        """Judge the point that was just recorded, if it is one to judge, and tell."""
        path, optimizer = self.path, self.setting.optimizer
        self._seen = path.step
        facts: dict[str, float] = {"epoch": path.step / self.setting.steps_per_epoch}
        with self.clock.of("judging"):
            if final or self.judge.wants(path.step):
                facts |= self.judge.at_point(path.step)
                self._told["acc"] = facts["val_accuracy"]
            elif self.setting.recipe.stop is not None:
                facts |= self.judge.of_ticket(path.step)
        path.log(**facts)
        path.history.weigh(norms_of(optimizer, path.history.norms.names))
        self._told |= {"loss": totals.loss, "density": path.points[-1].density}
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

    def follow(self, setting: Setting) -> None:
        """Go on with a network of another size; its optimizer is watched already."""
        self.setting = setting
        self.judge.follow(setting)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps: the state of the path, and how much of it was told."""
        facts: dict[str, Any] = {"seen": self._seen}
        return facts | ({"path": self.path.state_dict()} if self.engine.first else {})

    def finish(self, totals: Totals) -> dict[str, Any]:
        """Judge the end of the path, write the scores, and return the outcome."""
        path = self.path

        def open_ends() -> tuple[bool, bool]:
            at_end = bool(path.points) and path.points[-1].step == path.step
            return not at_end, not (at_end and "accuracy" in path.points[-1].metrics)

        to_record, to_judge = self.engine.on_first(open_ends)
        if to_record:
            path.record()
        if to_judge:
            self._at_point(totals, final=True)
        scores = path.scores()
        if self.engine.first:
            save_scores(scores, self.watching.run.scores)
        last = path.points[-1] if path.points else None
        return {
            "accuracy": last.metrics["accuracy"] if last else 0.0,
            "density": last.density if last else 0.0,
        }


class MaskedTrace(Trace):
    """What a run without structure leaves: the accuracy it ends with, its own statistics fitted."""

    def _begin(self, checkpoint: Checkpoint | None) -> None:
        setting = self.setting
        kept: dict[str, Any] = checkpoint.facts["path"] if checkpoint else {}
        self._step, self._time = int(kept.get("step", 0)), float(kept.get("time", 0.0))
        self._before: dict[str, float] | None = kept.get("before")
        setting.optimizer.register_step_post_hook(self._after_step)
        if checkpoint is None and setting.start is not None and setting.start.trained:
            with self.clock.of("judging"):
                self._before = self.judge.masked_now(again=setting.start.recalibrate)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not is_phantom_step(optimizer):
            self._step += 1
            self._time += float(dual.alpha_of(optimizer, optimizer.param_groups[0]))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step

    @property
    def time(self) -> float:
        """The learning rate, summed over the steps."""
        return self._time

    def look(self, totals: Totals) -> bool:
        """There are no points; tell how it goes now and then."""
        if self._step % self.judge.every or not self._step:
            return False
        self.watching.point(self._step, {"loss": totals.loss}, {})
        return False

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"path": {"step": self._step, "time": self._time, "before": self._before}}

    @torch.no_grad()
    def finish(self, totals: Totals) -> dict[str, Any]:
        """Fit BatchNorm statistics to the weights, judge them, and return the outcome."""
        start, model = self.setting.start, self.setting.model
        if start is None or start.recalibrate:
            self.engine.share_buffers(model)
            with self.engine.autocast():
                recalibrated(model, self.setting.data.train)
        told: dict[str, Any] = self.judge.of_weights()
        if start is not None and start.ticket is not None:
            told["density"] = start.ticket.density
        if self._before is not None:
            told["before"] = self._before
        return told
