# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed: a child process trains, and dies or meets a full disk where it is told to.

torch is loaded once; every child is a fork of this process. What a child does to files is counted
from outside of the product: ``io.open``, ``os.fsync``, ``os.replace`` and so on are replaced in
the child, and the n-th call kills the process, tears a write in half, or finds the disk full.
"""

import contextlib
import errno
import functools
import io
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import safetensors
import safetensors.torch
import tiny
import torch
from torch import nn

from dessilbi.files.runs import Run
from dessilbi.files.storage import read_json
from dessilbi.models import IMAGE_MODELS, MODELS
from dessilbi.training import loop
from dessilbi.training.data import DATA_SETS, DataSet
from dessilbi.training.data.generated import synthetic

SAME = ("init", "model", "scores", "path", "metrics", "recipe")
# 4 steps an epoch, 8 in all; a point at every second, checkpoints inside epochs and at their end.
SHORT = (
    *("data=fewer", "model=drop", "validation=20", "batch_size=10", "epochs=2", "points=4"),
    *("optimizer.lam=0.02", "optimizer.nu=0.5", "judged=2", "checkpoint_every=0.5"),
    *('structure={"1.weight" = "filter"}',),
)
FEWER = DataSet(lambda root, download: synthetic(num_train=60, num_test=20), mean=0.1, std=0.15)
OK, FAILED_WELL, FAILED_BADLY = 0, 3, 4  # exit codes of a child

# What moves, makes or flushes something; writes are seen at the files themselves.
MOVES = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "chmod")
NEEDS_ROOM = ("write", "save_file", "fsync", "mkdir", "open")


def drop(num_classes, in_channels):
    """Draws random numbers in every step, and keeps statistics."""
    layers = (nn.Flatten(), nn.Linear(784, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))
    return nn.Sequential(*layers, nn.Linear(6, num_classes))


@contextlib.contextmanager
def known():
    """The small net and data set, known by name."""
    nets = {"drop": drop}
    with (
        patch.dict(MODELS, nets),
        patch.dict(IMAGE_MODELS, nets),
        patch.dict(DATA_SETS, fewer=FEWER),
    ):
        yield


@dataclass
class Fault:
    """What is to happen at the n-th event of a process.

    Args:
        at: Which event, from 1; 0 only counts.
        kind: "kill" (before it happens), "torn" (a write is half done) or "full" (there is no room,
            from then on).
    """

    at: int = 0
    kind: str = "kill"
    seen: list = field(default_factory=list)

    def meets(self, name, torn=None):
        """Count an event; ``torn`` does half of it."""
        self.seen.append(name)
        here = len(self.seen)
        if self.kind == "full" and self.at and here >= self.at and name in NEEDS_ROOM:
            if torn is not None:
                torn()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if here == self.at and self.kind in ("kill", "torn"):
            if self.kind == "torn" and torn is not None:
                torn()
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self):
        """Replace what this process does to files; there is no way back."""
        for name in MOVES:
            setattr(os, name, self._watched(name, getattr(os, name)))
        opened = io.open

        def watched_open(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+"):
                return opened(file, mode, *args, **kwargs)
            self.meets("open")
            return _Watched(opened(file, mode, *args, **kwargs), self)

        io.open = watched_open
        saved = safetensors.torch.save_file

        def watched_save(tensors, file, *args, **kwargs):
            def torn():
                saved(tensors, file, *args, **kwargs)
                os.truncate(file, Path(file).stat().st_size // 2)

            try:
                self.meets("save_file", torn)
            except OSError:
                raise safetensors.SafetensorError(
                    "Error while serializing: I/O error: No space left on device (os error 28)"
                ) from None
            saved(tensors, file, *args, **kwargs)

        safetensors.torch.save_file = watched_save

    def _watched(self, name, call):
        def watched(*args, **kwargs):
            self.meets(name)
            return call(*args, **kwargs)

        return watched


class _Watched:
    """A file whose writes are counted."""

    def __init__(self, file, fault):
        self._file, self._fault = file, fault

    def write(self, data):
        def torn():
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._fault.meets("write", torn)
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def go_on(folder, reporter=None, **options):
    """What a user does: resume the run if it is there, else begin it."""
    with known(), tiny.denormals_kept():
        if Run(folder).recipe.exists():
            loop.resume(folder, reporter=reporter, **options)
        else:
            loop.train(recipe(), folder, reporter=reporter)


@functools.cache
def recipe():
    """The recipe, read before any child is forked, so that it is none of its writes."""
    with tempfile.TemporaryDirectory() as folder:
        return tiny.tiny_recipe(Path(folder), *SHORT)


def start(job, log, fault=None):
    """Fork a child that does ``job()``; return its number. What it says goes to ``log``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons doubt forks beside threads
        child = os.fork()
    if child:
        return child
    code = FAILED_BADLY
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: PTH123, SIM115
        signal.signal(signal.SIGTERM, _end)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if fault is not None:
            fault.arm()
        job()
        code = OK
    except (OSError, KeyboardInterrupt) as error:
        code = FAILED_WELL
        print(f"{type(error).__name__}: {error}; {'; '.join(getattr(error, '__notes__', []))}")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _end(*_):
    raise KeyboardInterrupt("terminated")


def wait(child, limit=600):
    """Return how a child ended: its exit code, or minus the signal."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the child did not end within {limit} s")


def run_child(job, log, fault=None):
    """Do a job in a child, and return how it ended."""
    return wait(start(job, log, fault))


def said(log):
    """What children said into a file."""
    return Path(log).read_text()


def count_events(folder):
    """Train a run in a child and return the names of all that it does to files, in order."""
    place = Path(f"{folder}.events")
    go_on(Path(f"{folder}-first"))  # so that no child has to import anything

    def job():
        fault = Fault()
        fault.arm()
        go_on(folder)
        place.write_bytes("\n".join(fault.seen).encode())

    assert run_child(job, f"{folder}.log") == OK, Path(f"{folder}.log").read_text()
    return place.read_text().split("\n")


def differences(run, whole):
    """Return the names of files in which a run differs from one that was never cut."""
    found = [n for n in SAME if getattr(run, n).read_bytes() != getattr(whole, n).read_bytes()]
    ends = [sorted(r.checkpoints.glob("step-*"))[-1] for r in (run, whole)]
    state = "state.safetensors"  # with V and momentum
    if (ends[0] / state).read_bytes() != (ends[1] / state).read_bytes():
        found.append(f"checkpoint {state}")
    facts = [read_json(end / "checkpoint.json") for end in ends]
    places = [{**told["position"], "seconds": 0} for told in facts]
    if places[0] == places[1]:  # who was stopped at the last step has not judged it yet
        if facts[0]["path"] != facts[1]["path"]:
            found.append("checkpoint path")
        if (ends[0] / "ranks.json").read_bytes() != (ends[1] / "ranks.json").read_bytes():
            found.append("checkpoint ranks.json")  # random states, sums of the epoch
    return found


def holds_something(run):
    """Whether the run selects and has a V, so that equal files say something."""
    tensors = safetensors.torch.load_file(
        sorted(run.checkpoints.glob("step-*"))[-1] / "state.safetensors"
    )
    v = [t for name, t in tensors.items() if name.endswith("/v")]
    return bool(v) and all(bool(torch.count_nonzero(t)) for t in v)
