# SPDX-License-Identifier: Apache-2.0
"""One tiny run, trained once per test process and shared by all tests that only read it."""

import atexit
import functools
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from dessilbi.files.runs import Run
from dessilbi.training.data import DATA_SETS, DataSet
from dessilbi.training.data.generated import synthetic
from dessilbi.training.loop import train
from dessilbi.training.recipes import Recipe, load_recipe

TOML = """
name = "tiny"
model = "lenet"
data = "synthetic-mnist"
epochs = 2
batch_size = 200
validation = 800
points = 4
judged = 100

[optimizer]
lr = 0.1
nu = 2.0
lam = 0.03
momentum = 0.9

[finetune]
epochs = 1

[structure]
"conv*.weight" = { structure = "filter", lam = 0.4 }
"""


# 4 steps on a set of a few images (known to ``train_tiny`` only), judged twice.
QUICK = (
    *("data=few", "validation=100", "batch_size=50"),
    *("epochs=2", "points=2", "optimizer.lam=1e-4"),
)
FEW = DataSet(lambda root, download: synthetic(num_train=200, num_test=50), mean=0.1, std=0.15)


class Recorder:
    """Keeps what it is told; may raise at a step."""

    def __init__(self, error=None):
        self.told, self.said, self.finished, self.error = [], [], 0, error

    def say(self, text):
        self.said.append(text)

    def start(self, title, total_steps, done):
        self.told.append((title, total_steps))

    def update(self, step, facts):
        self.told.append((step, facts))
        if self.error is not None:
            raise self.error

    def finish(self):
        self.finished += 1


def tiny_recipe(folder: Path, *assignments: str) -> Recipe:
    """The tiny recipe, from a TOML file of one's own."""
    file = folder / "tiny.toml"
    file.write_text(TOML)
    return load_recipe(str(file), assignments)


@contextmanager
def denormals_kept():
    """Training flushes denormals for the whole thread; other tests need them."""
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def train_tiny(out: Path, *assignments: str, **options) -> Run:
    """Train the tiny recipe into ``out``."""
    with tempfile.TemporaryDirectory() as folder, denormals_kept(), patch.dict(DATA_SETS, few=FEW):
        return train(tiny_recipe(Path(folder), *assignments), out, **options)


@functools.cache
def shared_run() -> Run:
    """The shared run; copy its folder (see ``own_copy``) to change anything in it."""
    folder = Path(tempfile.mkdtemp(prefix="dessilbi-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return train_tiny(folder / "run")


def own_copy(folder: Path) -> Run:
    """A copy of the shared run that a test may damage; its list of checksums would find it out."""
    run = Run(shutil.copytree(shared_run().folder, folder / "run"))
    run.checksums.unlink()
    return run
