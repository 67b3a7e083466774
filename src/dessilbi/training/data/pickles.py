# SPDX-License-Identifier: Apache-2.0
"""Pickles of plain values and arrays of bytes, read without running anything they name.

CIFAR comes as pickles. A pickle may name any function and have it called; here the three names
that an array needs stand for classes of ours, every other name is refused, and numpy itself never
sees what the file says.
"""

import pickle
import pickletools
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dessilbi.files.storage import told_by

LARGEST = 512 << 20  # bytes


class _Name:
    """The class of an array: a name to be passed on, which can neither be called nor changed."""

    __slots__ = ()


class _Dtype:
    """The type of an array's elements; only unsigned bytes are allowed."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of bytes")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment: bytes have none."""


class _Array:
    """An array while it is read: its state is checked before an array is made of it."""

    values: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __init__(self, *_: object) -> None:
        """Ignore the class, shape and type that numpy starts from: the state has its own."""

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), _Dtype(), bool() | int() as by_columns, bytes(content)):
                pass
            case _:
                raise pickle.UnpicklingError("it holds an array that is not one")
        lengths_fit = all(type(n) is int and n >= 0 for n in shape) and len(content) == prod(shape)
        if by_columns or not lengths_fit:
            raise pickle.UnpicklingError(f"{len(content)} bytes are not an array of {shape}")
        self.values = np.frombuffer(content, np.uint8).reshape(shape)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Name(),
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]


def _check_sizes(content: bytes) -> None:
    """Refuse what says that it is longer than the file, before memory is allocated for it."""
    for opcode, argument, _ in pickletools.genops(content):  # lengths of texts, it checks itself
        if opcode.name.endswith("PUT") and argument is not None and argument > len(content):
            raise pickle.UnpicklingError(f"it numbers a value {argument}")


def read_pickle(path: Path) -> dict[bytes, Any]:
    """Return the dictionary in a pickle written by Python 2 or 3.

    Keys and texts are bytes; arrays are uint8 and read-only.

    Raises:
        ValueError: It holds something else than a dictionary of plain values and arrays of
            bytes, or it is truncated or damaged.
        OSError: The file cannot be read.
    """
    if path.stat().st_size > LARGEST:
        raise _refused(path, f"it has more than {LARGEST >> 20} MiB")
    content = path.read_bytes()
    try:
        _check_sizes(content)
        found = _Unpickler(BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise _refused(path, str(error) or type(error).__name__) from None
    if not isinstance(found, dict):
        raise _refused(path, f"it holds a {type(found).__name__}")
    return {
        key.encode() if isinstance(key, str) else key: (
            value.values if isinstance(value, _Array) else value
        )
        for key, value in found.items()
    }


def _refused(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is not a pickle of plain values and bytes ({told_by(reason)}): "
        f"delete it and fetch the original again"
    )
