# SPDX-License-Identifier: Apache-2.0
"""Building the native kernel: one compiler call, on request, into the user's cache.

The library has a plain C interface and holds nothing of torch. Its file is named after its source,
the processor and C library it was built for, and its own content: what is cut short, altered or
from elsewhere is not found. ``DESSILBI_CACHE`` names another folder; it may be deleted at any time.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
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
_DIGITS = 16  # of a digest in a name


class NoKernelError(RuntimeError):
    """The native kernel cannot be had on this machine; the message says why."""


def cache_folder() -> Path:
    """Return where built kernels lie.

    Raises:
        NoKernelError: The user has no home folder and names no other.
    """
    if told := os.environ.get("DESSILBI_CACHE"):
        return Path(told)
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "dessilbi"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dessilbi"
    except RuntimeError:
        raise NoKernelError(
            "there is no home folder to keep the built kernel in: name one with DESSILBI_CACHE"
        ) from None


@lru_cache
def _processor() -> str:
    """What decides which instructions the kernel may use, and where it can be loaded."""
    told = [platform.system(), platform.machine(), platform.processor(), *platform.libc_ver()]
    try:
        with Path("/proc/cpuinfo").open() as lines:
            told += [next((line for line in lines if line.startswith(("flags", "Features"))), "")]
    except OSError:
        pass
    return "\n".join(told)


@lru_cache
def _key() -> str:
    digest = hashlib.sha256(repr((FLAGS, _processor())).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:_DIGITS]


def place() -> Path:
    """Return how the file of the kernel of this release for this processor begins.

    Raises:
        NoKernelError: There is no place for it, or its source is not there.
    """
    try:
        return cache_folder() / f"step-{_key()}"
    except OSError as error:
        raise NoKernelError(f"the source of the native kernel cannot be read: {error}") from None


def find() -> Path | None:
    """Return the built kernel, or None; never builds."""
    try:
        start = place()
    except NoKernelError:
        return None
    for file in sorted(start.parent.glob(f"{start.name}-*.so")):
        try:
            stat = file.stat()
            if file.stem.endswith(_content(file, stat.st_mtime_ns, stat.st_size)):
                return file
        except OSError:
            continue
    return None


@lru_cache
def _content(file: Path, changed: int, size: int) -> str:
    """What the name of a whole library ends in; read again only if the file has changed."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGITS]


def compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, or the first known one there is.

    Raises:
        NoKernelError: There is none.
    """
    if told := os.environ.get("CXX", "").strip():
        try:
            return shlex.split(told)
        except ValueError as error:
            raise NoKernelError(f"CXX={told!r} is no command: {error}") from None
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
    start, command = place(), compiler()
    try:
        start.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            # Where there are no locks, at worst both compile, and one file stays.
            with suppress(NotImplementedError):
                stack.enter_context(FileLock(f"{start}.lock", timeout=2 * _TIMEOUT))
            return find() or _compile(command, start)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernelError(
            f"building the native kernel into {start.parent} failed: {error}"
        ) from None


def _compile(command: list[str], start: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=start.parent, ignore_cleanup_errors=True) as folder:
        made = Path(folder) / "step.so"
        for native in NATIVE:
            done = subprocess.run(  # noqa: S603  # the user's own compiler
                [*command, *FLAGS, *native, str(SOURCES / "step.cpp"), "-o", str(made)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT,
                check=False,
            )
            if done.returncode == 0 and made.is_file():
                stat = made.stat()
                content = _content(made, stat.st_mtime_ns, stat.st_size)
                return made.replace(f"{start}-{content}.so")  # at once: nobody sees half of it
    told = [line for line in done.stderr.splitlines() if line.strip()]
    first = next((line for line in told if "error" in line), told[0] if told else "no message")
    raise NoKernelError(f"{shlex.join(command)} could not compile the native kernel: {first}")
