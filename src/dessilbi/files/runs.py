# SPDX-License-Identifier: Apache-2.0
"""Run: the folder between training and everything after it, plain files only (no torch here)."""

import errno
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import IO, Any

from dessilbi.files.folders import PATH, RECIPE, kind_of
from dessilbi.files.sealing import NAME as CHECKSUMS
from dessilbi.files.sealing import check_sealed, read_sealed, sealed
from dessilbi.files.storage import (
    DamagedFileError,
    check_plain,
    draft_folder,
    read_json,
    sync_folder,
    write_atomic,
    write_json,
)

SCHEMA_VERSION = 1


class TrainingError(RuntimeError):
    """A run cannot go on; what it wrote so far stays."""


class BusyError(OSError):
    """Another process is at work in the run folder."""


@dataclass(frozen=True)
class Run:
    """The names of the files of a run folder.

    Args:
        folder: The run folder.
    """

    folder: FilePath

    def __post_init__(self) -> None:
        """Accept strings."""
        object.__setattr__(self, "folder", FilePath(self.folder))

    @property
    def recipe(self) -> FilePath:
        """The complete recipe the run was trained with (JSON)."""
        return self.folder / RECIPE

    @property
    def environment(self) -> FilePath:
        """Versions, devices and threads (JSON)."""
        return self.folder / "environment.json"

    @property
    def init(self) -> FilePath:
        """The initialisation (safetensors)."""
        return self.folder / "init.safetensors"

    @property
    def model(self) -> FilePath:
        """The final dense weights W and buffers (safetensors)."""
        return self.folder / "model.safetensors"

    @property
    def early(self) -> FilePath:
        """The weights after ``rewind_at`` epochs, to rewind to (safetensors)."""
        return self.folder / "early.safetensors"

    @property
    def start(self) -> FilePath:
        """What the run began with where that is not a fresh model of its recipe (JSON)."""
        return self.folder / "start.json"

    @property
    def ticket(self) -> FilePath:
        """The ticket that is enforced in training, where there is one (safetensors)."""
        return self.folder / "ticket.safetensors"

    @property
    def metrics(self) -> FilePath:
        """One line per epoch (JSON lines)."""
        return self.folder / "metrics.jsonl"

    @property
    def times(self) -> FilePath:
        """One line per epoch: where its seconds went (JSON lines)."""
        return self.folder / "times.jsonl"

    @property
    def growth(self) -> FilePath:
        """One line per size of a network that grows (JSON lines)."""
        return self.folder / "growth.jsonl"

    @property
    def checkpoints(self) -> FilePath:
        """Folder of what a run needs to go on."""
        return self.folder / "checkpoints"

    @property
    def tensorboard(self) -> FilePath:
        """Folder of TensorBoard's event files, where they were asked for."""
        return self.folder / "tensorboard"

    @property
    def lock(self) -> FilePath:
        """Held by the process that writes to the run."""
        return self.folder / ".lock"

    @property
    def path(self) -> FilePath:
        """The recorded path (JSON lines)."""
        return self.folder / PATH

    @property
    def scores(self) -> FilePath:
        """||V||/lam and ||W|| per block at the end (safetensors)."""
        return self.folder / "scores.safetensors"

    @property
    def tickets(self) -> FilePath:
        """Folder of the tickets taken from this run."""
        return self.folder / "tickets"

    @property
    def retrained(self) -> FilePath:
        """Folder of what was retrained from this run's tickets."""
        return self.folder / "retrained"

    @property
    def curves(self) -> FilePath:
        """Folder of curves of layers that were pruned by order (JSON)."""
        return self.folder / "curves"

    @property
    def figures(self) -> FilePath:
        """Folder of the figures drawn of this run."""
        return self.folder / "figures"

    @property
    def compacted(self) -> FilePath:
        """Folder of the smaller models made from this run."""
        return self.folder / "compact"

    @property
    def family(self) -> FilePath:
        """Accuracies of tickets of several densities (JSON), where they were judged."""
        return self.folder / "family.json"

    @property
    def status(self) -> FilePath:
        """How far the run came (JSON)."""
        return self.folder / "status.json"

    @property
    def checksums(self) -> FilePath:
        """SHA-256 of the files above; see ``sealing``."""
        return self.folder / CHECKSUMS

    @property
    def final_files(self) -> tuple[FilePath, ...]:
        """What does not change any more when the run has ended."""
        growth = [self.growth] if self.growth.is_file() else []
        return self.model, self.scores, self.metrics, self.times, self.path, *growth

    def set_status(self, status: str, **facts: Any) -> None:
        """Record "running", "finished", "interrupted" or "failed" with further facts."""
        write_json(self.status, status_of(status, **facts))

    def read_status(self) -> dict[str, Any]:
        """Return what :meth:`set_status` wrote last.

        Raises:
            FileNotFoundError: The folder is not a run folder.
            ValueError: The file is damaged.
        """
        told = read_sealed(self.status)
        if "status" not in told:
            raise DamagedFileError(f"{self.status} does not say how far the run came")
        return told

    @property
    def weight_bytes(self) -> int:
        """Size of the initialisation, 0 where it is not there: no tensor of the run is larger."""
        return self.init.stat().st_size if self.init.is_file() else 0

    def read_recipe(self) -> dict[str, Any]:
        """Return the recipe as it was written.

        Raises:
            FileNotFoundError: The folder is not a run folder.
            ValueError: The file is damaged.
        """
        if not self.recipe.is_file():
            raise FileNotFoundError(
                f"{self.folder} is not a run folder: {kind_of(self.folder, self.recipe.name)}; "
                f"name a folder that `dessilbi train` has written"
            )
        check_sealed(self.recipe)
        return read_json(self.recipe)

    def read_environment(self) -> dict[str, Any]:
        """Return versions, devices and threads as they were written.

        Raises:
            FileNotFoundError: The folder is not a run folder.
            ValueError: The file is damaged.
        """
        check_sealed(self.environment)
        return read_json(self.environment)


def status_of(status: str, **facts: Any) -> dict[str, Any]:
    """Return the content of a status file."""
    return sealed({"schema": SCHEMA_VERSION, "status": status, **facts})


def create_run(
    folder: str | FilePath, files: Mapping[str, bytes] | None = None, *, or_next: bool = False
) -> Run:
    """Create a run folder that appears with all of ``files`` in it, or not at all.

    Args:
        folder: The run folder; an empty one may be there already.
        files: name -> content.
        or_next: Take the next free name (-2, -3, ...) where ``folder`` is taken.

    Raises:
        FileExistsError: The folder has files in it: a run is never overwritten.
        OSError: The folder cannot be made.
    """
    folder = FilePath(folder)
    if or_next:
        folder = free_path(folder.parent, folder.name)
    _refuse(folder, taken=_is_taken(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder)) from None
    draft = draft_folder(folder)
    try:
        for name, content in (files or {}).items():
            write_atomic(draft / name, content)
        while not _put_in_place(draft, folder):
            _refuse(folder, taken=not or_next)
            folder = free_path(folder.parent, folder.name)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return Run(folder)


def _refuse(folder: FilePath, *, taken: bool) -> None:
    if taken:
        raise FileExistsError(
            f"{folder} exists and is not empty: a run is never overwritten; name another with --out"
        )


def _is_taken(folder: FilePath) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _put_in_place(draft: FilePath, folder: FilePath) -> bool:
    """Rename a draft to its name, unless something lies there."""
    if _is_taken(folder):
        return False
    with suppress(OSError):  # an empty folder may give way
        folder.rmdir()
    try:
        draft.rename(folder)
    except OSError:
        if _is_taken(folder):  # somebody was quicker
            return False
        raise
    return True


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Keep other processes out of a run for the length of a block.

    The system releases the lock when the process ends, however it ends.

    Raises:
        BusyError: Another process holds the lock.
        DamagedFileError: The file of the lock is a link.
        OSError: The folder cannot be written.
    """
    check_plain(run.lock)
    with run.lock.open("ab") as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise
            raise BusyError(
                f"{run.folder} is in use by another process: wait until it ends, or stop it"
            ) from None
        yield


if sys.platform == "win32":

    def _lock(file: IO[bytes]) -> None:
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:

    def _lock(file: IO[bytes]) -> None:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def free_path(parent: str | FilePath, name: str, suffix: str = "") -> FilePath:
    """Return ``parent/name+suffix``, or with -2, -3, ... after the name where that is taken."""
    candidate, number = FilePath(parent) / (name + suffix), 1
    while candidate.exists():
        number += 1
        candidate = FilePath(parent) / f"{name}-{number}{suffix}"
    return candidate
