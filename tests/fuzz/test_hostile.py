# SPDX-License-Identifier: Apache-2.0
"""Files of a stranger, with checksums that are right: they cannot hurt, whatever they say.

What they say may be wrong; they cannot execute, read or write anything elsewhere, nor take more
than a second of memory or time.
"""

import json
import os
import random
import shutil
import zlib

import damaged
import pytest
import safetensors.torch
import torch
from mutations import Memory, outcome
from tiny import Recorder, denormals_kept, own_copy, shared_run

from dessilbi import Path, Ticket
from dessilbi.files.runs import Run
from dessilbi.files.sealing import checksum_of, close_seal, sealed, unsealed
from dessilbi.files.storage import as_json, read_json, to_json, write_json
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.outcomes.auditing import FAULTS, audit
from dessilbi.training import loop
from dessilbi.training.data import load_data
from dessilbi.training.data.idx import read_idx
from dessilbi.training.recipes import load_recipe

HUGE = 1 << 40
VALUES = (
    *(None, True, -1, 0, 1 << 62, 10**30, 0.5, 1e308, float("nan"), "", "x", "nan", "x" * 2000),
    *("../../etc/passwd", "/etc/passwd", "a\nb", "\x1b[2J", "\x00", [], {}, [[[[]]]], [0] * 50),
    *({"a": 1}, [HUGE, HUGE], {"../x": {"bytes": 0, "crc": 0}}, "sha256", [None, None]),
)


def places(value, at=()):
    """Every place in a tree of plain values."""
    if not isinstance(value, dict | list):
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*at, key)
        yield from places(item, (*at, key))


def changed(value, drawn):
    """A copy with something absurd, missing or new in it."""
    copy = json.loads(to_json(value))
    found = [place for place in places(copy) if len(place) < 6]
    for _ in range(drawn.randint(1, 2)):
        *way, last = drawn.choice(found)
        part = copy
        try:
            for key in way:
                part = part[key]
            if drawn.random() < 0.2:
                del part[last]
            elif drawn.random() < 0.1 and isinstance(part, dict):
                part["unknown"] = drawn.choice(VALUES)
            else:
                part[last] = drawn.choice(VALUES)
        except (LookupError, TypeError):
            continue
    return copy


def copies(value, count, seed):
    drawn = random.Random(seed)
    for number in range(count):
        yield f"{seed} {number}", changed(value, drawn)


SCALES = [pytest.param(1, id="short"), pytest.param(20, marks=pytest.mark.full, id="long")]
scaled = pytest.mark.parametrize("scale", SCALES)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that can go on from a checkpoint."""
    run = Run(shutil.copytree(shared_run().folder, tmp_path_factory.mktemp("cut") / "run"))
    run.set_status("interrupted")
    return run


@scaled
def test_checkpoints_that_say_absurd_things_do_no_harm(interrupted, tmp_path, scale):
    place = sorted(interrupted.checkpoints.iterdir())[-1]
    facts = unsealed(read_json(place / "checkpoint.json"))
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    refused = 0
    for name, told in copies(facts, 25 * scale, "checkpoint"):
        folder = tmp_path / "run"
        shutil.copytree(interrupted.folder, folder)
        shutil.rmtree(sorted((folder / "checkpoints").iterdir())[0])
        file = folder / "checkpoints" / place.name / "checkpoint.json"
        try:
            write_json(file, sealed(told))
            with Memory(), denormals_kept():
                found = outcome(lambda folder=folder: loop.resume(folder), name)
        finally:
            shutil.rmtree(folder)
        refused += found.error is not None
    assert refused
    assert [f.name for f in tmp_path.iterdir()] == ["outside"]
    assert outside.read_bytes() == b"mine"


@scaled
def test_manifests_that_say_absurd_things_do_no_harm(tmp_path, scale):
    forms = {form.name: form for form in damaged._of_compact(tmp_path / "compact")}
    form = forms["compact manifest.json"]
    told = json.loads(form.file.read_bytes())
    del told["sha256"]
    refused = 0
    with Memory():
        for name, other in copies(told, 150 * scale, "manifest"):
            form.file.write_bytes(as_json({**other, "sha256": checksum_of(other)}))
            refused += outcome(form.read, name).error is not None
    assert refused


@scaled
def test_lists_of_checksums_that_say_absurd_things_do_no_harm(tmp_path, scale):
    run = Run(shutil.copytree(shared_run().folder, tmp_path / "run"))
    told = unsealed(read_json(run.checksums))
    refused = 0
    with Memory():
        for name, other in copies(told, 100 * scale, "checksums"):
            write_json(run.checksums, sealed(other))
            refused += outcome(lambda: Path.load(run.folder), name).error is not None
            outcome(lambda: audit(run.folder), name)
    assert refused


@scaled
def test_paths_that_say_absurd_things_do_no_harm(tmp_path, scale):
    run = own_copy(tmp_path)
    run.scores.unlink()
    lines = [json.loads(line) for line in run.path.read_bytes().splitlines()][:4]
    for line in lines:
        del line["crc"]
    refused = 0
    with Memory():
        for name, other in copies(lines, 200 * scale, "path"):
            chain, content = 0, b""
            for line in other:
                chain = zlib.crc32(to_json(line).encode(errors="replace"), chain)
                whole = {**line, "crc": chain} if isinstance(line, dict) else line
                content += to_json(whole).encode(errors="replace") + b"\n"
            run.path.write_bytes(content)
            refused += outcome(lambda: list(_asked(run.folder)), name).error is not None
    assert refused


def _asked(folder):
    """Everything that a path is asked for."""
    path = Path.load(folder)
    yield repr(path)
    for point in path.points[:3]:
        yield path.support(step=point.step).density
        yield path.ticket(step=point.step).densities()


@scaled
def test_tickets_that_say_absurd_things_do_no_harm(tmp_path, scale):
    file = tmp_path / "ticket.safetensors"
    ticket = Path.load(shared_run().folder).ticket(density=0.3)
    ticket.save(file)
    with safetensors.safe_open(str(file), framework="pt") as opened:
        header = json.loads(opened.metadata()["ticket"])
        bits = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    refused = 0
    with Memory():
        for name, other in copies(header, 150 * scale, "ticket"):
            told = to_json(other).encode(errors="replace").decode()
            file.write_bytes(safetensors.torch.save(bits, metadata={"ticket": told}))
            refused += outcome(lambda: repr(Ticket.load(file)), name).error is not None
    assert refused


def test_recipes_that_say_absurd_things_are_refused_or_read(tmp_path):
    import tomli_w

    told = load_recipe("digits-lenet").model_dump(exclude_none=True)
    file = tmp_path / "own.toml"
    for name, other in copies(told, 150, "recipe"):
        try:
            text = tomli_w.dumps(other)
        except (TypeError, AttributeError):  # TOML has no word for it
            continue
        file.write_text(text, errors="replace")
        outcome(lambda: load_recipe(str(file)), name)


# sizes


def sparse(file, size):
    """A file that says it is huge and takes no room."""
    with file.open("wb") as opened:
        opened.truncate(size)
    return file


@pytest.mark.parametrize("name", ["recipe", "environment", "status", "path", "checksums"])
def test_a_file_that_is_endlessly_long_is_refused_before_it_is_read(tmp_path, name):
    run = own_copy(tmp_path)
    sparse(getattr(run, name), 20 << 30)
    readers = {"path": lambda: Path.load(run.folder), "status": run.read_status}
    read = readers.get(name, run.read_environment if name == "environment" else run.read_recipe)
    with Memory():
        found = outcome(read, name)
    assert found.error is not None


def test_a_recipe_file_that_is_endlessly_long_is_refused(tmp_path):
    file = sparse(tmp_path / "own.toml", 20 << 30)
    with Memory(), pytest.raises(ValueError, match="has more than 1 MiB: it is no recipe"):
        load_recipe(str(file))


def test_a_header_of_tensors_that_is_endlessly_long_is_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    sparse(file, 20 << 30)
    with file.open("rb+") as opened:
        opened.write((99 << 20).to_bytes(8, "little"))
    with Memory(), pytest.raises(ValueError, match="its header says 103,809,024 bytes"):
        load_tensors(file)


def test_a_path_of_more_blocks_than_it_can_show_is_refused(tmp_path):
    header = {"format": "dessilbi.path", "version": 1}
    tensor = {"shape": [1 << 30], "block": [1], "unit": None}
    line = {**header, "tensors": {"w": tensor}}
    crc = zlib.crc32(to_json(line).encode())
    (tmp_path / "path.jsonl").write_text(to_json({**line, "crc": crc}) + "\n")
    with Memory(), pytest.raises(ValueError, match="claims to be the path of 1,073,741,824 blocks"):
        Path.load(tmp_path)


def test_a_path_of_many_blocks_is_read_where_its_weights_lie_beside_it(tmp_path):
    blocks = 1 << 27
    tensor = {"shape": [blocks], "block": [1], "unit": None}
    line = {"format": "dessilbi.path", "version": 1, "tensors": {"w": tensor}}
    crc = zlib.crc32(to_json(line).encode())
    (tmp_path / "path.jsonl").write_text(to_json({**line, "crc": crc}) + "\n")
    sparse(tmp_path / "init.safetensors", 4 * blocks)
    assert Path.load(tmp_path).points == []


@pytest.mark.parametrize("shape", [(HUGE, HUGE, 1), (2**31, 2, 2), (0xFFFFFFFF,) * 3])
def test_images_larger_than_their_file_are_refused(tmp_path, shape):
    file = tmp_path / "images-idx3-ubyte"
    sizes = b"".join((n & 0xFFFFFFFF).to_bytes(4, "big") for n in shape)
    file.write_bytes(b"\0\0\x08\x03" + sizes + bytes(1000))
    with Memory(), pytest.raises(ValueError, match="truncated or damaged"):
        read_idx(file, ndim=3)


# places


@pytest.mark.parametrize(
    "name", ["text:../secret.txt", "text:/etc/hostname", "folder:../pictures", "folder:/etc"]
)
def test_a_recipe_cannot_lead_out_of_the_data_folder(tmp_path, name):
    (tmp_path / "secret.txt").write_text("secret " * 1000)
    root = tmp_path / "data"
    root.mkdir()
    with pytest.raises(ValueError, match="leads out of the data folder"):
        load_data(name, root=root, validation=1, seed=0)


def test_a_run_does_not_say_where_its_data_lies(tmp_path):
    run = Run(shutil.copytree(shared_run().folder, tmp_path / "run"))
    (tmp_path / "mine.txt").write_text("secret " * 1000)
    recipe = read_json(run.recipe) | {"data": "text:mine.txt", "model": "gpt", "structure": {}}
    write_json(run.recipe, recipe | {"length": 8})
    write_json(run.environment, read_json(run.environment) | {"data": str(tmp_path)})
    run.checksums.unlink()
    run.set_status("interrupted")
    with pytest.raises(ValueError, match="no data folder is given: give --data"):
        loop.resume(run.folder)


LINKED = ("recipe", "environment", "status", "path", "metrics", "times", "init", "model", "scores")


@pytest.mark.parametrize("name", [*LINKED, "checksums", "checkpoints", "lock"])
def test_a_link_in_a_run_folder_is_never_followed(tmp_path, name):
    run = Run(shutil.copytree(shared_run().folder, tmp_path / "run"))
    run.set_status("interrupted")
    place, outside = getattr(run, name), tmp_path / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    files = [outside] if outside.is_file() else sorted(f for f in outside.rglob("*") if f.is_file())
    before = [f.read_bytes() for f in files]
    with denormals_kept(), pytest.raises((ValueError, OSError), match="is a link"):
        loop.resume(run.folder, reporter=Recorder())
    assert [f.read_bytes() for f in files] == before
    if name != "lock":
        assert [f for f in audit(run.folder) if f.state in FAULTS]


def test_a_link_in_place_of_the_lock_makes_no_file_elsewhere(interrupted, tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(interrupted.folder, folder)
    Run(folder).lock.unlink()
    Run(folder).lock.symlink_to(outside)
    with denormals_kept(), pytest.raises(ValueError, match="is a link"):
        loop.resume(folder)
    assert not outside.exists()


@pytest.mark.parametrize("name", ["recipe", "path", "status", "checksums"])
def test_a_pipe_in_a_run_folder_is_never_waited_for(tmp_path, name):
    run = own_copy(tmp_path)
    place = getattr(run, name)
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    reads = (lambda: Path.load(run.folder), run.read_recipe, run.read_status)
    assert any(outcome(read, name).error for read in (*reads, lambda: damaged._sound(run.folder)))


def test_a_link_among_the_files_of_a_ticket_folder_is_told(tmp_path):
    run = Run(shutil.copytree(shared_run().folder, tmp_path / "run"))
    run.tickets.mkdir()
    (run.tickets / "a.safetensors").symlink_to("/etc/hostname")
    (found,) = [f for f in audit(run.folder) if f.state in FAULTS]
    assert found.file == "tickets/a.safetensors"


def test_the_lengths_of_logs_in_a_checkpoint_name_no_other_file(interrupted, tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "mine.txt"
    shutil.copytree(interrupted.folder, folder)
    outside.write_bytes(b"mine, and longer than nothing")
    for place in (folder / "checkpoints").iterdir():
        file = place / "checkpoint.json"
        facts = unsealed(read_json(file))
        facts["logs"]["../mine.txt"] = {"bytes": 0, "crc": 0}
        write_json(file, sealed(facts))
    with denormals_kept():
        loop.resume(folder)
    assert outside.read_bytes() == b"mine, and longer than nothing"


# what is executed


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_folder_that_poses_as_a_run_of_fsdp2_executes_nothing_unasked(interrupted, tmp_path):
    import pickle

    from dessilbi.files.storage import sha256_of
    from dessilbi.training.checkpoints import UntrustedError

    folder, mark = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(interrupted.folder, folder)
    for place in (folder / "checkpoints").iterdir():
        (place / "shards").mkdir()
        (place / "shards" / ".metadata").write_bytes(pickle.dumps(Bomb(str(mark))))
        (place / "state.safetensors").unlink()
        facts = unsealed(read_json(place / "checkpoint.json"))
        files = [f for f in place.rglob("*") if f.is_file() and f.name != "checkpoint.json"]
        facts["files"] = {str(f.relative_to(place)): sha256_of(f) for f in files}
        facts["listed"] = {"model/w": [[2], "float32"]}
        write_json(place / "checkpoint.json", sealed(facts))
    with pytest.raises(UntrustedError, match="if you trust this folder, say --trust-checkpoint"):
        loop.resume(folder)
    assert not mark.exists()
    with denormals_kept(), pytest.raises((ValueError, RuntimeError)):
        loop.resume(folder, trust_checkpoint=True)
    assert mark.exists()  # so the refusal above meant something


def test_a_sound_run_is_sound(tmp_path):
    run = Run(shutil.copytree(shared_run().folder, tmp_path / "run"))
    close_seal(run.folder, run.final_files)
    assert {f.state for f in audit(run.folder)} == {"good"}
    assert torch.is_tensor(load_tensors(run.model)["fc2.weight"])
