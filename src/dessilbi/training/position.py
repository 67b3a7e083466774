# SPDX-License-Identifier: Apache-2.0
"""Position: how far a run has come, what its epoch summed up so far, and where its time went."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dessilbi.training.objective import num_correct

T = TypeVar("T")
HANDS = ("data", "judging", "saving")


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        epoch: Epochs that are over.
        batch: Steps done in the present one.
        step: Steps done in all.
        seconds: Spent on them, over all sessions.
        skipped: Steps of the present epoch that were passed over, see ``guards``.
        skipped_in_a_row: ... up to now without one that was taken.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0


def position_of(told: Mapping[str, Any]) -> Position:
    """Return a position from plain values.

    Raises:
        ValueError: They are not one.
    """
    found = Position(**told)
    whole = (found.epoch, found.batch, found.step, found.skipped, found.skipped_in_a_row)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in whole):
        raise ValueError(f"{whole} is not a position")
    found.seconds = float(found.seconds)
    return found


class Totals:
    """Loss, right answers and answers of this process over an epoch.

    On the CPU they are numbers at once. On an accelerator they stay there until they are read, so
    that no step has to wait.

    Args:
        device: Of the run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()
        self.latest: float | Tensor = 0.0

    def clear(self) -> None:
        """Begin a new epoch."""
        self._sums: list[float | Tensor] = [0.0, 0, 0]

    @torch.no_grad()
    def add(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add a piece of a batch, with the mean loss over its answers."""
        correct, answers = num_correct(outputs, targets), targets.numel()
        if self.device.type == "cpu":
            self.latest = loss.item()
            self._sums[1] += correct.item()
        else:
            self.latest = loss.to(torch.float32 if self.device.type == "mps" else torch.float64)
            self._sums[1] += correct
        self._sums[0] += self.latest * answers
        self._sums[2] += answers

    @property
    def loss(self) -> float:
        """The latest loss."""
        return float(self.latest)

    def read(self) -> list[float]:
        """Return the sums as numbers; an accelerator is waited for."""
        return [float(value) for value in self._sums]

    def sums(self) -> list[float | Tensor]:
        """Return a copy of the sums where they are, for :meth:`set`."""
        return [s.clone() if isinstance(s, Tensor) else s for s in self._sums]

    def set(self, sums: Sequence[float | Tensor], loss: float) -> None:
        """Go on from what :meth:`read` or :meth:`sums`, and :attr:`loss`, were."""
        if len(sums) != 3:
            raise ValueError(f"{len(sums)} sums are not those of loss, right answers and answers")
        self._sums, self.latest = list(sums), float(loss)

    @property
    def finite(self) -> bool:
        """Whether every loss so far was a number."""
        return math.isfinite(self.read()[0])


class Clock:
    """A stopwatch with named hands, wound back at every lap.

    Work that an accelerator does later counts where it is waited for.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._hands = dict.fromkeys(HANDS, 0.0)

    def lap(self) -> dict[str, float]:
        """Return the seconds since the last lap, in all and by name, and begin a new one."""
        now = time.perf_counter()
        told = {"seconds": now - self._began, **self._hands}
        self._began, self._hands = now, dict.fromkeys(HANDS, 0.0)
        return told

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the block under ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._hands[name] += time.perf_counter() - began

    def waiting(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Pass items on, and count under ``name`` the time they let wait for them."""
        iterator = iter(items)
        while True:
            with self.of(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item
