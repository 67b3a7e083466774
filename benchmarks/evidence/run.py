# SPDX-License-Identifier: Apache-2.0
"""Run the evidence: what is missing in the table, in the plan's order; may be stopped anywhere.

    python -m benchmarks.evidence.run --data DIR [--minutes 60] [--part bd] [--workers 2]
    python -m benchmarks.evidence.run --status
    python -m benchmarks.evidence.run --smoke --results FILE

One JSON line for each cell in docs/results/evidence.jsonl. Several processes may run at once: each
claims a job by a lock. See PROTOCOL.md.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.evidence.bench import Bench, Job, MissingError
from benchmarks.evidence.parts import alone, early, filters, optimizers, text, weights
from benchmarks.evidence.plan import planned
from benchmarks.evidence.training import quick
from filelock import FileLock, Timeout

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "evidence.jsonl"
RUN = {
    "a": optimizers.run,
    "b": weights.run,
    "c": filters.run,
    "d": early.run,
    "e": weights.run,
    "f": text.run,
    "g": filters.run,
    "h": alone.run,
    "i": alone.run,
}
PAUSE = 5.0  # seconds to wait for what another process runs


def cells(job: Job) -> set[str]:
    """Return the names of a job's lines."""
    return {job.cell(budget) for budget in job.budgets}


def run_job(job: Job, bench: Bench) -> int:
    """Run a job, add the lines that are not there, and return how many."""
    done = {line["cell"] for line in bench.lines()}
    added = 0
    for line in RUN[job.part](job, bench):
        if line["cell"] in done:
            continue
        bench.write(line)
        added += 1
        shown = {k: line[k] for k in ("once_val_accuracy", "val_accuracy", "seconds") if k in line}
        print(line["cell"], {k: round(v, 4) for k, v in shown.items()}, flush=True)
    return added


def sweep(bench: Bench, jobs: list[Job], until: float) -> bool:
    """Go through the plan once; return whether anything was run."""
    ran = False
    for job in jobs:
        if time.monotonic() > until:
            return False
        if cells(job) <= {line["cell"] for line in bench.lines()}:
            continue
        bench.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(bench.work / (job.name.replace(" ", "-") + ".lock"))
        try:
            with lock.acquire(blocking=False):
                ran = bool(run_job(job, bench)) or ran
        except (Timeout, MissingError):  # another process is at it, or at what it needs
            continue
    return ran


def missing(bench: Bench, jobs: list[Job]) -> list[Job]:
    """Return the jobs that have a line to add."""
    done = {line["cell"] for line in bench.lines()}
    return [job for job in jobs if not cells(job) <= done]


def work(bench: Bench, jobs: list[Job], minutes: float) -> None:
    """Run what is missing until it is all there or the time is over."""
    until = time.monotonic() + 60 * minutes
    while missing(bench, jobs) and time.monotonic() < until:
        if not sweep(bench, jobs, until) and time.monotonic() < until:
            time.sleep(PAUSE)


def together(workers: int) -> int:
    """Run so many processes of this command and wait for them."""
    given = [word for word in sys.argv[1:] if not word.startswith("--workers=")]
    if "--workers" in given:
        place = given.index("--workers")
        del given[place : place + 2]
    command = [sys.executable, "-m", "benchmarks.evidence.run", *given]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(workers)]
    return max(process.wait() for process in processes)


def status(bench: Bench, jobs: list[Job]) -> None:
    """Print how much of each part is there, and what it took."""
    lines = bench.lines()
    for part in sorted({job.part for job in jobs}):
        wanted = {name for job in jobs if job.part == part for name in cells(job)}
        there = [line for line in lines if line["cell"] in wanted]
        print(f"part {part}: {len(there)} of {len(wanted)} lines")


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("DESSILBI_DATA"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no job after so long")
    parser.add_argument("--part", default="abcdefhi", help="letters of the parts")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--smoke", action="store_true", help="the whole chain at a tiny size")
    parser.add_argument("--status", action="store_true", help="only tell what is there")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    bench = Bench(asked.results, asked.work, asked.data, smoke=asked.smoke)
    jobs = planned(asked.part, smoke=asked.smoke)
    if asked.status:
        status(bench, jobs)
        return 0
    if "g" in asked.part and not torch.cuda.is_available():
        print("part g needs a CUDA GPU and there is none here: leave it out", file=sys.stderr)
        return 2
    if asked.workers > 1:
        return together(asked.workers)
    quick()
    work(bench, jobs, asked.minutes)
    status(bench, jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
