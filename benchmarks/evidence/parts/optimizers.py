# SPDX-License-Identifier: Apache-2.0
"""Part (a): W of DessiLBI beside plain optimizers."""

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence.bench import Bench, Job, line_of
from benchmarks.evidence.methods import ours, plain
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import Spent, Stage, at_once, fit, judged
from torch import nn

from dessilbi import param_groups

DENSITY = 0.1  # that density control aims at


def groups_for(task: Task, model: nn.Module, method: str) -> list[dict[str, Any]]:
    """Return single weights, or filters and neurons; the output layer has no structure then."""
    if method != "dessilbi-filter":
        return ours.element_groups(model)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    return param_groups(model, {f"{last}.weight": None, "fc*.weight": "neuron"})


def run(job: Job, bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the one line of a job."""
    task, setting = bench.task(job.task), bench.setting(job)
    facts: dict[str, Any] = {}
    if job.method.startswith("dessilbi"):
        model = task.model(job.seed)
        found = ours.search(
            task,
            model,
            groups_for(task, model, job.method),
            Stage(task.steps),
            seed=job.seed,
            density=0.3 if job.method == "dessilbi-filter" else DENSITY,
            base="adamw" if job.method.endswith("adamw") else "sgd",
            **setting,
        )
        spent, facts = found.spent, dict(found.facts)
        ticket = found.ticket(facts["support"])
        facts |= at_once(task, model, ticket, reported=job.reported)
    elif job.method == "sgd" and job.reported:
        model, spent = bench.dense(job.task, job.seed)
    else:
        model, spent = trained(task, job, setting)
    facts |= judged(task, model, reported=job.reported)
    for budget in job.budgets:
        yield line_of(job, budget, setting, **facts, macs=spent.macs, seconds=spent.seconds)


def trained(task: Task, job: Job, setting: dict[str, Any]) -> tuple[nn.Module, Spent]:
    """Train by a plain optimizer over E."""
    model, own = task.model(job.seed), setting.get("own", 0.0)
    optimizer = plain.OPTIMIZERS[job.method](model, setting["lr"], own)
    extra = plain.changes(job.method, model, own)
    return model, fit(task, model, optimizer, Stage(task.steps), seed=job.seed, **extra)
