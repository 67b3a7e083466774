# SPDX-License-Identifier: Apache-2.0
"""What the lines of a path's file hold: checksums, metrics, changes of size; where it begins."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from dessilbi.blocks.ticket import TensorSpec
from dessilbi.files.storage import from_number, to_json

Takes = Mapping[str, Sequence[Sequence[int]]]

# What replaying a damaged or hostile file can raise, before we say so in one sentence.
UNREADABLE = (
    AttributeError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    zlib.error,
)


@dataclass(frozen=True)
class Point:
    """One recorded moment of a run.

    Args:
        step: Optimizer steps done.
        time: Path time, the sum of lr over these steps.
        density: Share of elements in supp(Gamma).
        by_hand: Recorded on request; such points are never thinned away.
        metrics: What was logged at this point; grows by :meth:`History.log`.
    """

    step: int
    time: float
    density: float
    by_hand: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)


class OtherTensorsError(ValueError):
    """A path is of other tensors than those it is to continue with."""

    def __init__(self, file: str | FilePath):
        super().__init__(f"{file} is the path of other tensors than this optimizer's")


def new_file(file: str | FilePath) -> FilePath:
    """Return the place of a path that begins, in a folder that is made where it is missing.

    Raises:
        FileExistsError: There is a file already.
    """
    place = FilePath(file)
    if place.exists():
        raise FileExistsError(f"{file} exists already: a path is never overwritten")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def read_specs(tensors: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Read shapes and blocks by name."""
    return {
        name: TensorSpec(tuple(entry["shape"]), tuple(entry["block"]))
        for name, entry in tensors.items()
    }


def taken(values: Tensor, takes: Sequence[Sequence[int]], fill: float) -> Tensor:
    """Return values by block for other blocks: those they were before, ``fill`` where new."""
    new = torch.zeros((), dtype=torch.bool)
    for dim, places in enumerate(takes):
        index = torch.tensor(places, dtype=torch.int64)
        values = values.index_select(dim, index.clamp(min=0))
        new = new | (index < 0).reshape([-1 if d == dim else 1 for d in range(len(takes))])
    return values.masked_fill(new, fill)


def reshaping(
    told: Mapping[str, Any], before: Mapping[str, TensorSpec], largest: int
) -> tuple[dict[str, TensorSpec], dict[str, list[list[int]]], int]:
    """Read a change of sizes; shapes must be those that the blocks give."""
    known, takes = read_specs(told["tensors"]), {}
    specs = {name: known[name] for name in before}
    if sum(spec.num_blocks for spec in specs.values()) > largest:
        raise ValueError(f"more than {largest:,} blocks")
    for name, old in before.items():
        lines = told["takes"][name]
        takes[name] = [[int(place) for place in line] for line in lines]
        if tuple(map(len, lines)) != specs[name].grid or len(lines) != len(old.grid):
            raise ValueError(f"other sizes of {name} than its blocks")
    return specs, takes, int(told["step"])


def line_checksum(line: Mapping[str, Any], before: int) -> int:
    """Return a checksum of a line and, through ``before``, of all lines before it."""
    return zlib.crc32(to_json(line).encode(), before)


def plain_metric(name: str, value: object) -> Any:
    """Return a metric as a number, a word or None.

    Raises:
        ValueError: It is of another kind.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return number_or_word(value)  # as it will be read
    try:
        return float(value)  # type: ignore[arg-type]  # tensors and NumPy numbers
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name}={type(value).__name__} cannot be logged: give numbers, words or None"
        ) from None


def number_or_word(value: object) -> Any:
    """Read what :func:`plain_metric` returned and a file holds."""
    return from_number(value) if value in ("inf", "-inf", "nan") else value
