# SPDX-License-Identifier: Apache-2.0
"""Part (c): searches for filters, and what is removed physically after each of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.evidence.bench import Bench, Job, line_of
from benchmarks.evidence.methods import group_lasso, ours, slimming, torch_pruner
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import Searched, Spent, Stage, fit, judged, sgd
from torch import Tensor, nn

from dessilbi import DessiLBI, Path, compact, param_groups
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.choosing.choosing import Family
from dessilbi.path.scores import block_scores
from dessilbi.training.evaluation import recalibrated

Cut = Callable[[float], nn.Module]  # from a share of the MACs to the smaller network
DECAY = 5e-4
AIM = 0.3  # density of the filters that the search aims at


@dataclass
class Cuttable:
    """A searched network and how it is cut to a share of its MACs."""

    model: nn.Module
    cut: Cut
    spent: Spent
    facts: dict[str, Any]


def filter_groups(task: Task, model: nn.Module) -> list[dict[str, Any]]:
    """Return groups with filters coupled into units; the output layer has no structure."""
    linear = {f"{n}.weight": None for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return param_groups(model, linear, example_inputs=task.example())


def unit_scores(
    groups: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, TensorSpec], dict[str, str | None]]:
    """Return the norm of W for every unit, and what the units are."""
    # An optimizer that never steps knows the blocks of its groups.
    optimizer = DessiLBI([dict(group) for group in groups])
    path = Path(optimizer, every=1)
    return block_scores(optimizer)["weight"], dict(path.specs), dict(path.units)


def by_scores(
    task: Task,
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Tensor],
    *,
    relative: bool,
) -> Cut:
    """Return the cut that removes the units with the smallest scores, over all layers.

    Relative scores are divided by the mean of their layer.
    """
    _, specs, units = unit_scores(groups)
    family = Family(
        [scores], specs, units, model=model, example_inputs=task.example(), relative=relative
    )

    def cut(share: float) -> nn.Module:
        ticket = family.choose("macs", share).ticket
        return compact(model, ticket, example_inputs=task.example()).model

    return cut


def search_ours(task: Task, stage: Stage, seed: int, setting: dict[str, Any]) -> Cuttable:
    model = task.model(seed)
    options = {"decay": DECAY, "density": AIM} | setting
    found: Searched = ours.search(
        task, model, filter_groups(task, model), stage, seed=seed, **options
    )
    cut = by_path(task, model, found)
    return Cuttable(model, cut, found.spent, found.facts)


def by_path(task: Task, model: nn.Module, found: Searched) -> Cut:
    """Return the cut of a path's family."""
    example = task.example()
    assert found.path is not None
    family = found.path.family(model, example_inputs=example)
    return lambda share: (
        compact(model, family.choose("macs", share).ticket, example_inputs=example).model
    )


def search_lasso(task: Task, stage: Stage, seed: int, setting: dict[str, Any]) -> Cuttable:
    """Proximal SGD with group lasso; strength 0 is plain SGD with the units' norms."""
    model = task.model(seed)
    groups = filter_groups(task, model)
    units = group_lasso.units_in(groups)
    optimizer = sgd(model, setting["lr"], weight_decay=setting.get("decay", DECAY))
    strength = setting.get("strength", 0.0)

    def after(_: int) -> None:
        if strength:
            group_lasso.proximal_step(optimizer, units, strength)

    spent = fit(task, model, optimizer, stage, seed=seed, after=after)
    zeros = torch.cat([group_lasso.norms(unit) == 0 for unit in units]).float().mean()
    cut = by_scores(task, model, groups, unit_scores(groups)[0], relative=True)
    return Cuttable(model, cut, spent, {"zero_units": float(zeros)})


def search_slimming(task: Task, stage: Stage, seed: int, setting: dict[str, Any]) -> Cuttable:
    model = task.model(seed)
    groups = filter_groups(task, model)
    optimizer = sgd(model, setting["lr"], weight_decay=DECAY)
    spent = fit(
        task,
        model,
        optimizer,
        stage,
        seed=seed,
        before=lambda _: slimming.add_penalty(model, setting["strength"]),
    )
    scores = slimming.filter_scores(model, list(unit_scores(groups)[0]))
    return Cuttable(model, by_scores(task, model, groups, scores, relative=False), spent, {})


def search_pruner(task: Task, stage: Stage, seed: int, setting: dict[str, Any]) -> Cuttable:
    model, example = task.model(seed), task.example()
    optimizer = sgd(model, setting["lr"], weight_decay=DECAY)
    pruner = torch_pruner.pruner_for(model, example, setting["strength"])
    spent = fit(task, model, optimizer, stage, seed=seed, before=lambda _: pruner.regularize(model))
    dense = task.macs(model)
    return Cuttable(
        model,
        lambda share: torch_pruner.pruned(model, example, share * dense, task.macs),
        spent,
        {},
    )


SEARCHES: dict[str, Callable[[Task, Stage, int, dict[str, Any]], Cuttable]] = {
    "dessilbi": search_ours,
    "group-lasso": search_lasso,
    "magnitude": search_lasso,
    "slimming": search_slimming,
    "torch-pruning": search_pruner,
}


SEARCH = 0.6  # of E; the rest trains the smaller network


def run(job: Job, bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the lines of a job: one search, and for every cut of the MACs a smaller network."""
    task, setting = bench.task(job.task), bench.setting(job)
    steps = int(SEARCH * task.steps)
    found = SEARCHES[job.method](task, Stage(task.steps, 0, steps), job.seed, setting)
    whole, dense = judged(task, found.model, reported=job.reported), task.macs(found.model)
    for budget in job.budgets:
        net = recalibrated(found.cut(1 / budget), task.train)
        scores = judged(task, net, reported=job.reported)
        once = {f"once_{key}": value for key, value in scores.items()}
        optimizer = sgd(net, setting["lr"], weight_decay=DECAY)
        spent = fit(task, net, optimizer, Stage(task.steps, steps), seed=job.seed)
        total = found.spent + spent
        yield line_of(
            job,
            budget,
            setting,
            **once,
            **judged(task, net, reported=job.reported),
            **found.facts,
            searched={key: value for key, value in whole.items() if key.endswith("accuracy")},
            macs_left=task.macs(net) / dense,
            parameters_left=_size(net) / _size(found.model),
            search_macs=found.spent.macs,
            macs=total.macs,
            seconds=round(total.seconds, 1),
        )


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
