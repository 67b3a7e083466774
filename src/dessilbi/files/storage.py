# SPDX-License-Identifier: Apache-2.0
"""Durable files: a file is there whole or not at all, and a log keeps every finished line.

Everything the project writes goes through these few functions (no torch here). A whole file is
written beside its place, flushed to the disk and renamed over it; a log is only ever appended to.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

LARGEST = 64 << 20  # bytes of a JSON file
LONGEST = 192 << 20  # bytes of a line; the path of 10^9 single weights has lines of that size
MANY = 1 << 22  # values in one JSON text: an empty list takes 2 bytes there and 56 in memory
_PIECE = 1 << 20  # bytes


class DamagedFileError(ValueError):
    """A file is not what it should be; the message names it and says what to do."""


def told_by(error: object, longest: int = 200) -> str:
    r"""Return what an error says in one line that a person can read: it may quote a whole file.

    >>> told_by(ValueError("one\ntwo"))
    'one two'
    """
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= longest else f"{line[:longest]}..."


def check_plain(path: str | Path) -> None:
    """Refuse a link, which may lead anywhere, and a pipe or device, which may never end.

    Raises:
        DamagedFileError: ``path`` is there and is not a plain file.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise DamagedFileError(
            f"{path} is a link or not a plain file, and only plain files are read here: "
            f"put the file itself there"
        )


def check_unlinked(folder: Path) -> None:
    """Refuse a folder in which anything, at any depth, is a link or not a plain file or folder.

    Raises:
        DamagedFileError: The message names the first.
    """
    for parent, folders, files in os.walk(folder):  # does not follow links
        for name in sorted(files):
            check_plain(Path(parent, name))
        for name in sorted(folders):
            if Path(parent, name).is_symlink():
                raise DamagedFileError(
                    f"{Path(parent, name)} is a link, and nothing outside of {folder} is read or "
                    f"written: put the folder itself there"
                )


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that readers see the old file or the new one, never a part.

    Args:
        path: The file; its folder must exist.
        data: The whole content.

    Raises:
        OSError: The disk is full or the folder is not writable; the old file is untouched.
    """
    _write_pieces(Path(path), (data,))


def _write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # it names the temporary file, which means nothing to the caller
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        _open_up(Path(temporary), 0o666)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def draft_folder(place: Path) -> Path:
    """Make a folder beside ``place``, to be filled and then renamed to it.

    Raises:
        OSError: The folder above is not there or not writable.
    """
    try:
        draft = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    except OSError as error:  # as above
        raise type(error)(error.errno, error.strerror, str(place)) from None
    _open_up(draft, 0o777)
    return draft


def _open_up(path: Path, mode: int) -> None:
    """Temporary things are private; a result is as readable as any other file of the user."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def sync_file(path: Path) -> None:
    """Make what was written to ``path`` survive a power cut, readable as the user's other files."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    _open_up(path, 0o666)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in ``folder`` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder that is there with all of its files or not at all.

    Yields:
        A folder beside ``path`` to write into; it takes its name when the block ends well.

    Raises:
        FileExistsError: There is a file of that name, or a folder with files in it.
        OSError: The disk is full or not writable; nothing is left behind.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise FileExistsError(
            f"{path} exists and is not an empty folder: nothing is ever overwritten; name another"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = draft_folder(path)
    try:
        yield temporary
        for file in temporary.iterdir():
            sync_file(file)
        sync_folder(temporary)
        if path.exists():
            path.rmdir()
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def sha256_of(path: str | Path) -> str:
    """Return the checksum of a file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as indented strict JSON (atomically); see :func:`to_json`."""
    write_atomic(path, as_json(value))


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return the content of a file of indented strict JSON."""
    return (to_json(value, indent=2) + "\n").encode()


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


def length_of(path: str | Path) -> dict[str, int]:
    """Return how far a log has come, its bytes and their checksum, for :func:`cut_back`."""
    path = Path(path)
    size = path.stat().st_size if path.exists() else 0
    return {"bytes": size, "crc": _crc(path, size)}


def cut_back(path: str | Path, size: int, crc: int | None = None) -> None:
    """Keep the first ``size`` bytes of a log and drop what was written after them, atomically.

    Args:
        path: The log.
        size: Bytes to keep.
        crc: Their CRC-32, if known.

    Raises:
        DamagedFileError: The file is shorter than that or begins otherwise.
        OSError: The file cannot be written; it is as before.
    """
    path = Path(path)
    check_begins(path, size, crc)
    if size < (path.stat().st_size if path.exists() else 0):
        _write_pieces(path, _pieces(path, size))


def check_begins(path: Path, size: int, crc: int | None = None) -> None:
    """Check the first ``size`` bytes of a log; see :func:`cut_back`.

    Raises:
        DamagedFileError: The file is shorter than that or begins otherwise.
    """
    check_plain(path)
    found = path.stat().st_size if path.exists() else 0
    if found < size or crc not in (None, _crc(path, size)):
        raise DamagedFileError(
            f"{path} no longer holds the {size} bytes that were written to it: "
            f"restore it from a copy or train again"
        )


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    """The first ``size`` bytes of a file, a little at a time."""
    with path.open("rb") as file:
        while size > 0 and (piece := file.read(min(size, _PIECE))):
            size -= len(piece)
            yield piece


def _crc(path: Path, size: int) -> int:
    crc = 0
    for piece in _pieces(path, size) if size else ():
        crc = zlib.crc32(piece, crc)
    return crc


def sweep(folder: Path, names: Iterable[str]) -> None:
    """Remove what killed processes left of half-written files with these names.

    Only for a folder that nobody else writes to.
    """
    for name in names:
        for leftover in folder.glob(f".{name}.????????"):
            leftover.unlink(missing_ok=True)


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; a torn last line is passed over.

    Raises:
        DamagedFileError: A line that is followed by others is not a JSON object.
        FileNotFoundError: There is no such file.
    """
    check_plain(path)
    with Path(path).open("rb") as file:
        number = 0
        # What follows the last newline was never finished: the process died while writing it.
        while (line := file.readline(LONGEST)).endswith(b"\n") or len(line) == LONGEST:
            number += 1
            value = _object(line)
            if value is None:
                raise DamagedFileError(
                    f"{path}, line {number}, is not a JSON object: the file is damaged or not "
                    f"ours; restore it from a copy or train again"
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
        DamagedFileError: The file is not a JSON object, or too large to be one of ours.
        FileNotFoundError: There is no such file.
    """
    check_plain(path)
    small = Path(path).stat().st_size <= LARGEST
    value = _object(Path(path).read_bytes()) if small else None
    if value is None:
        raise DamagedFileError(f"{path} is not a JSON object: the file is damaged or not ours")
    return value


def _object(content: bytes) -> dict[str, Any] | None:
    """Return a JSON object, or None if it is none."""
    try:
        value = from_json(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def from_json(content: bytes) -> Any:
    """Parse JSON; a text that would take far more memory than it is long is refused.

    Raises:
        ValueError: It is not JSON, nested too deeply, or has too many values.

    >>> from_json(b'{"a": [1]}')
    {'a': [1]}
    """
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MANY:
        raise ValueError(f"more than {MANY:,} values")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
