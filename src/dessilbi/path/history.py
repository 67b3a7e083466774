# SPDX-License-Identifier: Apache-2.0
"""History: the recorded points of a run, which block was in supp(Gamma) at each, and their file.

Supports are kept as packed bits, each as the compressed difference to the point before. The file
is JSON lines, only ever appended to: a header, then points, logs and thinnings as they happen.
"""

import base64
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dessilbi.blocks.ticket import TensorSpec, pack_bits, unpack_bits
from dessilbi.files.storage import (
    DamagedFileError,
    append_line,
    check_begins,
    cut_back,
    from_number,
    read_lines,
    told_by,
)
from dessilbi.path.blocknorms import BlockNorms
from dessilbi.path.lines import (
    UNREADABLE,
    OtherTensorsError,
    Point,
    Takes,
    line_checksum,
    new_file,
    number_or_word,
    plain_metric,
    read_specs,
    reshaping,
    taken,
)

FORMAT = "dessilbi.path"
VERSION = 1
NEVER = -1
BELIEVED = 1 << 26  # blocks that a file may claim without weights to show for it: 0.6 GB in memory

Bytes = npt.NDArray[np.uint8]


class History:
    """Points, supports and first entries of a set of structured tensors.

    Args:
        specs: name -> shape and block.
        units: name -> unit name, or None.
        file: Where to append every change; None keeps the history in memory only.

    Raises:
        FileExistsError: The file exists already.
        OSError: The file cannot be written.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        units: Mapping[str, str | None],
        file: str | FilePath | None = None,
    ):
        self.specs = dict(specs)
        self.units = {name: units.get(name) for name in specs}
        self.points: list[Point] = []
        self.entries = {
            name: torch.full(spec.grid, NEVER, dtype=torch.int64) for name, spec in specs.items()
        }
        self.births = {name: torch.zeros_like(entry) for name, entry in self.entries.items()}
        self.norms = BlockNorms(specs)
        self._deltas: list[bytes] = []
        self._last: Bytes = np.zeros(self._num_bytes, np.uint8)
        self._chain = 0
        self.first_step: int | None = None
        self.file = None if file is None else new_file(file)
        self._write(self._header())

    @property
    def _num_bytes(self) -> int:
        return sum((spec.num_blocks + 7) // 8 for spec in self.specs.values())

    def _header(self) -> dict[str, Any]:
        tensors = {
            name: {"shape": spec.shape, "block": spec.block, "unit": self.units[name]}
            for name, spec in self.specs.items()
        }
        return {"format": FORMAT, "version": VERSION, "tensors": tensors}

    def add(self, point: Point, masks: Mapping[str, Tensor]) -> None:
        """Append a point with its support; the file is written before memory changes.

        Raises:
            OSError: The file cannot be written; the history is as before.
        """
        bits = np.concatenate([pack_bits(masks[name]) for name in self.specs])
        delta = zlib.compress((bits ^ self._last).tobytes(), level=1)
        self._write(
            {
                "point": {
                    "step": point.step,
                    "time": point.time,
                    "density": point.density,
                    "by_hand": point.by_hand,
                },
                "delta": base64.b64encode(delta).decode(),
            }
        )
        self._take(point, delta, bits)

    def _take(self, point: Point, delta: bytes, bits: Bytes) -> None:
        if self.first_step is None:
            self.first_step = point.step
        self.points.append(point)
        self._deltas.append(delta)
        self._last = bits
        for name, mask in self._unpack(bits).items():
            entry = self.entries[name]
            entry[mask & (entry == NEVER)] = point.step

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Attach metrics to the latest point: numbers, words or None.

        Raises:
            ValueError: Nothing has been recorded yet, or a value is of another kind.
            OSError: The file cannot be written.
        """
        if not self.points:
            raise ValueError("there is no recorded point to log to yet: call record() first")
        plain = {name: plain_metric(name, value) for name, value in metrics.items()}
        self._write({"log": {"step": self.points[-1].step, "metrics": plain}})
        self.points[-1].metrics.update(plain)

    def weigh(self, norms: Mapping[str, Tensor]) -> None:
        """Attach the norms of W's blocks to the latest point, of the tensors that are followed.

        Raises:
            OSError: The file cannot be written.
        """
        step = self.points[-1].step
        if self.norms.names and step not in self.norms.steps:
            self._write({"norms": self.norms.told(step, norms)})

    def keep_latest(self) -> None:
        """Mark the latest point as recorded by hand, so that it is never thinned away.

        Raises:
            OSError: The file cannot be written.
        """
        if not self.points[-1].by_hand:
            self._write({"keep": self.points[-1].step})
            self.points[-1] = replace(self.points[-1], by_hand=True)

    def thin(self, every: int) -> None:
        """Drop points that were not recorded by hand and whose step ``every`` does not divide.

        First entries stay as precise as they were recorded.

        Raises:
            OSError: The file cannot be written.
        """
        drop = [p.step for p in self.points[:-1] if p.step % every and not p.by_hand]
        if drop:
            self._write({"thin": drop})
            self._drop(set(drop))

    def _drop(self, steps: set[int]) -> None:
        points, deltas = [], []
        pending: Bytes | None = None
        for point, packed in zip(self.points, self._deltas, strict=True):
            delta = self._inflate(packed)
            pending = delta if pending is None else pending ^ delta
            if point.step not in steps:
                points.append(point)
                deltas.append(zlib.compress(pending.tobytes(), level=1))
                pending = None
        self.points, self._deltas = points, deltas
        self.norms.drop(steps)
        if pending is not None:  # the latest point went as well
            self._last = self._last ^ pending

    def reshape(self, specs: Mapping[str, TensorSpec], takes: Takes, step: int) -> None:
        """Go on with tensors of other sizes, all that was recorded told in their blocks.

        Args:
            specs: Shapes and blocks from now on, of the same tensors.
            takes: Per tensor and dimension of its grid, the block before at each place; -1: new.
            step: When it happened: new blocks are born there, and were in no support before.

        Raises:
            ValueError: They are other tensors.
            OSError: The file cannot be written; the history is as before.
        """
        grids = {name: tuple(map(len, takes[name])) for name in self.specs if name in takes}
        if grids != {name: spec.grid for name, spec in specs.items()}:
            raise ValueError("this path is of other tensors than the optimizer's: make a new one")
        tensors = {n: {"shape": spec.shape, "block": spec.block} for n, spec in specs.items()}
        told = {name: [list(line) for line in takes[name]] for name in specs}
        self._write({"reshape": {"step": step, "tensors": tensors, "takes": told}})
        self._reshape(specs, takes, step)

    def _reshape(self, specs: Mapping[str, TensorSpec], takes: Takes, step: int) -> None:
        supports = list(self.supports())
        self.norms.reshape(self.specs, takes)
        self.entries = {n: taken(self.entries[n], takes[n], NEVER) for n in self.specs}
        self.births = {n: taken(self.births[n], takes[n], step) for n in self.specs}
        self.specs = {name: specs[name] for name in self.specs}
        self._deltas, self._last = [], np.zeros(self._num_bytes, np.uint8)
        for masks in supports:
            moved = [taken(masks[n], takes[n], fill=False) for n in self.specs]
            bits = np.concatenate([pack_bits(mask) for mask in moved])
            self._deltas.append(zlib.compress((bits ^ self._last).tobytes(), level=1))
            self._last = bits

    def support(self, index: int) -> dict[str, Tensor]:
        """Return the masks of supp(Gamma) at the point with this index."""
        return next(islice(self.supports(), index, None))

    def supports(self) -> Iterator[dict[str, Tensor]]:
        """Yield the masks of supp(Gamma) at every point, in order."""
        bits = np.zeros(self._num_bytes, np.uint8)
        for packed in self._deltas:
            bits = bits ^ self._inflate(packed)
            yield self._unpack(bits)

    def _inflate(self, packed: bytes) -> Bytes:
        # Bounded, so that a hostile file cannot ask for more memory than its tensors need.
        data = zlib.decompressobj().decompress(packed, self._num_bytes + 1)
        if len(data) != self._num_bytes:
            raise ValueError("a support of the wrong size")
        return np.frombuffer(data, np.uint8)

    def _unpack(self, bits: Bytes) -> dict[str, Tensor]:
        masks, start = {}, 0
        for name, spec in self.specs.items():
            end = start + (spec.num_blocks + 7) // 8
            masks[name] = unpack_bits(bits[start:end], spec.grid)
            start = end
        return masks

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line with a checksum of itself and of all lines before it."""
        if self.file is not None:
            chain = line_checksum(line, self._chain)
            append_line(self.file, {**line, "crc": chain})
            self._chain = chain

    @classmethod
    def load(
        cls,
        file: str | FilePath,
        *,
        specs: Mapping[str, TensorSpec] | None = None,
        largest: int = BELIEVED,
    ) -> "History":
        """Read a history; a line torn by a crash is passed over.

        Args:
            file: What a history has written.
            specs: The tensors it must be of, if they are known.
            largest: How many blocks a file may claim; memory for them is allocated.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, not a path, or of other tensors.
        """
        lines = iter(read_lines(file))
        try:
            header = next(lines, {})
            history = cls._from_header(header, file, specs, largest)
            history._verify(header)
            for line in lines:
                history._verify(line)
                history._replay(line, largest)
            if specs is not None and history.specs != specs:
                raise OtherTensorsError(file)
        except (DamagedFileError, OtherTensorsError):
            raise
        except UNREADABLE as error:
            raise DamagedFileError(
                f"{file} is not a readable path ({told_by(error)}): "
                f"it is damaged or not ours; restore it from a copy or train again"
            ) from None
        return history

    def position(self) -> dict[str, int]:
        """Return how far the file has come: its bytes and the checksum of its last line.

        Raises:
            ValueError: The history is kept in memory only.
        """
        if self.file is None:
            raise ValueError(
                "this path is kept in memory only and cannot be continued later: "
                "give Path a file=..."
            )
        return {"bytes": self.file.stat().st_size, "crc": self._chain}

    @classmethod
    def resume(
        cls,
        file: str | FilePath,
        position: Mapping[str, int],
        *,
        specs: Mapping[str, TensorSpec] | None = None,
    ) -> "History":
        """Cut a file back to an earlier :meth:`position` and go on from there.

        Raises:
            DamagedFileError: The file does not hold what was written up to there.
            ValueError: It is the path of other tensors than ``specs``.
            OSError: The file cannot be written.
        """
        cls.check_position(file, position)
        cut_back(file, position["bytes"])
        history = cls.load(file, specs=specs)
        history.file = FilePath(file)
        return history

    @staticmethod
    def check_position(file: str | FilePath, position: Mapping[str, int]) -> None:
        """Check that a file holds what was written up to a :meth:`position`.

        Raises:
            DamagedFileError: It does not.
        """
        size, end = position["bytes"], b'"crc": %d}\n' % position["crc"]
        check_begins(FilePath(file), size)
        with FilePath(file).open("rb") as opened:
            opened.seek(max(0, size - len(end)))
            if opened.read(len(end)) != end:
                raise DamagedFileError(f"{file} is of another run than the state it is to continue")

    def _verify(self, line: dict[str, Any]) -> None:
        told = line.pop("crc", None)
        self._chain = line_checksum(line, self._chain)
        if told != self._chain:
            raise ValueError("a line does not match its checksum, or one is missing before it")

    @classmethod
    def _from_header(
        cls,
        header: dict[str, Any],
        file: str | FilePath,
        wanted: Mapping[str, TensorSpec] | None,
        largest: int,
    ) -> "History":
        if header.get("format") != FORMAT:
            raise ValueError("no path header")
        if (found := header.get("version")) != VERSION:
            raise ValueError(f"format version {told_by(found, 40)}, this release reads {VERSION}")
        specs = read_specs(header["tensors"])
        if wanted is not None and specs.keys() != wanted.keys():
            raise OtherTensorsError(file)
        blocks = sum(spec.num_blocks for spec in specs.values())
        if specs != wanted and blocks > largest:
            raise DamagedFileError(
                f"{file} claims to be the path of {blocks:,} blocks, with no weights of that size "
                f"beside it: if it is your own, read it with Path.load(folder, largest={blocks})"
            )
        units = {name: entry["unit"] for name, entry in header["tensors"].items()}
        return cls(specs, units)

    def _replay(self, line: dict[str, Any], largest: int) -> None:
        if "point" in line:
            told = line["point"]
            time, density = from_number(told["time"]), from_number(told["density"])
            point = Point(int(told["step"]), time, density, bool(told["by_hand"]))
            delta = base64.b64decode(line["delta"], validate=True)
            self._take(point, delta, self._last ^ self._inflate(delta))
        elif "log" in line or "norms" in line:
            told = line["log"] if "log" in line else line["norms"]
            if not self.points or self.points[-1].step != told["step"]:
                raise ValueError("a log without its point")
            if "norms" in line:
                self.norms.replay(told, self.specs)
            metrics = told.get("metrics", {}).items()
            self.points[-1].metrics.update({n: number_or_word(v) for n, v in metrics})
        elif "keep" in line:
            self.points[-1] = replace(self.points[-1], by_hand=True)
        elif "thin" in line:
            self._drop(set(line["thin"]))
        elif "reshape" in line:
            self._reshape(*reshaping(line["reshape"], self.specs, largest))
        else:
            raise ValueError(f"a line with {', '.join(sorted(line)) or 'nothing'}")

    def steps(self) -> Iterable[int]:
        """Steps of the recorded points, ascending."""
        return (point.step for point in self.points)
