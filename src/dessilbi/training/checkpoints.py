# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: folders that hold all a run needs to go on, each there whole or not at all.

A checkpoint is written under a temporary name, flushed, and renamed; its checkpoint.json has the
SHA-256 of every file. Tensors are one safetensors file, or a distributed checkpoint where the
model was sharded; that one is read with pickle, so only from folders one trusts.
"""

import hashlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dessilbi.runs import free_path
from dessilbi.storage import (
    DamagedFileError,
    as_json,
    draft_folder,
    read_json,
    sync_file,
    sync_folder,
    to_json,
)
from dessilbi.training.engine import Engine
from dessilbi.training.state import Tensors, whole

FORMAT = "dessilbi.checkpoint"
VERSION = 1
FACTS, RANKS, WHOLE, SHARDS = "checkpoint.json", "ranks.json", "state.safetensors", "shards"


@dataclass(frozen=True)
class Checkpoint:
    """A saved moment of a run, verified.

    Attributes:
        folder: Where it lies.
        facts: Step, position, logs and all else that is the same in every process.
        ranks: What each process had for itself.
    """

    folder: FilePath
    facts: dict[str, Any]
    ranks: list[dict[str, Any]]

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
            return _load_whole(self.folder / WHOLE)
        import torch.distributed as dist
        from torch.distributed.checkpoint.state_dict_loader import load

        tensors = templates(self.facts["listed"])
        alone = not (dist.is_available() and dist.is_initialized())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # meant so
            load(tensors, checkpoint_id=self.folder / SHARDS, no_dist=alone)
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

    def newest(self, fits: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None if the run has none at all.

        Only the first process may call this. One that cannot be used is renamed and warned about.

        Args:
            fits: Raises DamagedFileError where the run no longer has what the checkpoint needs.

        Raises:
            DamagedFileError: There are checkpoints, but none can be used.
        """
        for folder in reversed(self._folders()):
            try:
                checkpoint = _verified(folder)
                fits(checkpoint)
                return checkpoint
            except DamagedFileError as error:
                # Out of the way, because the run will come to this step again.
                aside = free_path(folder.parent, f"aside-{folder.name}")
                folder.rename(aside)
                warnings.warn(f"{error}; {folder.name} is kept as {aside.name}", stacklevel=2)
        if any(self.folder.glob("aside-*")):
            raise DamagedFileError(
                f"no checkpoint in {self.folder} can be used: restore one from a copy, or train "
                f"again into another folder"
            )
        return None

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
            safetensors.torch.save_file(whole(tensors), draft / WHOLE)
        (draft / RANKS).write_text(to_json({"ranks": ranks}))
        files = {str(f.relative_to(draft)): _digest(f) for f in _files(draft)}
        facts = {**facts, "files": files}
        (draft / FACTS).write_bytes(as_json({**facts, "checksum": _checksum(facts)}))
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
        score: float | None = read_json(folder / FACTS).get("score")
    except (DamagedFileError, FileNotFoundError):  # found out when it is to be used
        return None
    return score


def _verified(folder: FilePath) -> Checkpoint:
    damaged = DamagedFileError(f"the checkpoint {folder} is damaged (its checksums do not match)")
    try:
        facts = read_json(folder / FACTS)
        told = facts.pop("checksum", None)
        found = {str(f.relative_to(folder)): _digest(f) for f in _files(folder) if f.name != FACTS}
        if told != _checksum(facts) or facts["format"] != FORMAT or facts["files"] != found:
            raise damaged
        if facts["version"] == VERSION:
            return Checkpoint(folder, facts, read_json(folder / RANKS)["ranks"])
    except (DamagedFileError, FileNotFoundError):
        raise damaged from None
    raise DamagedFileError(
        f"the checkpoint {folder} has format version {facts['version']}, and this release reads "
        f"{VERSION}"
    )


def _load_whole(file: FilePath) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{file} cannot be read ({error})") from None


def _files(folder: FilePath) -> list[FilePath]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _digest(file: FilePath) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(facts).encode()).hexdigest()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
