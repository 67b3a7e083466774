# SPDX-License-Identifier: Apache-2.0
"""Environment: what a run ran on, recorded beside its results."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Flush denormals to zero meanwhile: weights that decay end in them, many times slower."""
    kept = bool(torch.full((), 1e-42).mul(1.0) != 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(not kept)


_PACKAGES = (
    *("dessilbi", "torch", "lightning-fabric", "numpy", "safetensors", "scikit-learn"),
    *("pydantic", "typer"),
)


def environment() -> dict[str, Any]:
    """Return versions, machine and thread counts as plain JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "command": sys.argv[1:],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
