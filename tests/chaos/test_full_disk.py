# SPDX-License-Identifier: Apache-2.0
"""A full or read-only disk: one sentence, nothing lost, and the run goes on when there is room."""

import contextlib
import os
import random
import shutil
import subprocess
from functools import partial

import chaotic
import pytest
from chaotic import FAILED_WELL, OK, Fault, go_on, run_child, said

from dessilbi.files.runs import Run
from dessilbi.outcomes.auditing import FAULTS, audit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    events = chaotic.count_events(folder)
    return Run(folder), events


def steps_saved(folder):
    return {f.name for f in Run(folder).checkpoints.glob("step-*")}


def assert_said_in_a_sentence(ended, log):
    told = said(log)
    assert ended == FAILED_WELL, told
    assert "No space left on device" in told
    assert "Traceback" not in told


def assert_goes_on(folder, whole):
    log = f"{folder}.log"
    assert run_child(partial(go_on, folder), log) == OK, said(log)
    assert chaotic.differences(Run(folder), whole) == []
    assert [f for f in audit(folder) if f.state in FAULTS] == []
    assert [f.name for f in folder.parent.glob(".run*")] == []


def fill(folder, whole, at):
    """Let the disk be full from an event on; then there is room again."""
    folder.parent.mkdir()
    ended = run_child(partial(go_on, folder), f"{folder}.log", Fault(at, "full"))
    assert_said_in_a_sentence(ended, f"{folder}.log")
    if Run(folder).recipe.exists():
        assert [f for f in audit(folder) if f.state in FAULTS] == []
    assert_goes_on(folder, whole)


def kinds_of_writes(events):
    """The first, a middle and the last event of each kind that needs room."""
    for kind in chaotic.NEEDS_ROOM:
        places = [number for number, name in enumerate(events, start=1) if name == kind]
        yield from ((kind, at) for at in sorted({places[0], places[len(places) // 2], places[-1]}))


def test_a_disk_that_is_full_at_any_kind_of_write_costs_nothing(tmp_path, whole):
    run, events = whole
    found = list(kinds_of_writes(events))
    assert {kind for kind, _ in found} == set(chaotic.NEEDS_ROOM)
    chosen = random.Random(0).sample(found, 6)
    for kind, at in chosen:
        fill(tmp_path / f"{kind}-{at}" / "run", run, at)


@pytest.mark.full
def test_a_disk_that_is_full_at_every_single_write_costs_nothing(tmp_path, whole):
    run, events = whole
    for at, name in enumerate(events, start=1):
        if name in chaotic.NEEDS_ROOM:
            fill(tmp_path / f"at-{at}" / "run", run, at)


@contextlib.contextmanager
def small_disk(folder, kibibytes):
    """A file system of its own, of this size; needs the right to mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_costs_nothing(tmp_path, whole):
    size = sum(f.stat().st_size for f in whole[0].folder.rglob("*")) // 1024
    with small_disk(tmp_path / "disk", kibibytes=8 * size + 400) as disk:
        met = 0
        for share in (0.1, 0.4, 0.7):
            folder, ballast = disk / f"{share}" / "run", disk / "ballast"
            folder.parent.mkdir()
            room = int(share * size * 1024)
            free = shutil.disk_usage(disk).free
            ballast.write_bytes(bytes(max(0, free - room)))
            ended = run_child(partial(go_on, folder), f"{tmp_path}/log-{share}")
            ballast.unlink()
            if ended != OK:
                assert_said_in_a_sentence(ended, f"{tmp_path}/log-{share}")
                met += 1
            assert_goes_on(folder, whole[0])
            shutil.rmtree(folder.parent)
        assert met >= 2


def test_a_read_only_folder_is_said_and_left_alone(tmp_path, whole):
    with small_disk(tmp_path / "disk", kibibytes=4096) as disk:
        folder = shutil.copytree(whole[0].folder, disk / "run")
        Run(folder).set_status("interrupted")
        before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        log = f"{tmp_path}/log"
        assert run_child(partial(go_on, folder), log) == FAILED_WELL, said(log)
        assert "Read-only file system" in said(log)
        assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
        assert [f for f in audit(folder) if f.state in FAULTS] == []
