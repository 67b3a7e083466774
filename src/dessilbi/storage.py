# SPDX-License-Identifier: Apache-2.0
"""Durable files: a file is there whole or not at all, and a log keeps every finished line.

Everything the project writes goes through these few functions (no torch here). A whole file is
written beside its place, flushed to the disk and renamed over it; a log is only ever appended to.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any


class DamagedFileError(ValueError):
    """A file is not what it should be; the message names it and says what to do."""


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that readers see the old file or the new one, never a part.

    Args:
        path: The file; its folder must exist.
        data: The whole content.

    Raises:
        OSError: The disk is full or the folder is not writable; the old file is untouched.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # it names the temporary file, which means nothing to the caller
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in ``folder`` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as indented strict JSON (atomically); see :func:`to_json`."""
    write_atomic(path, (to_json(value, indent=2) + "\n").encode())


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON; an infinite number becomes "inf" or "-inf", NaN becomes "nan".

    >>> to_json({"lam": float("inf"), "lr": 0.1})
    '{"lam": "inf", "lr": 0.1}'
    """
    return json.dumps(_strict(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def from_number(value: object) -> float:
    """Read a number that :func:`to_json` may have written as a word.

    Raises:
        ValueError: It is neither.

    >>> from_number("inf")
    inf
    """
    if value in ("inf", "-inf", "nan"):
        return float(str(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def append_line(path: str | Path, value: Mapping[str, Any]) -> None:
    """Append ``value`` as one line of strict JSON and flush it to the disk.

    A line that could not be written whole (the disk is full) is taken back, so that the file
    always ends with a finished line.

    Raises:
        OSError: The line could not be written; every earlier line is still there.
    """
    data = (to_json(value) + "\n").encode()
    with Path(path).open("ab+", buffering=0) as file:
        end = _cut_torn_line(file)
        try:
            written = file.write(data)
            if written != len(data):
                raise OSError(28, "No space left on device", str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; a torn last line is passed over.

    Raises:
        DamagedFileError: A line that is followed by others is not a JSON object.
        FileNotFoundError: There is no such file.
    """
    content = Path(path).read_bytes()
    # What follows the last newline was never finished: the process died while writing it.
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise DamagedFileError(
                f"{path}, line {number}, is not a JSON object: the file is damaged or not ours; "
                f"restore it from a copy or train again"
            )
        yield value


def _cut_torn_line(file: FileIO) -> int:
    """Remove a last line that a killed process left unfinished; return the file's end."""
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            end = (file.readall() or b"").rfind(b"\n") + 1
            file.truncate(end)
    return end


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedFileError: The file is not a JSON object.
        FileNotFoundError: There is no such file.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} is not a JSON object: the file is damaged or not ours")
    return value
