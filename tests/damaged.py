# SPDX-License-Identifier: Apache-2.0
"""Every format that is read, with a small sample of it and the reader that users reach it by.

A reader returns a plain value to compare. Where a checksum guards the file, a damaged copy must
give the same value as the sound one, or an error; where none does, any value of the right form.
"""

import gzip
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
import safetensors.torch
import torch
from mutations import Memory, mutations, outcome
from tiny import shared_run
from torch import nn

from dessilbi import Path, Ticket, close, compact, save_compact
from dessilbi.files.runs import Run
from dessilbi.files.sealing import check_sealed, read_seal, read_sealed, sealed
from dessilbi.files.storage import read_lines, write_json
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.outcomes.auditing import FAULTS, audit
from dessilbi.saving.saving import open_compact
from dessilbi.testing import random_ticket
from dessilbi.training.checkpoints import verified
from dessilbi.training.data.idx import read_idx
from dessilbi.training.data.pickles import read_pickle
from dessilbi.training.data.text import read_text
from dessilbi.training.finetune import load_trained
from dessilbi.training.recipes import load_recipe, validate_recipe
from dessilbi.training.telling import to_toml


@dataclass(frozen=True)
class Format:
    """A file to damage.

    Args:
        name: What to call it.
        file: A sound sample.
        read: From nothing to a plain value; raises what users see.
        guarded: Whether a checksum finds every change.
        accepts: Whether a value that differs from the sound one is right all the same.
    """

    name: str
    file: FilePath
    read: Callable[[], object]
    guarded: bool = True
    accepts: Callable[[object, object], bool] | None = None


def net():
    """A small net that can be compacted."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def formats(folder):
    """Make the samples below a folder, and return their formats."""
    run = Run(shutil.copytree(shared_run().folder, folder / "run"))
    write_json(run.family, sealed({"accuracy": 0.5, "tickets": [{"density": 0.1}]}))
    yield from _of_run(run)
    yield from _of_unsealed_run(folder / "unsealed")
    yield from _of_unsealed_path(folder, run)
    yield from _of_checkpoint(sorted(run.checkpoints.iterdir())[-1])
    yield from _of_ticket(run, folder)
    yield from _of_compact(folder / "compact")
    yield from _of_recipe(folder)
    yield from _of_data(folder)


def _of_run(run):
    folder = run.folder
    yield Format(
        "config (recipe.json)",
        run.recipe,
        lambda: to_toml(validate_recipe(run.read_recipe(), origin=str(run.recipe))),
    )
    yield Format("environment", run.environment, run.read_environment)
    yield Format("status", run.status, run.read_status)
    yield Format("family", run.family, lambda: read_sealed(run.family))
    yield Format("checksums", run.checksums, lambda: (read_seal(folder), _path(folder)))
    yield Format("path", run.path, lambda: _path(folder))
    yield Format("scores", run.scores, lambda: _path(folder))
    yield Format("weights", run.model, lambda: _weights(run))
    for log in (run.metrics, run.times):
        yield Format(log.stem, log, lambda log=log: (check_sealed(log), list(read_lines(log))))
    yield Format("verify", run.metrics, lambda: _sound(folder))


def _sound(folder):
    """What verify says: an error where it finds a fault."""
    found = [f for f in audit(folder) if f.state in FAULTS]
    if found:
        raise ValueError(f"{len(found)} files are damaged or missing")
    return "sound"


def _of_unsealed_run(folder):
    """A run of an older release: only what its formats guard by themselves is found."""
    run = Run(shutil.copytree(shared_run().folder, folder))
    run.checksums.unlink()
    readers = {
        run.recipe: lambda: type(validate_recipe(run.read_recipe(), origin=str(run.recipe))),
        run.environment: lambda: type(run.read_environment()),
        run.status: lambda: type(run.read_status()),
        run.metrics: lambda: type(list(read_lines(run.metrics))),
        run.scores: lambda: type(_path(folder)),
        run.model: lambda: type(_weights(run)),
    }
    for file, read in readers.items():
        yield Format(f"unsealed {file.name}", file, read, guarded=False)
    yield Format("verify of an unsealed run", run.path, lambda: _sound(folder), guarded=False)


def _path(folder):
    path = Path.load(folder)
    entries = {name: entry.tolist() for name, entry in path.entry().items()}
    tickets = [path.ticket(density=d).digest() for d in (0.1, 0.5)]
    return path.points, entries, tickets


def _weights(run):
    trained = load_trained(run)
    return trained.accuracy, {n: t.tolist() for n, t in trained.model.state_dict().items()}


def _of_unsealed_path(folder, run):
    """A path of a loop of one's own: it is guarded by the checksums of its lines alone."""
    alone = Run(folder / "alone")
    alone.folder.mkdir()
    shutil.copy(run.path, alone.path)

    def points():
        return tuple(Path.load(alone.folder).points)

    def begins(found, whole):
        """Lines that are lost at the end cannot be missed: then it is the path up to there."""
        alike = zip(found, whole, strict=False)
        return len(found) <= len(whole) and all(
            one.step == other.step and one.density == other.density for one, other in alike
        )

    yield Format("path without checksums.json", alone.path, points, accepts=begins)


def _of_checkpoint(folder):
    for name in ("checkpoint.json", "ranks.json", "state.safetensors"):
        yield Format(f"checkpoint {name}", folder / name, lambda: _checkpoint(folder))


def _checkpoint(folder):
    found = verified(folder)
    tensors = found.tensors(lambda listed: {})
    return found.facts, found.ranks, {name: t.tolist() for name, t in tensors.items()}


def _of_ticket(run, folder):
    file = folder / "ticket.safetensors"
    Path.load(run.folder).ticket(density=0.3).save(file)

    def read():
        found = Ticket.load(file)
        return found.digest(), repr(found).splitlines()[1:]

    yield Format("ticket", file, read)


def _of_compact(folder):
    torch.manual_seed(0)
    model, x = net().eval(), torch.randn(4, 6)
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    closed = close(ticket, model, example_inputs=x)
    save_compact(compact(model, closed, example_inputs=x, latency_repeats=0), folder)

    def read():
        opened = open_compact(net, folder)
        if not opened.holds:
            raise ValueError("the proof does not hold")
        return {n: t.tolist() for n, t in opened.model.state_dict().items()}

    for name in ("manifest.json", "weights.safetensors", "witness.safetensors"):
        yield Format(f"compact {name}", folder / name, read)
    yield Format("compact ticket.safetensors", folder / "ticket.safetensors", read)


def _of_recipe(folder):
    file = folder / "own.toml"
    file.write_text(to_toml(load_recipe("digits-lenet")))

    def read():
        found = load_recipe(str(file))
        again = folder / "again.toml"
        again.write_text(to_toml(found))
        if load_recipe(str(again)) != found:
            raise AssertionError("the recipe does not read back")
        return found

    yield Format("recipe (TOML)", file, read, guarded=False)


def _of_data(folder):
    drawn = np.random.default_rng(0)
    images = drawn.integers(0, 256, (5, 4, 4), np.uint8)
    idx = b"\0\0\x08\x03" + np.array(images.shape, ">u4").tobytes() + images.tobytes()
    plain, packed = folder / "images-idx3-ubyte", folder / "images-idx3-ubyte.gz"
    plain.write_bytes(idx)
    packed.write_bytes(gzip.compress(idx))
    for file in (plain, packed):
        yield Format(
            f"idx{file.suffix}", file, lambda file=file: read_idx(file, ndim=3).shape, guarded=False
        )
    batch = folder / "data_batch"
    told = {b"data": images.reshape(5, 16), b"labels": [0, 1, 2, 3, 4], b"batch_label": b"one"}
    batch.write_bytes(pickle.dumps(told, protocol=3))
    yield Format("CIFAR pickle", batch, lambda: sorted(map(str, read_pickle(batch))), guarded=False)
    text = folder / "text.txt"
    text.write_text("All of it is text, größer als ASCII. " * 20)
    yield Format(
        "text", text, lambda: len(read_text(folder, text.name, name="text")), guarded=False
    )
    exported = folder / "exported.safetensors"
    safetensors.torch.save_file(dict(net().state_dict()), exported)
    yield Format(
        "exported safetensors", exported, lambda: sorted(load_tensors(exported)), guarded=False
    )


def damage(form, count, seed):
    """Read damaged copies of a sample; return how many were refused, and how many read.

    Raises:
        AssertionError: One of them did neither, or gave a wrong value.
    """
    original, told = form.file.read_bytes(), Counter()
    whole = form.read()
    try:
        with Memory():
            for name, content in mutations(original, count, f"{seed} {form.name}"):
                form.file.write_bytes(content)
                found = outcome(form.read, f"{form.name}, {name}")
                told["refused" if found.error else "read"] += 1
                if found.error is None and form.guarded and found.value != whole:
                    accepted = form.accepts is not None and form.accepts(found.value, whole)
                    assert accepted, f"{form.name}, {name}: silently wrong"
    finally:
        form.file.write_bytes(original)
    assert form.read() == whole
    return told
