# SPDX-License-Identifier: Apache-2.0
"""Part (f): heads and neurons of a character GPT, loss against their density."""

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence.bench import Bench, Job, line_of
from benchmarks.evidence.methods import ours
from benchmarks.evidence.parts.filters import unit_scores
from benchmarks.evidence.settings import Setting
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import Searched, Stage, at_once, fit, judged
from torch import nn
from torch.optim import AdamW

from dessilbi import compact, param_groups
from dessilbi.choosing.choosing import Family

SEARCH = 0.5  # of E; the rest trains the smaller network
AIM = 0.25  # density of heads and neurons that the search aims at
DECAY = 0.01


def unit_groups(task: Task, model: nn.Module) -> list[dict[str, Any]]:
    """Return groups with heads of queries, keys and values as units, and neurons."""
    attention = model.get_submodule("blocks.0.attention")
    rows = attention.query.out_features // attention.num_heads
    rules: dict[str, Any] = {
        f"blocks.*.attention.{name}.weight": f"head:{rows}" for name in ("query", "key", "value")
    }
    return param_groups(
        model, rules | {"blocks.*.up.weight": "neuron", "*": None}, example_inputs=task.example()
    )


def search(task: Task, job: Job, stage: Stage, setting: Setting) -> Searched:
    """Train by DessiLBI around AdamW, or by AdamW alone, and rank heads and neurons."""
    model = task.model(job.seed)
    groups = unit_groups(task, model)
    if job.method == "dessilbi-adamw":
        return ours.search(
            task,
            model,
            groups,
            stage,
            seed=job.seed,
            density=AIM,
            base="adamw",
            decay=DECAY,
            **setting,
        )
    optimizer = AdamW(model.parameters(), lr=setting["lr"], weight_decay=setting["decay"])
    spent = fit(task, model, optimizer, stage, seed=job.seed)
    scores, specs, units = unit_scores(groups)
    family = Family(
        [scores], specs, units, model=model, example_inputs=task.example(), relative=True
    )
    return Searched(model, lambda d: family.choose("density", d).ticket, spent)


def run(job: Job, bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the lines of a job; "dense" is a budget of AdamW alone."""
    task, setting = bench.task(job.task), bench.setting(job)
    if job.method == "adamw":
        model = task.model(job.seed)
        optimizer = AdamW(model.parameters(), lr=setting["lr"], weight_decay=setting["decay"])
        spent = fit(task, model, optimizer, Stage(task.steps), seed=job.seed)
        facts = judged(task, model, reported=job.reported)
        yield line_of(job, 1.0, setting, **facts, macs=spent.macs, seconds=round(spent.seconds, 1))
        return
    steps = int(SEARCH * task.steps)
    found = search(task, job, Stage(task.steps, 0, steps), setting)
    for budget in job.budgets:
        yield trained(job, task, found, budget, setting)


def trained(
    job: Job, task: Task, found: Searched, budget: float, setting: Setting
) -> dict[str, Any]:
    """Remove heads and neurons, train what is left to the end of the schedule."""
    example = task.example()
    if found.path is None:
        ticket = found.ticket(budget)
    else:
        ticket = found.path.ticket(density=budget, model=found.model, example_inputs=example)
    once = at_once(task, found.model, ticket, reported=job.reported)
    net = compact(found.model, ticket, example_inputs=example).model
    optimizer = AdamW(net.parameters(), lr=setting["lr"], weight_decay=setting.get("decay", DECAY))
    stage = Stage(task.steps, int(SEARCH * task.steps))
    spent = found.spent + fit(task, net, optimizer, stage, seed=job.seed)
    return line_of(
        job,
        budget,
        setting,
        density=ticket.density,
        **once,
        **judged(task, net, reported=job.reported),
        **found.facts,
        macs=spent.macs,
        seconds=round(spent.seconds, 1),
    )
