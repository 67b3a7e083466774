# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """What the loop tells about its progress."""

    def say(self, text: str) -> None:
        """Something a person should know."""

    def start(self, title: str, total_steps: int, done: int) -> None:
        """A run begins, or goes on after ``done`` steps."""

    def update(self, step: int, facts: dict[str, float]) -> None:
        """A point was recorded after ``step`` steps; facts are loss, accuracy and density."""

    def finish(self) -> None:
        """The run has ended, one way or another."""


class Silent:
    """Tells nothing."""

    def say(self, text: str) -> None:
        """Tell nothing."""

    def start(self, title: str, total_steps: int, done: int) -> None:
        """Tell nothing."""

    def update(self, step: int, facts: dict[str, float]) -> None:
        """Tell nothing."""

    def finish(self) -> None:
        """Tell nothing."""


def _told(facts: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in facts.items())


class Lines:
    """About twenty plain lines over a run, for logs and pipes."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._total = self._done = 0
        self._next = 0.0
        self._began = 0.0

    def say(self, text: str) -> None:
        """Print it."""
        print(text, file=self._stream, flush=True)

    def start(self, title: str, total_steps: int, done: int) -> None:
        """Print the title."""
        self._total, self._done, self._next = total_steps, done, 0.0
        self._began = time.monotonic()
        print(title, file=self._stream, flush=True)

    def update(self, step: int, facts: dict[str, float]) -> None:
        """Print a line if a twentieth of the run has passed since the last one."""
        if step < self._next and step < self._total:
            return
        self._next = step + self._total / 20
        passed = max(1, step - self._done)
        seconds = (time.monotonic() - self._began) / passed * (self._total - step)
        line = f"step {step}/{self._total}  {_told(facts)}  {seconds:.0f} s left"
        print(line, file=self._stream, flush=True)

    def finish(self) -> None:
        """Nothing is left open."""


class Bar:
    """A progress bar with loss, accuracy, density and the time left."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )

    def say(self, text: str) -> None:
        """Print it above the bar."""
        self._progress.console.print(text)

    def start(self, title: str, total_steps: int, done: int) -> None:
        """Show the bar."""
        self._progress.console.print(title)
        self._task = self._progress.add_task("train", total=total_steps, completed=done, told="")
        self._progress.start()

    def update(self, step: int, facts: dict[str, float]) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, told=_told(facts))

    def finish(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


def default_reporter() -> Reporter:
    """Return a bar where standard error is a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        return Bar(Console(stderr=True))
    return Lines(sys.stderr)
