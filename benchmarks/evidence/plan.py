# SPDX-License-Identifier: Apache-2.0
"""The plan: all jobs, in the order in which they are worth most."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.evidence.bench import Job
from benchmarks.evidence.parts.early import budgets as early_budgets
from benchmarks.evidence.settings import (
    CHANGES,
    CUTS,
    DENSITIES,
    EARLY_DENSITIES,
    ROUNDS,
    SEEDS,
    SHARES,
    TEXT_DENSITIES,
    TRIALS,
    TUNED_AT,
    TUNING_SEED,
)
from benchmarks.evidence.tasks import FULL_NETS

TASKS = {"a": ("fashion", "mnist"), "b": ("fashion",), "c": ("cifar",), "d": ("fashion", "mnist")}
TASKS |= {"e": ("fashion",), "f": ("text",), "g": FULL_NETS, "h": ("fashion",), "i": ("cifar",)}
PARTS = ("b", "h", "d", "a", "c", "i", "f", "e", "g")  # within a seed
BUDGETS: dict[str, tuple[float, ...]] = {
    "a": (1.0,),
    "b": DENSITIES,
    "c": CUTS,
    "g": CUTS,
    "f": TEXT_DENSITIES,
    "h": DENSITIES,
    "i": CUTS,
}
SENSITIVE_AT = (0.05,)


def trials(part: str) -> Iterator[Job]:
    """Yield the trials of a part, a first round of all methods, then a second."""
    offered = TRIALS.get(part, {})
    for number in range(max((len(tried) for tried in offered.values()), default=0)):
        for method, tried in offered.items():
            if number < len(tried):
                at = 1.0 if (part, method) == ("f", "adamw") else TUNED_AT[part]
                yield Job(part, TASKS[part][0], method, TUNING_SEED, (at,), trial=number)


def reported(part: str, seed: int) -> Iterator[Job]:
    """Yield the jobs of a part and a seed."""
    for task in TASKS[part]:
        if part == "d":
            for share in SHARES:
                told = early_budgets(share, EARLY_DENSITIES)
                yield Job("d", task, "early", seed, told, change=f"{share:g}")
            yield Job("d", task, "iterative", seed, ("dense", *ROUNDS[1:]))
        elif part == "e":
            for change in CHANGES:
                yield Job("e", task, "dessilbi", seed, SENSITIVE_AT, change=change)
        else:
            for method in TRIALS["c" if part == "g" else part]:
                at = (1.0,) if (part, method) == ("f", "adamw") else BUDGETS[part]
                yield Job(part, task, method, seed, at)
            if part == "b":
                yield Job("b", task, "iterative", seed, (1.0, *DENSITIES))


def planned(parts: str = "abcdefhi", *, smoke: bool = False) -> list[Job]:
    """Return the jobs of some parts: each part's trials before its first seed, then seed by seed.

    Sensitivity, which says least, comes last.
    """
    wanted = [part for part in PARTS if part in parts]
    jobs = [job for job in trials("a") if job.method == "sgd"]  # of which others take over
    if {"d", "e"} & set(wanted) and "b" not in wanted:
        jobs += [job for job in trials("b") if job.method == "dessilbi"]
    if "g" in wanted and "c" not in wanted:
        jobs += list(trials("c"))
    for seed in SEEDS:
        for part in wanted:
            jobs += [job for job in trials(part) if seed == SEEDS[0] and job not in jobs]
            jobs += [job for job in reported(part, seed) if part != "e"]
    if "e" in wanted:
        jobs += [job for seed in SEEDS for job in reported("e", seed)]
    return [tiny(job) for job in jobs if in_smoke(job)] if smoke else jobs


def in_smoke(job: Job) -> bool:
    """Whether a job is run at a tiny size as well: each method once."""
    once = job.seed in (TUNING_SEED, SEEDS[0]) and job.trial in (0, None)
    return once and job.task != "mnist" and job.change in ("", "0.25", "nu x 2", "lambda x 2")


def tiny(job: Job) -> Job:
    """Return a job with fewer budgets: what is like another is left out."""
    if job.method == "iterative":
        return job
    kept = job.budgets[:1] if job.part != "d" else ("rewind 0.2", "reinit 0.1", "random 0.1")
    return replace(job, budgets=kept)
