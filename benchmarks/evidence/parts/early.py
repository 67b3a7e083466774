# SPDX-License-Identifier: Apache-2.0
"""Part (d): tickets found early, rewound to the initialisation and trained again."""

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence.bench import Bench, Job, line_of
from benchmarks.evidence.methods import magnitude, ours
from benchmarks.evidence.settings import CONTROLLED, ROUNDS
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import Spent, Stage, at_once, judged, sgd, train_ticket

from dessilbi import Ticket
from dessilbi.choosing.controls import random_like

OTHER = 1000  # added to the seed of a fresh initialisation


def run(job: Job, bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the lines of a job: of the dense net and its pruning in rounds, or of one search."""
    lr = bench.chosen("a", "sgd")["lr"]
    if job.method == "iterative":
        return rounds(job, bench, lr)
    return tickets(job, bench, lr)


def rounds(job: Job, bench: Bench, lr: float) -> Iterator[dict[str, Any]]:
    task = bench.task(job.task)
    dense, before = bench.dense(job.task, job.seed)
    whole = judged(task, dense, reported=True)
    yield line_of(job, "dense", {"lr": lr}, **whole, macs=before.macs, seconds=before.seconds)
    found = magnitude.rounds(
        task,
        lambda: task.model(job.seed),
        dense,
        ROUNDS,
        seed=job.seed,
        make=lambda net: sgd(net, lr),
    )
    for density, net, ticket, spent in found:
        before = before + spent
        if density in job.budgets:
            told = {"macs": before.macs, "seconds": round(before.seconds, 1)}
            facts = judged(task, net, reported=True)
            yield line_of(job, density, {"lr": lr}, density=ticket.density, **facts, **told)


def tickets(job: Job, bench: Bench, lr: float) -> Iterator[dict[str, Any]]:
    """One search over a share of E; its tickets rewound, and beside them the controls."""
    task, setting, share = bench.task(job.task), bench.setting(job), float(job.change)
    done = {line["cell"] for line in bench.lines()}
    model = task.model(job.seed)
    stage = Stage(max(20, int(share * task.steps)))
    options = {key: value for key, value in setting.items() if key != "tail_lr"}
    found = ours.search(
        task,
        model,
        ours.element_groups(model),
        stage,
        seed=job.seed,
        **{"density": min(float(b.split()[1]) for b in job.budgets)} | options,
    )
    whole = judged(task, model, reported=True)
    for budget in job.budgets:
        if job.cell(budget) in done:
            continue
        kind, wanted = budget.split()
        ticket = found.ticket(float(wanted))
        once = at_once(task, model, ticket, reported=True)
        net, spent = trained(task, job, ticket, kind, lr)
        total = found.spent + spent
        yield line_of(
            job,
            budget,
            setting,
            density=ticket.density,
            **once,
            **judged(task, net, reported=True),
            searched=whole["test_accuracy"],
            macs=total.macs,
            seconds=round(total.seconds, 1),
        )


def trained(task: Task, job: Job, ticket: Ticket, kind: str, lr: float) -> tuple[Any, Spent]:
    """Train a ticket from a beginning: as the search began, afresh, or at random places."""
    start = task.model(job.seed + (OTHER if kind == "reinit" else 0))
    if kind == "random":
        ticket = random_like(
            ticket,
            ticket.specs,
            dict.fromkeys(ticket.specs),
            model=start,
            example_inputs=task.example(),
            seed=job.seed,
        )
    return train_ticket(
        task, start, ticket, Stage(task.steps), seed=job.seed, optimizer=lambda net: sgd(net, lr)
    )


def budgets(share: float, densities: tuple[float, ...]) -> tuple[str, ...]:
    """Return what is trained from a search of that share: controls for one share only."""
    wanted = [f"rewind {density}" for density in densities]
    if share == 0.25:
        wanted += [f"{kind} {d}" for d in CONTROLLED for kind in ("reinit", "random")]
    return tuple(wanted)
