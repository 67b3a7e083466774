# SPDX-License-Identifier: Apache-2.0
"""The idx file format of the MNIST family: a header with the dimensions, then plain bytes.

Nothing is allocated before the header has been found to agree with the length of the file.
"""

import gzip
import zlib
from io import BufferedIOBase
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_UBYTE = 0x08
# Deflate cannot pack more tightly, so a small file that promises more than this is lying.
_MAX_GZIP_RATIO = 1032


def read_idx(path: Path, *, ndim: int) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes in the idx file ``path``, unpacked if it ends in ``.gz``.

    Args:
        path: The file.
        ndim: How many dimensions the array must have: 3 for images, 1 for labels.

    Raises:
        ValueError: The file is foreign, truncated, longer than its header says, or damaged.
        OSError: The file cannot be read.
    """
    packed = path.suffix == ".gz"
    size = path.stat().st_size
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            shape = _read_shape(stream, path, ndim)
            expected = 4 + 4 * ndim + prod(shape)
            if expected > size * _MAX_GZIP_RATIO if packed else expected != size:
                raise _damaged(path, f"{expected} bytes by its header, {size} on the disk")
            array = np.empty(prod(shape), dtype=np.uint8)
            if stream.readinto(array.data) != array.size or stream.read(1):
                raise _damaged(path, f"not the {expected} bytes of its header")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, "its gzip packing is broken") from error
    return array.reshape(shape)


def _read_shape(stream: BufferedIOBase, path: Path, ndim: int) -> tuple[int, ...]:
    header = stream.read(4 + 4 * ndim)
    if header[:4] != bytes((0, 0, _UBYTE, ndim)):
        raise ValueError(
            f"{path} is not an idx file of {ndim}-dimensional unsigned bytes: it starts with "
            f"{header[:4].hex() or 'nothing'} instead of {bytes((0, 0, _UBYTE, ndim)).hex()}; "
            f"put the original file there"
        )
    if len(header) < 4 + 4 * ndim:
        raise _damaged(path, "it ends inside its header")
    return tuple(int(length) for length in np.frombuffer(header, dtype=">u4", offset=4))


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is truncated or damaged ({reason}): delete it and fetch the original again"
    )
