# SPDX-License-Identifier: Apache-2.0
"""Environment: what a run ran on, recorded beside its results."""

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

_PACKAGES = ("dessilbi", "torch", "numpy", "safetensors", "scikit-learn", "pydantic", "typer")


def environment() -> dict[str, Any]:
    """Return versions, machine and thread counts as plain JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": sys.argv[1:],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
