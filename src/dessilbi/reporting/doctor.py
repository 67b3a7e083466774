# SPDX-License-Identifier: Apache-2.0
"""Doctor: what this machine has that a run would use."""

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path as FilePath

from dessilbi.kernels import building
from dessilbi.optimizers.fusing import kernel_for
from dessilbi.training.data import DATA_SETS, TEXTS, read_text
from dessilbi.training.environment import environment


def findings(data_root: str | None) -> Iterator[tuple[str, str]]:
    """Yield (what, finding) pairs: versions, devices, kernels, data found, write access.

    Args:
        data_root: The data folder, or None.
    """
    facts = environment()
    yield "python", f"{facts['python']} on {facts['platform']}"
    for name, version in facts["packages"].items():
        yield name, version or "not installed"
    devices = ", ".join(facts["accelerators"]) or "no accelerator"
    yield "devices", f"{facts['cpus']} CPUs, {facts['threads']} threads, {devices}"
    yield "kernels", f"reference, foreach (default on accelerators), {_fused()}"
    yield from _data(data_root)
    yield "runs", _write_access(FilePath("runs"))


def _fused() -> str:
    if (kernel := kernel_for("cpu", asked=True)) is not None:
        return f"{kernel.name} (built)"
    try:
        return f"fused-cpu (fused=True builds it with {building.compiler()[0]})"
    except building.NoKernelError as error:
        return f"fused-cpu (cannot be built: {error})"


def _data(root: str | None) -> Iterator[tuple[str, str]]:
    yield "data", root or "no folder given: use --data DIR or set $DESSILBI_DATA"
    readers: dict[str, Callable[[], object]] = {
        name: partial(source.read, root, False) for name, source in DATA_SETS.items()
    }
    readers |= {name: partial(read_text, root, file, name=name) for name, file in TEXTS.items()}
    for name, read in readers.items():
        try:
            read()
            yield "", f"{name}: ready"
        except (OSError, ValueError) as error:
            yield "", f"{name}: {error}"


def _write_access(folder: FilePath) -> str:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        return f"{place} is not writable: name another folder with --out"
    try:
        with tempfile.TemporaryFile(dir=place):
            return f"{place} is writable"
    except OSError as error:
        return f"{place} is not writable ({error.strerror}): name another folder with --out"
