# SPDX-License-Identifier: Apache-2.0
"""Rehearsing: whether a smaller model can be trained, tried on a copy.

The certificate is about evaluation. What only training reads, such as an auxiliary head behind
``if self.training``, is seen by nobody else, and was not cut with the rest.
"""

import copy

import torch
from torch import nn

from dessilbi.compaction.comparing import compared
from dessilbi.graph.program import ExampleInputs, as_arguments


def check_trains(model: nn.Module, small: nn.Module, example_inputs: ExampleInputs) -> None:
    """Refuse a smaller model whose forward in training does not do what that of ``model`` does.

    Both are copied, so that weights, statistics and random states stay. A model that does not
    train on the example itself, such as a batch norm with one sample, says nothing.

    Raises:
        ValueError: The smaller model fails, or its answers have other shapes.
    """
    try:
        wanted = _shapes(model, model, example_inputs)
    except Exception:  # a forward may fail in any way
        return
    try:
        found = _shapes(small, model, example_inputs)
        reason = "" if found == wanted else f"its answers are {found}, not {wanted}"
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if reason:
        raise ValueError(
            f"{type(model).__name__} cannot go on training once it is smaller, because what its "
            f"forward does only in training did not follow ({reason}); let it run that in "
            f"evaluation as well, so that it is cut with the rest, or compact without optimizer="
        )


def _shapes(
    model: nn.Module, like: nn.Module, example_inputs: ExampleInputs
) -> list[tuple[int, ...]]:
    """Return the shapes of what a copy answers in training, frozen parts as they are."""
    args, kwargs = as_arguments(example_inputs)
    rehearsal = copy.deepcopy(model)
    if like.training:
        for module, other in zip(rehearsal.modules(), like.modules(), strict=True):
            module.training = other.training
    else:
        rehearsal.train()
    places = {p.device for p in like.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(places, key=str)), torch.no_grad():
        return [tuple(x.shape) for x in compared(rehearsal(*args, **kwargs))]
