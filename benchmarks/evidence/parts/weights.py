# SPDX-License-Identifier: Apache-2.0
"""Part (b): the frontier of single weights at equal training; part (e): sensitivity."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

from benchmarks.evidence.bench import Bench, Job, MissingError, line_of
from benchmarks.evidence.methods import bregman, magnitude, ours
from benchmarks.evidence.settings import Setting
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import (
    Searched,
    Stage,
    at_once,
    fit,
    judged,
    sgd,
    structured,
    ticket_by,
    train_ticket,
)
from torch import nn
from torch.optim import Optimizer

SEARCH = 0.6  # of E; the rest trains the ticket
AIM = 0.03  # density that the search for all densities aims at
SHARE = 0.1  # of the weights LinBreg starts with
HALF = 0.5  # of the tail: by then a tightening one has come down to the wanted density
DECAY = 5e-4  # of what trains a ticket, where the setting has none
# Of the runs for one density: nested tickets enforced on the way along the cubic curve, or none.
STYLES: dict[str, Setting] = {
    "tightened": {"coupling": 1.0, "tighten": (0.1, 0.95)},
    "free": {"coupling": 4.0},
}


def search_ours(task: Task, stage: Stage, seed: int, setting: Setting) -> Searched:
    model = task.model(seed)
    options: Setting = {"density": AIM} | setting
    return ours.search(task, model, ours.element_groups(model), stage, seed=seed, **options)


def search_plain(task: Task, stage: Stage, seed: int, setting: Setting) -> Searched:
    model = task.model(seed)
    optimizer = sgd(model, setting["lr"], weight_decay=setting["decay"])
    spent = fit(task, model, optimizer, stage, seed=seed)
    return Searched(model, lambda density: magnitude.by_magnitude(model, density), spent)


def search_bregman(task: Task, stage: Stage, seed: int, setting: Setting) -> Searched:
    """LinBreg, or AdaBreg where the setting has betas; ranked by |W|, what is out by |v|."""
    model = task.model(seed)
    weights = structured(model)
    bregman.start_sparse(weights.values(), SHARE, seed)
    groups = bregman.bregman_groups(model, weights, setting["lam"])
    optimizer = bregman.Bregman(groups, setting["lr"], betas=setting.get("betas"))
    spent = fit(task, model, optimizer, stage, seed=seed)
    scores = {name: optimizer.state[w]["v"].detach().abs().clone() for name, w in weights.items()}
    kept = sum(int((w != 0).sum()) for w in weights.values())
    facts = {"support": kept / sum(w.numel() for w in weights.values())}
    return Searched(model, lambda density: ticket_by(scores, density), spent, facts)


Search = Callable[[Task, Stage, int, Setting], Searched]
SEARCHES: dict[str, Search] = {
    "dessilbi": search_ours,
    "dessilbi-target": search_ours,
    "dessilbi-tight": search_ours,
    "one-shot": search_plain,
    "one-shot-tight": search_plain,
    "linbreg": search_bregman,
    "adabreg": lambda task, stage, seed, setting: search_bregman(
        task, stage, seed, setting | {"betas": (0.9, 0.999)}
    ),
}


def tail_of(setting: Setting) -> Callable[[nn.Module], Optimizer]:
    """Return the maker of what trains a ticket: SGD at the method's own learning rate.

    LinBreg's and AdaBreg's rates are not those of SGD, so their tickets have one of their own.
    """
    lr = setting.get("tail_lr", setting["lr"])
    return lambda net: sgd(net, lr, weight_decay=setting.get("decay", DECAY))


def frontier(job: Job, bench: Bench, search: Search, setting: Setting) -> Iterator[dict[str, Any]]:
    """One search for all budgets; a tail for each."""
    task = bench.task(job.task)
    steps = int(SEARCH * task.steps)
    own = {key: value for key, value in setting.items() if key not in ("tail_lr", "first")}
    found = search(task, Stage(task.steps, 0, steps), job.seed, own)
    whole = judged(task, found.model, reported=job.reported)
    for budget in job.budgets:
        yield tail(job, task, found, budget, setting, whole)


def tail(
    job: Job, task: Task, found: Searched, budget: float, setting: Setting, whole: dict[str, float]
) -> dict[str, Any]:
    """Cut a ticket, train it to the end of the schedule, and tell the line.

    A tail that tightens starts from a larger ticket of the family and prunes it gradually.
    """
    ticket = found.ticket(budget)
    facts = at_once(task, found.model, ticket, reported=job.reported)
    stage = Stage(task.steps, int(SEARCH * task.steps))
    make = tail_of(setting)
    if budget < setting.get("first", 0.0):
        net = deepcopy(found.model)
        start = found.ticket(setting["first"])
        ticket, spent = magnitude.gradual(
            task, net, budget, stage, seed=job.seed, make=make, begin=0.0, end=HALF, start=start
        )
    else:
        net, spent = train_ticket(task, found.model, ticket, stage, seed=job.seed, optimizer=make)
    facts |= judged(task, net, reported=job.reported) | found.facts
    return line_of(
        job,
        budget,
        setting,
        density=ticket.density,
        **facts,
        searched={key: value for key, value in whole.items() if key.endswith("accuracy")},
        search_macs=found.spent.macs,
        macs=(found.spent + spent).macs,
        seconds=round((found.spent + spent).seconds, 1),
    )


def per_density(job: Job, bench: Bench, setting: Setting) -> Iterator[dict[str, Any]]:
    """A search for every budget."""
    for budget in job.budgets:
        one = replace(job, budgets=(budget,))
        aimed = STYLES[setting["style"]] | {"lr": setting["lr"], "density": budget}
        for line in frontier(one, bench, SEARCHES[job.method], aimed):
            yield line | {"setting": setting}


def gradual(job: Job, bench: Bench, setting: Setting) -> Iterator[dict[str, Any]]:
    task = bench.task(job.task)
    for budget in job.budgets:
        model = task.model(job.seed)
        ticket, spent = magnitude.gradual(
            task,
            model,
            budget,
            Stage(task.steps),
            seed=job.seed,
            make=lambda net: sgd(net, setting["lr"], weight_decay=setting["decay"]),
            end=setting.get("end", SEARCH),
        )
        facts = judged(task, model, reported=job.reported)
        told = {"macs": spent.macs, "seconds": round(spent.seconds, 1)}
        yield line_of(job, budget, setting, density=ticket.density, **facts, **told)


def iterative(job: Job, bench: Bench, setting: Setting) -> Iterator[dict[str, Any]]:
    task = bench.task(job.task)
    dense, before = bench.dense(job.task, job.seed)
    whole = judged(task, dense, reported=job.reported)
    yield line_of(job, 1.0, setting, density=1.0, **whole, macs=before.macs, seconds=before.seconds)
    rounds = magnitude.rounds(
        task,
        lambda: task.model(job.seed),
        dense,
        [budget for budget in job.budgets if budget < 1],
        seed=job.seed,
        make=lambda net: sgd(net, setting["lr"]),
    )
    for density, net, ticket, spent in rounds:
        before = before + spent
        facts = judged(task, net, reported=job.reported)
        told = {"macs": before.macs, "seconds": round(before.seconds, 1)}
        yield line_of(job, density, setting, density=ticket.density, **facts, **told)


def changed(job: Job, bench: Bench, setting: Setting) -> Setting:
    """Return the setting of part (e): nu, kappa or lambda times a factor.

    Lambda is what density control had come to in (b), and constant.

    Raises:
        MissingError: That run is not there.
    """
    name, _, told = job.change.partition(" x ")
    factor = float(told)
    if name == "nu":
        return setting | {"coupling": setting["coupling"] / factor}
    if name == "kappa":
        return setting | {"kappa": factor}
    same = ("b", "dessilbi", job.seed)
    for line in bench.lines():
        if (line["part"], line["method"], line["seed"]) == same:
            return setting | {"lam": factor * line["lambda"]}
    raise MissingError(f"{job.name} needs the lambda of part b")


def run(job: Job, bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the lines of a job, one for each budget."""
    setting = bench.setting(job)
    if job.part == "e":
        return frontier(job, bench, search_ours, changed(job, bench, setting))
    if job.method == "gradual":
        return gradual(job, bench, setting)
    if job.method == "iterative":
        return iterative(job, bench, setting)
    if job.method == "dessilbi-target":
        return per_density(job, bench, setting)
    if job.method in ("linbreg", "adabreg"):
        # Their learning rates are not those of SGD, which trains their tickets.
        setting = setting | {"tail_lr": bench.chosen("a", "sgd")["lr"]}
    return frontier(job, bench, SEARCHES[job.method], setting)
