# SPDX-License-Identifier: Apache-2.0
"""Watching: the lines, bars and curves of a run. Only the first process writes any of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Protocol

from dessilbi.files.runs import Run
from dessilbi.files.storage import append_line
from dessilbi.training.progress import Reporter, Silent


class Tracker(Protocol):
    """Where curves go: any logger of Lightning Fabric or Lightning will do."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take the values after ``step`` steps."""

    def finalize(self, status: str) -> None:
        """The run has ended."""


class Watching:
    """Hands out what happens in a run.

    Args:
        run: Its folder.
        reporter: Tells a person.
        trackers: Draw curves.
        first: Whether this process writes at all.
    """

    def __init__(self, run: Run, reporter: Reporter, trackers: Sequence[Tracker], *, first: bool):
        self.run, self.first = run, first
        self.reporter: Reporter = reporter if first else Silent()
        self.trackers = tuple(trackers) if first else ()

    def point(self, step: int, facts: Mapping[str, float], curves: Mapping[str, float]) -> None:
        """A point of the path was recorded."""
        self.reporter.update(step, dict(facts))
        self._track(step, curves)

    def epoch(self, metrics: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        """An epoch is over."""
        if not self.first:
            return
        append_line(self.run.metrics, metrics)
        append_line(self.run.times, times)
        names = {"loss": "loss", "train_accuracy": "accuracy/train", "lr": "lr"}
        self._track(metrics["step"], {names[name]: metrics[name] for name in names})

    def close(self, status: str) -> None:
        """The run has ended, one way or another."""
        self.reporter.finish()
        for tracker in self.trackers:
            tracker.finalize(status)

    def _track(self, step: int, curves: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log_metrics(dict(curves), step)


def tensorboard(folder: FilePath, *, step: int) -> Tracker:
    """Return a tracker that writes TensorBoard's event files into ``folder``.

    Args:
        folder: Made when the first value arrives.
        step: Steps done so far; curves of an earlier session are cut there.
    """
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger(
        folder.parent, name="", version=folder.name, purge_step=step + 1 if step else None
    )


def check_tensorboard() -> None:
    """Raise an ImportError of one sentence where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ImportError(
            "--tensorboard needs the package tensorboard, which is not installed: "
            "pip install 'dessilbi[tensorboard]'"
        ) from None
