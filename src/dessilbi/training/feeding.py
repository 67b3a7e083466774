# SPDX-License-Identifier: Apache-2.0
"""Feeding: which samples a step sees, in which order, and how a batch is shared among processes.

Order and augmentation are functions of (seed, epoch, batch) alone. Nothing is remembered between
batches, so a run that resumes inside an epoch sees exactly the batches it would have seen, and
several processes together see exactly the batches of one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_ORDER, _AUGMENTATION = 0, 1  # streams of random numbers that must not meet


@dataclass(frozen=True, eq=False)
class Draw:
    """What one process reads for one batch.

    Attributes:
        indices: Samples of the source, int64 (share,), on the CPU.
        words: Decide the augmentation of the whole batch; None leaves the samples as they are.
        size: Samples of the whole batch, over all processes.
        first: Place of this process's share in the whole batch.
    """

    indices: Tensor
    words: tuple[int, ...] | None
    size: int
    first: int = 0

    @cached_property
    def seed(self) -> int | None:
        """The words, mixed to a seed when first asked for."""
        return None if self.words is None else _mixed(*self.words)

    @property
    def share(self) -> slice:
        """This process's part of anything drawn for the whole batch."""
        return slice(self.first, self.first + len(self.indices))

    def generator(self) -> torch.Generator:
        """The generator of the whole batch, the same in every process."""
        assert self.seed is not None
        return torch.Generator().manual_seed(self.seed)


class Source(Protocol):
    """Where samples come from."""

    def __len__(self) -> int:
        """How many samples there are."""

    def read(self, plan: Iterable[Draw], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of each draw on ``device``.

        What it draws at random comes from ``Draw.seed`` and the place in the whole batch alone.
        """


@dataclass(frozen=True, eq=False)
class Split:
    """Samples of a source to train, to choose or to test with.

    Attributes:
        source: Where they are read.
        indices: Which of them, int64 (N,), on the CPU; None stands for all.

    >>> split = Split(InMemory(torch.arange(5.0), torch.arange(5)))
    >>> [targets.tolist() for _, targets in split.in_order(2)]
    [[0, 1], [2, 3], [4]]
    >>> [len(targets) for _, targets in split.batches(0, batch_size=2, seed=0)]
    [2, 2]
    """

    source: Source
    indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches an epoch has: whole ones only.

        The samples left over at the end of an epoch are dropped. Each epoch has its own order, so
        they are others every time. Every step then weighs every sample alike, however many
        processes share it.

        Raises:
            ValueError: There is not one whole batch.
        """
        if not 1 <= batch_size <= len(self):
            raise ValueError(
                f"a batch of {batch_size} samples cannot be drawn from a split of {len(self)}: "
                f"give a batch_size from 1 to {len(self)}"
            )
        return len(self) // batch_size

    def batches(
        self,
        epoch: int,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the shuffled, augmented batches of one epoch, each as (inputs, targets).

        Args:
            epoch: From 0.
            batch_size: Samples of a batch over all processes.
            seed: Of the run. With ``epoch`` it decides the order; with the number of the batch
                the augmentation.
            start: The first batch to return; those before it are not read.
            rank: This process; it gets its contiguous ``batch_size / world_size`` samples.
            world_size: Number of processes.
            device: Where the tensors are wanted.

        Raises:
            ValueError: Sizes do not fit (at the call, not at the first batch).
        """
        steps = self.steps_per_epoch(batch_size)
        if batch_size % world_size:
            raise ValueError(
                f"a batch of {batch_size} samples cannot be shared equally by {world_size} "
                f"processes: give a batch_size that is a multiple of {world_size}"
            )
        if not 0 <= start <= steps:
            raise ValueError(f"start={start} is not allowed: an epoch has {steps} batches")
        share = batch_size // world_size
        order = torch.randperm(len(self), generator=_generator(_ORDER, seed, epoch))
        if self.indices is not None:
            order = self.indices[order]
        plan = (
            Draw(
                indices=order[step * batch_size :][rank * share : (rank + 1) * share],
                words=(_AUGMENTATION, seed, epoch, step),
                size=batch_size,
                first=rank * share,
            )
            for step in range(start, steps)
        )
        return self.source.read(plan, torch.device(device))

    def in_order(
        self,
        batch_size: int,
        *,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return all samples once, as they are and in order; the last batch may be smaller.

        Args:
            batch_size: Samples per batch and process.
            limit: Stop after so many samples.
            rank: This process. It gets a contiguous share of the samples; shares differ by one
                at most, so add counts, not averages.
            world_size: Number of processes.
            device: Where the tensors are wanted.

        Raises:
            ValueError: ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batches of {batch_size} samples are not allowed: give 1 or more")
        count = len(self) if limit is None else min(limit, len(self))
        first, last = rank * count // world_size, (rank + 1) * count // world_size
        chosen = torch.arange(count) if self.indices is None else self.indices
        plan = (
            Draw(chosen[at : min(at + batch_size, last)], words=None, size=batch_size)
            for at in range(first, last, batch_size)
        )
        return self.source.read(plan, torch.device(device))

    def examples(self, count: int, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the first ``count`` samples (or of all, if fewer)."""
        return next(self.in_order(max(1, count), limit=count, device=device))


class InMemory:
    """Samples that are tensors already: no augmentation, no reading.

    Args:
        inputs: (N, ...), any dtype.
        targets: (N, ...).

    Raises:
        ValueError: There is not one target for each input.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"a split of {len(inputs)} inputs and {len(targets)} targets is "
                f"not allowed: give one target for each input"
            )
        self._at = OnDevice(inputs, targets)

    def __len__(self) -> int:
        return len(self._at.tensors[1])

    def read(self, plan: Iterable[Draw], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the samples of each draw; see :class:`Source`."""
        inputs, targets = self._at(device)
        for draw in plan:
            indices = draw.indices.to(device)
            yield inputs.index_select(0, indices), targets.index_select(0, indices)


class OnDevice:
    """Tensors that are copied to a device once, when first wanted there."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors
        self._copies: dict[torch.device, tuple[Tensor, ...]] = {}

    def __call__(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return them on ``device``."""
        if device not in self._copies:
            self._copies[device] = tuple(tensor.to(device) for tensor in self.tensors)
        return self._copies[device]


def _mixed(*words: int) -> int:
    """Return 32 well mixed bits of all words: torch's CPU generator reads no more of a seed."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _generator(*words: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mixed(*words))
