# SPDX-License-Identifier: Apache-2.0
"""However a run is ended, going on gives the bytes of a run that never was."""

import os
import random
import signal
import time
from functools import partial

import chaotic
import pytest
from chaotic import FAILED_WELL, OK, Fault, go_on, run_child, said, start, wait

from dessilbi.files.runs import Run
from dessilbi.outcomes.auditing import FAULTS, audit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never cut, and what it does to files."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    events = chaotic.count_events(folder)
    return Run(folder), events


def assert_as_if_never_cut(folder, whole):
    """The run goes on to its end, is sound, and equals the whole one byte by byte."""
    log = f"{folder}.log"
    assert run_child(partial(go_on, folder), log) == OK, said(log)
    run = Run(folder)
    assert run.read_status()["status"] == "finished"
    assert chaotic.differences(run, whole) == []
    assert [f for f in audit(folder) if f.state in FAULTS] == []
    assert [f.name for f in folder.rglob(".*") if f != run.lock] == []


def consistent(folder):
    """What a kill leaves is sound, or is no run folder yet."""
    if Run(folder).recipe.exists():
        assert [f for f in audit(folder) if f.state in FAULTS] == []


def test_the_run_selects_and_writes_everything_that_is_to_be_cut(whole):
    run, events = whole
    assert chaotic.holds_something(run)
    assert {"fsync", "replace", "rename", "mkdir", "open", "write", "save_file"} <= set(events)
    assert len(list(run.checkpoints.glob("step-*"))) >= 2
    assert 0 < float(run.read_status()["density"]) < 1


def kill(folder, at, kind):
    """Let a session die at an event; return whether it met it before its end."""
    ended = run_child(partial(go_on, folder), f"{folder}.log", Fault(at, kind))
    assert ended in (KILLED, OK), said(f"{folder}.log")
    consistent(folder)
    return ended == KILLED


def killed_again_and_again(folder, drawn, num_events):
    """Kill every session of a run at a random event until one comes to the end; count."""
    died = 0
    while True:
        # Far enough that a session can reach the next checkpoint, or they would never end.
        left = num_events * 2 // 3 if Run(folder).checkpoints.exists() else num_events
        if not kill(folder, drawn.randint(1, left), drawn.choice(("kill", "torn"))):
            return died
        died += 1


def test_runs_killed_at_thirty_random_writes_end_as_if_they_never_were(tmp_path, whole):
    run, events = whole
    drawn, died, number = random.Random(0), 0, 0
    while died < 30:
        number += 1
        died += killed_again_and_again(tmp_path / f"run-{number}", drawn, len(events))
        assert_as_if_never_cut(tmp_path / f"run-{number}", run)


def late_events(events):
    """Where the last checkpoint is done, and the final files are written."""
    return range(len(events) - 25, len(events) + 1)


def test_a_run_killed_while_it_ends_ends_again(tmp_path, whole):
    run, events = whole
    drawn = random.Random(1)
    points = sorted(drawn.sample(late_events(events), 4))
    for number, at in enumerate(points):
        assert kill(tmp_path / f"run-{number}", at, "kill")
        assert_as_if_never_cut(tmp_path / f"run-{number}", run)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["kill", "torn"])
def test_a_run_killed_at_every_single_write_ends_as_if_it_never_was(tmp_path, whole, kind):
    run, events = whole
    for at in range(1, len(events) + 1):
        assert kill(tmp_path / f"run-{at}", at, kind)
        assert_as_if_never_cut(tmp_path / f"run-{at}", run)


def met_at_work(folder, number, drawn, longest):
    """Send a signal at a random moment; return whether the run was at work then."""
    child = start(partial(go_on, folder), f"{folder}.log")
    time.sleep(drawn.uniform(0, longest))
    os.kill(child, number)
    ended = wait(child)
    assert ended in (-number, FAILED_WELL, OK), said(f"{folder}.log")
    consistent(folder)
    return ended != OK


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_runs_that_meet_signals_at_random_moments_end_as_if_they_never_were(
    tmp_path, whole, number
):
    run, _ = whole
    drawn, met, runs = random.Random(int(number)), 0, 0
    began = time.monotonic()
    run_child(partial(go_on, tmp_path / "timed"), str(tmp_path / "timed.log"))
    longest = time.monotonic() - began
    while met < 5:
        runs += 1
        folder = tmp_path / f"run-{runs}"
        while met < 5 and met_at_work(folder, int(number), drawn, longest):
            met += 1
        assert_as_if_never_cut(folder, run)


def test_two_processes_never_work_on_one_run(tmp_path, whole):
    run, _ = whole
    folder, log = tmp_path / "run", str(tmp_path / "second.log")
    waits = Waiting(tmp_path)
    first = start(partial(go_on, folder, waits), f"{folder}.log")
    waits.until_at_work()
    assert run_child(partial(go_on, folder), log) == FAILED_WELL
    assert "is in use by another process: wait until it ends" in said(log)
    waits.release()
    assert wait(first) == OK, said(f"{folder}.log")
    assert chaotic.differences(Run(folder), run) == []


class Waiting:
    """A reporter that lets its run wait at a step until it is released."""

    def __init__(self, folder, step=2):
        self.here, self.go, self.step = folder / "here", folder / "go", step

    def until_at_work(self):
        while not self.here.exists():
            time.sleep(0.01)

    def release(self):
        self.go.touch()

    def update(self, step, facts):
        if step == self.step:
            self.here.touch()
            while not self.go.exists():
                time.sleep(0.01)

    def say(self, text):
        pass

    def start(self, title, total_steps, done):
        pass

    def finish(self):
        pass


def test_a_folder_that_vanishes_ends_its_run_in_one_sentence(tmp_path):
    folder, moved, waits = tmp_path / "run", tmp_path / "moved", Waiting(tmp_path)
    child = start(partial(go_on, folder, waits), f"{folder}.log")
    waits.until_at_work()
    folder.rename(moved)
    waits.release()
    assert wait(child) == FAILED_WELL
    assert "No such file or directory" in said(f"{folder}.log")
    assert "go on with: dessilbi train --resume" in said(f"{folder}.log")
    assert not folder.exists()


def test_a_folder_that_vanished_and_came_back_goes_on(tmp_path, whole):
    folder, moved, waits = tmp_path / "run", tmp_path / "moved", Waiting(tmp_path, step=4)
    child = start(partial(go_on, folder, waits), f"{folder}.log")
    waits.until_at_work()
    folder.rename(moved)
    waits.release()
    assert wait(child) == FAILED_WELL
    moved.rename(folder)
    assert_as_if_never_cut(folder, whole[0])
