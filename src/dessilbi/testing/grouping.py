# SPDX-License-Identifier: Apache-2.0
"""Checks of param groups: adding, splitting, ordering and naming them changes no numbers."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dessilbi.testing.problem import (
    STEPS,
    Factory,
    Named,
    NotApplicable,
    assert_partial,
    assert_same_run,
    assert_same_weights,
    has_dual,
    make,
    parameters,
    train,
    weights_of,
)
from dessilbi.testing.stepping import refuses


def options_of(optimizer: Optimizer, param: nn.Parameter) -> dict[str, Any]:
    """Return the options of the group that a parameter is in."""
    for group in optimizer.param_groups:
        if any(param is p for p in group["params"]):
            return {k: v for k, v in group.items() if k not in ("params", "param_names")}
    raise AssertionError("the optimizer does not have the parameter")


def one_group_each(factory: Factory, order: int = 1) -> tuple[Named, Optimizer]:
    """Return the optimizer of ``make`` with every parameter in a group of its own."""
    whole, template = make(factory)
    named = parameters()
    first, *rest = list(zip(named, whole, strict=True))[::order]
    optimizer = factory([first[0]])
    optimizer.param_groups[0].update(options_of(template, first[1][1]))
    for pair, (_, twin) in rest:
        optimizer.add_param_group({**options_of(template, twin), "params": [pair]})
    return named, optimizer


def check_the_split_into_groups_does_not_change_numbers(factory: Factory) -> None:
    """One group or many with the same options: the same run."""
    a, b = make(factory), one_group_each(factory)
    assert len(b[1].param_groups) == len(b[0])
    train(*a)
    train(*b)
    assert_same_run(a, b)


def check_the_order_of_parameters_does_not_change_numbers(factory: Factory) -> None:
    """Parameters given in reverse train as before."""
    a, b = make(factory), one_group_each(factory, order=-1)
    assert b[1].param_groups[0]["params"][0] is b[0][-1][1]
    train(*a)
    train(*b)
    assert_same_run(a, b)


def check_groups_follow_their_own_lr(factory: Factory) -> None:
    """A group trains by its own options, whatever those of its neighbours are."""
    together, alone = one_group_each(factory), one_group_each(factory)
    if any(g.get("unit") is not None for g in together[1].param_groups):
        raise NotApplicable("the parameters form a unit, which does not live by parts")
    together[1].param_groups[1]["lr"] *= 0.5
    for group in alone[1].param_groups:
        group["lr"] *= 0.5
    train(*together)
    train(*alone)
    assert_same_weights(together[0][1:], alone[0][1:])
    assert not torch.equal(together[0][0][1], alone[0][0][1])
    assert_partial(together[1])


def check_a_group_added_during_the_run_joins_it(factory: Factory) -> None:
    """A new group gets the defaults and trains from its first step; the old ones go on."""
    named, optimizer = make(factory)
    old, reference = make(factory)
    train(named, optimizer, 5)
    late = parameters({"late.weight": (6, 4)})
    before = weights_of(late)
    optimizer.add_param_group({"params": late, "lr": 0.01})
    train(named + late, optimizer, STEPS - 5, first=5)
    train(old, reference)
    assert_same_weights(named, old)
    assert not torch.equal(late[0][1], before[0])
    assert optimizer.param_groups[-1]["lr"] == 0.01
    missing = set(optimizer.param_groups[0]) - set(optimizer.param_groups[-1])
    assert not missing, f"the added group lacks {missing}"
    assert_partial(reference)


def check_a_generator_of_parameters_is_taken(factory: Factory) -> None:
    """``params`` may be used up by reading it."""
    _, optimizer = make(factory)
    late = parameters({"late.weight": (6, 4)})
    before = weights_of(late)
    optimizer.add_param_group({"params": (pair for pair in late), "lr": 0.01})
    assert optimizer.param_groups[-1]["param_names"] == ["late.weight"]
    train(late, optimizer, 1)
    assert not torch.equal(late[0][1], before[0])


def check_names_are_kept_in_groups_and_checkpoints(factory: Factory) -> None:
    """Groups carry the names of their parameters, in order, also in the state dict."""
    named, optimizer = make(factory)
    name_of = {p: name for name, p in named}
    for group, saved in zip(
        optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True
    ):
        assert group["param_names"] == [name_of[p] for p in group["params"]]
        assert saved["param_names"] == group["param_names"]


def check_unnamed_parameters_train(factory: Factory) -> None:
    """Names are for reading results; without them the run is the same."""
    a, b = make(factory), make(factory)
    for group in b[1].param_groups:
        group.pop("param_names", None)  # as torch leaves it for parameters without names
    train(*a)
    train(*b)
    assert_same_weights(a[0], b[0])
    assert_partial(a[1])
    if has_dual(b[1]):
        assert "named_parameters" in refuses(b[1].support)  # type: ignore[attr-defined]


def check_parameters_replaced_in_their_groups_train(factory: Factory) -> None:
    """Launchers move parameters to devices or shard them, and put the new ones in the groups."""
    a, b = make(factory), make(factory)
    new = parameters()
    swap = {old: p for (_, old), (_, p) in zip(b[0], new, strict=True)}
    before = weights_of(b[0])
    for group in b[1].param_groups:
        group["params"] = [swap[p] for p in group["params"]]
    train(*a)
    train(new, b[1])
    assert_same_run(a, (new, b[1]))
    for (_, p), old in zip(b[0], before, strict=True):
        assert torch.equal(p, old)


GROUPING = [
    check_the_split_into_groups_does_not_change_numbers,
    check_the_order_of_parameters_does_not_change_numbers,
    check_groups_follow_their_own_lr,
    check_a_group_added_during_the_run_joins_it,
    check_a_generator_of_parameters_is_taken,
    check_names_are_kept_in_groups_and_checkpoints,
    check_unnamed_parameters_train,
    check_parameters_replaced_in_their_groups_train,
]
