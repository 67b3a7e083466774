# SPDX-License-Identifier: Apache-2.0
"""Torch-Pruning's GroupNormPruner, driven as its authors do: regularize, then prune step by step.

G. Fang et al., DepGraph: towards any structural pruning (CVPR 2023).
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

STEPS = 200  # of the way from the whole network to none of it


def pruner_for(model: nn.Module, example: Tensor, strength: float) -> Any:
    """Return the pruner of a network; the last linear layer keeps its outputs."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    return tp.pruner.GroupNormPruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        reg=strength,
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=0.95,  # no layer dies
        iterative_steps=STEPS,
        ignored_layers=last,
    )


def pruned(
    model: nn.Module, example: Tensor, limit: float, measure: Callable[[nn.Module], float]
) -> nn.Module:
    """Return a copy, pruned until its measure is at most ``limit``.

    Raises:
        ValueError: The pruner does not get there.
    """
    net = deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = pruner_for(net, example, 0.0)
        for _ in range(STEPS):
            if measure(net) <= limit:
                return net
            pruner.step()
    if measure(net) > limit:
        raise ValueError(f"the pruner stays at {measure(net):,.0f}, above {limit:,.0f}")
    return net
