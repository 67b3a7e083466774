# SPDX-License-Identifier: Apache-2.0
"""Tensors in a file: safetensors, with errors that say in one sentence what is wrong.

Its reader checks every size against the length of the file before it allocates anything.
"""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor

from dessilbi.files.storage import DamagedFileError, check_plain, told_by

LARGEST_HEADER = 16 << 20  # bytes: names and shapes of some 100,000 tensors

# What reading a damaged or hostile file can raise: a type that torch does not know, and so on.
_UNREADABLE = (
    safetensors.SafetensorError,
    AttributeError,
    LookupError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write contiguous tensors that share no memory.

    Raises:
        OSError: The disk is full or not writable.
    """
    try:
        safetensors.torch.save_file(dict(tensors), file)
    except safetensors.SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code), str(file)) from None


def load_tensors(file: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: It is damaged or foreign.
    """
    check_header(file)
    try:
        return safetensors.torch.load_file(file)
    except _UNREADABLE as error:
        raise _damaged(file, error) from None


def open_tensors(file: str | Path, framework: Literal["pt", "numpy"] = "pt") -> Any:
    """Open a file to read its tensors one by one; a context manager.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: It is damaged or foreign.
    """
    check_header(file)
    try:
        return safetensors.safe_open(str(file), framework=framework)
    except _UNREADABLE as error:
        raise _damaged(file, error) from None


def check_header(file: str | Path) -> None:
    """Refuse a header that would take much memory to parse.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: It is too large, or the file is a link or no plain file.
    """
    check_plain(file)
    with Path(file).open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
    if size > LARGEST_HEADER:
        raise DamagedFileError(
            f"{file} cannot be read as safetensors (its header says {size:,} bytes): it is "
            f"damaged or foreign; restore it from a copy"
        )


def _damaged(file: str | Path, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"{file} cannot be read as safetensors ({told_by(error)}): it is damaged or foreign; "
        f"restore it from a copy"
    )
