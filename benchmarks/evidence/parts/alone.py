# SPDX-License-Identifier: Apache-2.0
"""Parts (h) and (i): all of E is the search, and nothing is retrained."""

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence.bench import Bench, Job, line_of
from benchmarks.evidence.methods import ours
from benchmarks.evidence.parts import filters, weights
from benchmarks.evidence.settings import Setting
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import Searched, Stage, at_once, judged

from dessilbi.training.evaluation import recalibrated

UNTIL = 0.6  # of E: by then nested tickets have come down to the wanted density


def told(job: Job, task: Task, found: Searched, budget: float) -> dict[str, Any]:
    """Return the facts of a ticket that is judged as it is cut."""
    ticket = found.ticket(budget)
    facts = at_once(task, found.model, ticket, reported=job.reported)
    return {
        "budget": budget,
        "density": ticket.density,
        **{key.removeprefix("once_"): value for key, value in facts.items()},
        **found.facts,
        "macs": found.spent.macs,
        "seconds": round(found.spent.seconds, 1),
    }


def families(job: Job, task: Task, setting: Setting) -> Iterator[dict[str, Any]]:
    """One search, single weights of all densities from it."""
    found = weights.SEARCHES[job.method](task, Stage(task.steps), job.seed, setting)
    for budget in job.budgets:
        yield told(job, task, found, budget)


def per_density(job: Job, task: Task, setting: Setting) -> Iterator[dict[str, Any]]:
    """A search for each density, nested tickets enforced on the way as gradual pruning does."""
    for budget in job.budgets:
        model = task.model(job.seed)
        found = ours.search(
            task,
            model,
            ours.element_groups(model),
            Stage(task.steps),
            seed=job.seed,
            density=budget,
            tighten=(0.1 * UNTIL, UNTIL),
            **setting,
        )
        yield told(job, task, found, budget)


def smaller(job: Job, task: Task, setting: Setting) -> Iterator[dict[str, Any]]:
    """One search, filters removed to each share of the MACs."""
    found = filters.SEARCHES[job.method](task, Stage(task.steps), job.seed, setting)
    dense = task.macs(found.model)
    for budget in job.budgets:
        net = recalibrated(found.cut(1 / budget), task.train)
        yield {
            "budget": budget,
            **judged(task, net, reported=job.reported),
            **found.facts,
            "macs_left": task.macs(net) / dense,
            "macs": found.spent.macs,
            "seconds": round(found.spent.seconds, 1),
        }


def run(job: Job, bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the lines of a job, one for each budget."""
    task, setting = bench.task(job.task), bench.setting(job)
    if job.method == "gradual":
        yield from weights.gradual(job, bench, setting)
        return
    if job.part == "i":
        lines = smaller(job, task, setting)
    elif job.method == "dessilbi-target":
        lines = per_density(job, task, setting)
    else:
        lines = families(job, task, setting)
    for facts in lines:
        yield line_of(job, facts.pop("budget"), setting, **facts)
