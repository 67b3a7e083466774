# SPDX-License-Identifier: Apache-2.0
"""Kill runs at every write and damage every file; write docs/results/measured/chaos.json.

python benchmarks/chaos.py [kills] [damage]     # some minutes; needs the tests beside it, and fork

Every run is resumed and compared, byte by byte, with one that was never cut. A difference, a
traceback or a silently wrong number stops this script with an error.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dessilbi.files.runs import Run
from dessilbi.files.storage import read_json, write_json
from dessilbi.outcomes.auditing import FAULTS, audit

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import chaotic  # noqa: E402
import damaged  # noqa: E402

COPIES, SEED, MOMENTS = 300, 2026, 25


def check(folder: Path, whole: Run) -> None:
    """Go on to the end, and compare."""
    log = f"{folder}.log"
    assert chaotic.run_child(partial(chaotic.go_on, folder), log) == chaotic.OK, chaotic.said(log)
    assert chaotic.differences(Run(folder), whole) == []
    assert [f for f in audit(folder) if f.state in FAULTS] == []


def at_every_write(folder: Path, whole: Run, events: list[str], kind: str) -> dict[str, int]:
    """End a run at each thing it does to files; return how often, by what it was about to do."""
    met: Counter[str] = Counter()
    for at, name in enumerate(events, start=1):
        if kind == "full" and name not in chaotic.NEEDS_ROOM:
            continue
        place = folder / f"{kind}-{at}" / "run"
        place.parent.mkdir(parents=True)
        job, log = partial(chaotic.go_on, place), f"{place}.log"
        ended = chaotic.run_child(job, log, chaotic.Fault(at, kind))
        expected = chaotic.FAILED_WELL if kind == "full" else -signal.SIGKILL
        assert ended == expected, (kind, at, name, chaotic.said(log))
        assert kind != "full" or "No space left on device" in chaotic.said(log)
        check(place, whole)
        met[name] += 1
    return dict(met)


def at_moments(folder: Path, whole: Run, number: int) -> dict[str, int]:
    """Send a signal at random moments; return how many sessions it met at work."""
    drawn, met, sent, runs = random.Random(SEED + number), 0, 0, 0
    began = time.monotonic()
    chaotic.run_child(partial(chaotic.go_on, folder / f"timed-{number}"), f"{folder}/timed.log")
    longest = time.monotonic() - began
    while met < MOMENTS:
        runs += 1
        place = folder / f"signal-{number}-{runs}"
        ended = None
        while ended != chaotic.OK and met < MOMENTS:
            child = chaotic.start(partial(chaotic.go_on, place), f"{place}.log")
            time.sleep(drawn.uniform(0, longest))
            os.kill(child, number)
            ended = chaotic.wait(child)
            assert ended in (-number, chaotic.FAILED_WELL, chaotic.OK), chaotic.said(f"{place}.log")
            sent += 1
            met += ended != chaotic.OK
        check(place, whole)
    return {"sent": sent, "met_at_work": met, "runs": runs}


def kills(folder: Path) -> dict[str, Any]:
    """End runs in every way, at every write."""
    events = chaotic.count_events(folder / "whole")
    whole = Run(folder / "whole")
    assert chaotic.holds_something(whole)
    return {
        "events_of_a_run": dict(Counter(events)),
        "killed_before": at_every_write(folder, whole, events, "kill"),
        "killed_in_half_a_write": at_every_write(folder, whole, events, "torn"),
        "disk_full_from": at_every_write(folder, whole, events, "full"),
        "signals_at_random_moments": {
            number.name: at_moments(folder, whole, int(number))
            for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        },
        "runs_that_differed": 0,  # one that does stops this script with an error
    }


def damage(folder: Path) -> dict[str, Any]:
    """Damage every file."""
    forms = list(damaged.formats(folder))
    copies = {form.name: dict(damaged.damage(form, COPIES, SEED)) for form in forms}
    return {
        "copies": copies,
        "copies_in_all": sum(sum(told.values()) for told in copies.values()),
        "silently_wrong_or_traceback": 0,  # likewise
    }


def main() -> None:
    file = ROOT / "docs" / "results" / "measured" / "chaos.json"
    for part in sys.argv[1:] or ("kills", "damage"):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            record = {"kills": kills, "damage": damage}[part](Path(name))
        facts = {"command": f"python benchmarks/chaos.py {part}", "torch": torch.__version__}
        facts["seconds"] = round(time.monotonic() - began)
        before = read_json(file) if file.exists() else {}
        write_json(file, {**before, part: {**facts, **record}})


if __name__ == "__main__":
    main()
