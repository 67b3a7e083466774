# SPDX-License-Identifier: Apache-2.0
"""Building the native kernel: one compiler call, on request, into the user's cache.

The library has a plain C interface and holds nothing of torch, so it is named after its source and
the processor it was built for. ``DESSILBI_CACHE`` names another folder for it.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("g++", "clang++", "c++")
# Sums and products keep their order and rounding: the numbers do not depend on the compiler.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
NATIVE = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler knows
_TIMEOUT = 300.0  # seconds


class NoKernelError(RuntimeError):
    """The native kernel cannot be had on this machine; the message says why."""


def cache_folder() -> Path:
    """Return where built kernels lie."""
    if told := os.environ.get("DESSILBI_CACHE"):
        return Path(told)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dessilbi"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dessilbi"


@lru_cache
def _processor() -> str:
    """What decides which instructions the kernel may use."""
    told = [platform.system(), platform.machine(), platform.processor()]
    try:
        with Path("/proc/cpuinfo").open() as lines:
            told += [next((line for line in lines if line.startswith(("flags", "Features"))), "")]
    except OSError:
        pass
    return "\n".join(told)


@lru_cache
def _key() -> str:
    digest = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.read_bytes())
    digest.update(repr((FLAGS, _processor())).encode())
    return digest.hexdigest()[:16]


def library_file() -> Path:
    """Return where the kernel of this release for this processor lies, built or not."""
    return cache_folder() / f"step-{_key()}.so"


def find() -> Path | None:
    """Return the built kernel, or None; never builds."""
    file = library_file()
    return file if file.is_file() else None


def compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, or the first known one there is.

    Raises:
        NoKernelError: There is none.
    """
    if told := os.environ.get("CXX"):
        return shlex.split(told)
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise NoKernelError(
        f"no C++ compiler was found ({', '.join(COMPILERS)}): install one or set CXX"
    )


def build() -> Path:
    """Return the built kernel; compile it first if it is not there (some seconds, once).

    Safe against other processes that do the same.

    Raises:
        NoKernelError: There is no compiler, it fails, or the cache cannot be written to.
    """
    if found := find():
        return found
    command, file = compiler(), library_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            return find() or _compile(command, file)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernelError(
            f"building the native kernel into {file.parent} failed: {error}"
        ) from None


def _compile(command: list[str], file: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        for native in NATIVE:
            done = subprocess.run(  # noqa: S603  # the user's own compiler
                [*command, *FLAGS, *native, str(SOURCES / "step.cpp"), "-o", str(made)],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
            )
            if done.returncode == 0 and made.is_file():
                made.replace(file)  # at once: nobody ever sees half a library
                return file
    first = next((line for line in done.stderr.splitlines() if line.strip()), "no message")
    raise NoKernelError(f"{shlex.join(command)} could not compile the native kernel: {first}")
