# SPDX-License-Identifier: Apache-2.0
"""Sealing: the checksums of a run folder, in one file (no torch here).

What never changes is listed when the folder is made; weights, path and logs join it when the run
has ended. A run that goes on after all takes the latter out again before it touches them, so that
the list never contradicts the files, however a process ends. Checksums tell damage, not authorship.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from dessilbi.files.storage import (
    DamagedFileError,
    as_json,
    check_plain,
    read_json,
    sha256_of,
    to_json,
    told_by,
    write_atomic,
)

NAME = "checksums.json"
FORMAT = "dessilbi.checksums"
VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``value`` with a checksum of itself, for :func:`unsealed`.

    >>> unsealed(sealed({"a": 1}))
    {'a': 1}
    """
    return {**value, "checksum": checksum_of(value)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``value`` without its checksum, or None if that does not match or is missing."""
    rest = {key: item for key, item in value.items() if key != "checksum"}
    try:
        return rest if value.get("checksum") == checksum_of(rest) else None
    except (ValueError, RecursionError):  # half a surrogate pair has no bytes
        return None


def checksum_of(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, whatever file they are in."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Seal:
    """SHA-256 by name of file.

    Attributes:
        constant: What has been there since the folder was made.
        final: What the run ended with; None while it has not ended.
    """

    constant: Mapping[str, str]
    final: Mapping[str, str] | None = None

    @property
    def files(self) -> dict[str, str]:
        """All of them."""
        return {**self.constant, **(self.final or {})}

    def content(self) -> bytes:
        """Return the file to write."""
        told: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "constant": dict(self.constant),
            "final": None if self.final is None else dict(self.final),
        }
        return as_json(sealed(told))


def read_sealed(file: Path) -> dict[str, Any]:
    """Read a JSON file of a run folder that carries its own checksum; older runs' have none.

    Raises:
        DamagedFileError: It does not match, or is not a JSON object.
        FileNotFoundError: There is no such file.
    """
    told = read_json(file)
    if "checksum" not in told and not (file.parent / NAME).exists():
        return told
    rest = unsealed(told)
    if rest is None:
        raise DamagedFileError(
            f"{file} does not match its checksum: it is damaged or was changed; restore it from a "
            f"copy"
        )
    return rest


def seal_of(files: Mapping[str, bytes]) -> Seal:
    """Return the seal of a folder that is about to be made with these files."""
    return Seal({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def read_seal(folder: Path) -> Seal | None:
    """Return the seal of a folder, or None if it has none: older runs do not.

    Raises:
        DamagedFileError: The file is damaged.
    """
    file = folder / NAME
    if not file.exists() and not file.is_symlink():
        return None
    told = unsealed(read_json(file))
    if told is None or told.get("format") != FORMAT:
        raise DamagedFileError(f"{file} is damaged: restore it from a copy")
    if told.get("version") != VERSION:
        raise DamagedFileError(
            f"{file} has format version {told_by(told.get('version'), 40)}, and this release "
            f"reads {VERSION}: upgrade dessilbi"
        )
    constant, final = told.get("constant"), told.get("final")
    if not _is_list(constant) or not (final is None or _is_list(final)):
        raise DamagedFileError(f"{file} does not list names and checksums: restore it from a copy")
    return Seal(constant, final)


def _is_list(part: object) -> TypeGuard[dict[str, str]]:
    """Whether it maps plain names to checksums; a name never leads out of the folder."""
    return isinstance(part, dict) and all(
        isinstance(value, str) and _NAME.fullmatch(name) for name, value in part.items()
    )


def close_seal(folder: Path, files: Iterable[Path]) -> None:
    """Add what a run ended with; files that are not there are left out. Older runs stay as is."""
    seal = read_seal(folder)
    if seal is not None:
        final = {file.name: sha256_of(file) for file in files if file.is_file()}
        write_atomic(folder / NAME, replace(seal, final=final).content())


def add_to_seal(file: Path) -> None:
    """List a file that has just been written and will not change. Older runs stay as is."""
    seal = read_seal(file.parent)
    if seal is not None:
        constant = {**seal.constant, file.name: sha256_of(file)}
        write_atomic(file.parent / NAME, replace(seal, constant=constant).content())


def reopen_seal(folder: Path) -> None:
    """Take out again what a run ended with, before it changes."""
    seal = read_seal(folder)
    if seal is not None and seal.final is not None:
        write_atomic(folder / NAME, replace(seal, final=None).content())


def check_sealed(*files: Path) -> None:
    """Compare files of a folder with its seal, as far as they are listed there.

    Raises:
        DamagedFileError: One is not what was written, or no plain file.
        FileNotFoundError: One is listed and not there.
    """
    for file in files:
        check_plain(file)
    seal = read_seal(files[0].parent)
    listed = {} if seal is None else seal.files
    for file in files:
        told = listed.get(file.name)
        if told is not None and not file.exists():
            raise FileNotFoundError(f"{file} is missing: restore it from a copy or train again")
        if told is not None and sha256_of(file) != told:
            raise DamagedFileError(
                f"{file} does not match its checksum in {NAME}: it is damaged or was changed; "
                f"restore it from a copy or train again"
            )
