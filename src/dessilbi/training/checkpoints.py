# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: folders that hold all a run needs to go on, each there whole or not at all.

A checkpoint is written under a temporary name, flushed, and renamed; its checkpoint.json has the
SHA-256 of every file. Tensors are one safetensors file, or a distributed checkpoint where the
model was sharded; that one is read with pickle, so only from folders one trusts.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from dessilbi.files.runs import TrainingError, free_path
from dessilbi.files.sealing import sealed, unsealed
from dessilbi.files.storage import (
    DamagedFileError,
    as_json,
    check_unlinked,
    draft_folder,
    read_json,
    sha256_of,
    sync_file,
    sync_folder,
    to_json,
    told_by,
)
from dessilbi.files.tensorfiles import load_tensors, save_tensors
from dessilbi.training.engine import Engine
from dessilbi.training.state import Tensors, whole

FORMAT = "dessilbi.checkpoint"
VERSION = 1
FACTS, RANKS, WHOLE, SHARDS = "checkpoint.json", "ranks.json", "state.safetensors", "shards"


class UntrustedError(ValueError):
    """A file can execute code when it is read, and nobody said that it may."""


@dataclass(frozen=True)
class Checkpoint:
    """A saved moment of a run, verified.

    Attributes:
        folder: Where it lies.
        facts: Step, position, logs and all else that is the same in every process.
        ranks: What each process had for itself.
        trusted: Whether the user said that it may be read with pickle.
    """

    folder: FilePath
    facts: dict[str, Any]
    ranks: list[dict[str, Any]]
    trusted: bool = False

    @property
    def step(self) -> int:
        """Steps done when it was saved."""
        return int(self.facts["step"])

    def tensors(self, templates: Callable[[Mapping[str, Any]], Tensors]) -> Tensors:
        """Read the tensors; every process must call this.

        Args:
            templates: From the listing of a distributed checkpoint to tensors to load into.

        Raises:
            DamagedFileError: The file cannot be read.
        """
        if self.facts["listed"] is None:
            return load_tensors(self.folder / WHOLE)
        assert self.trusted  # or newest() would have refused it
        import torch.distributed as dist
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        tensors = templates(self.facts["listed"])
        alone = not (dist.is_available() and dist.is_initialized())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # meant so
            try:
                load(tensors, checkpoint_id=self.folder / SHARDS, no_dist=alone)
            except CheckpointException as error:  # not an Exception, but a BaseException
                causes = [cause for cause, *_ in error.failures.values()]
                reason = told_by(causes[0] if causes else error)
                raise DamagedFileError(
                    f"{self.folder / SHARDS} cannot be read ({reason})"
                ) from None
        return tensors


class Checkpoints:
    """The checkpoints of a run: the latest few, and the best at the end of an epoch.

    Args:
        folder: Their folder; made when the first is saved.
        engine: Of the run.
        keep: How many of the latest stay.
    """

    def __init__(self, folder: FilePath, engine: Engine, *, keep: int):
        self.folder, self.engine, self.keep = folder, engine, keep

    def save(self, tensors: Tensors, facts: Mapping[str, Any], ranks: list[dict[str, Any]]) -> None:
        """Write a checkpoint; every process must call this.

        Args:
            tensors: As ``state.tensors_of`` returns them.
            facts: Plain JSON values, with "step" and "score" (larger is better, None: not judged).
            ranks: Plain JSON values of each process.

        Raises:
            OSError: It could not be written; those before it are untouched.
        """
        draft = self.engine.on_first(lambda: self._draft(int(facts["step"])))
        if draft is None:
            return
        try:
            listed = None
            if self.engine.sharded:
                from torch.distributed.checkpoint.state_dict_saver import save

                save(tensors, checkpoint_id=draft / SHARDS)
                listed = {name: [list(t.shape), _dtype(t)] for name, t in tensors.items()}
            full = {
                **facts,
                "format": FORMAT,
                "version": VERSION,
                "listed": listed,
            }
            self.engine.on_first(lambda: self._finish(draft, tensors, full, ranks))
        except BaseException:
            if self.engine.first:
                shutil.rmtree(draft, ignore_errors=True)
            raise

    def newest(
        self, fits: Callable[[Checkpoint], None], *, trusted: bool = False
    ) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None if the run has none at all.

        Only the first process may call this. One that cannot be used is renamed and warned about.

        Args:
            fits: Raises DamagedFileError where the run no longer has what the checkpoint needs.
            trusted: Whether the user allows one that is read with pickle.

        Raises:
            DamagedFileError: There are checkpoints, but none can be used.
            UntrustedError: It is read with pickle, and the user did not allow that.
        """
        for folder in reversed(self._folders()):
            try:
                checkpoint = verified(folder)
                with usable(checkpoint):
                    fits(checkpoint)
            except DamagedFileError as error:
                # Out of the way, because the run will come to this step again.
                aside = free_path(folder.parent, f"aside-{folder.name}")
                folder.rename(aside)
                warnings.warn(f"{error}; {folder.name} is kept as {aside.name}", stacklevel=2)
                continue
            if checkpoint.facts["listed"] is not None and not trusted:
                raise UntrustedError(
                    f"the checkpoint {folder} was saved with --strategy fsdp2, and reading it can "
                    f"execute code that it contains: if you trust this folder, say "
                    f"--trust-checkpoint"
                )
            return replace(checkpoint, trusted=trusted)
        if any(self.folder.glob("aside-*")):
            raise DamagedFileError(
                f"no checkpoint in {self.folder} can be used: restore one from a copy, or train "
                f"again into another folder"
            )
        return None

    def latest(self) -> FilePath | None:
        """Return the folder of the latest checkpoint, unread."""
        return max(self._folders(), default=None)

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step.

        Raises:
            FileNotFoundError: None is kept; the message lists those that are.
            DamagedFileError: It is damaged.
        """
        if not self._place(step).is_dir():
            steps = [folder.name.removeprefix("step-").lstrip("0") for folder in self._folders()]
            kept = f"kept are those of step {', '.join(steps)}" if steps else "none is kept"
            raise FileNotFoundError(
                f"{self.folder} has no checkpoint of step {step} ({kept}): train with "
                f"checkpoint_every and keep_checkpoints that keep it, or choose by step, epoch or "
                f"--early alone"
            )
        return verified(self._place(step))

    def sweep(self) -> None:
        """Remove what killed processes left unfinished. Only for the process with the lock."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _folders(self) -> list[FilePath]:
        return sorted(f for f in self.folder.glob("step-*") if f.is_dir())

    def _place(self, step: int) -> FilePath:
        return self.folder / f"step-{step:010d}"

    def _draft(self, step: int) -> FilePath | None:
        """A temporary folder for the checkpoint of a step, or None if it is there already."""
        place = self._place(step)
        if place.exists():
            return None
        self.folder.mkdir(exist_ok=True)
        return draft_folder(place)

    def _finish(
        self,
        draft: FilePath,
        tensors: Tensors,
        facts: dict[str, Any],
        ranks: list[dict[str, Any]],
    ) -> None:
        if facts["listed"] is None:
            save_tensors(whole(tensors), draft / WHOLE)
        (draft / RANKS).write_text(to_json({"ranks": ranks}))
        files = {str(f.relative_to(draft)): sha256_of(f) for f in _files(draft)}
        (draft / FACTS).write_bytes(as_json(sealed({**facts, "files": files})))
        for file in (draft / WHOLE, draft / RANKS, draft / FACTS):
            if file.exists():
                sync_file(file)
        sync_folder(draft)
        place = self._place(facts["step"])
        draft.rename(place)
        sync_folder(self.folder)
        self._prune()

    def _prune(self) -> None:
        folders = self._folders()
        scores = {f: _score(f) for f in folders}
        judged = [f for f in folders if scores[f] is not None]
        best = max(judged, key=lambda f: (scores[f], f.name), default=None)
        for folder in folders[: -self.keep]:
            if folder != best:
                # Under its own name it would look whole while it goes.
                shutil.rmtree(folder.rename(self.folder / f".{folder.name}.old"))


def _score(folder: FilePath) -> float | None:
    try:
        score = read_json(folder / FACTS).get("score")
    except (DamagedFileError, FileNotFoundError):  # found out when it is to be used
        return None
    return score if isinstance(score, float) else None


def verified(folder: FilePath) -> Checkpoint:
    """Read a checkpoint, tensors left out, and compare all of its files with their checksums.

    Raises:
        DamagedFileError: They do not match, or it is of another release.
    """
    damaged = DamagedFileError(f"the checkpoint {folder} is damaged (its checksums do not match)")
    try:
        check_unlinked(folder)
        facts = unsealed(read_json(folder / FACTS))
        found = {
            str(f.relative_to(folder)): sha256_of(f) for f in _files(folder) if f.name != FACTS
        }
        if facts is None or facts["format"] != FORMAT or facts["files"] != found:
            raise damaged
        if facts["version"] == VERSION:
            ranks = read_json(folder / RANKS)["ranks"]
            if not (_fits(facts) and isinstance(ranks, list) and ranks):
                raise damaged
            return Checkpoint(folder, facts, ranks)
    except (DamagedFileError, FileNotFoundError, KeyError):
        raise damaged from None
    raise DamagedFileError(
        f"the checkpoint {folder} has format version {told_by(facts['version'], 40)}, and this "
        f"release reads {VERSION}"
    )


@contextmanager
def usable(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Say in one sentence that a checkpoint, though whole, cannot be put to use.

    Raises:
        DamagedFileError: Of whatever a block raises on what the checkpoint holds.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if checkpoint is None or isinstance(e, DamagedFileError | TrainingError):
            raise
        raise DamagedFileError(
            f"the checkpoint {checkpoint.folder} cannot be used ({told_by(e)}): it is of another "
            f"run or release, or was changed"
        ) from None


def _fits(facts: Mapping[str, Any]) -> bool:
    """Whether what is read before the run goes on is of the right kind."""
    tables = ("position", "path", "logs", "engine")
    step, listed = facts["step"], facts["listed"]
    return (
        type(step) is int
        and 0 <= step < 1 << 62
        and (listed is None or isinstance(listed, dict))
        and all(isinstance(facts[name], dict) for name in tables)
    )


def _files(folder: FilePath) -> list[FilePath]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
