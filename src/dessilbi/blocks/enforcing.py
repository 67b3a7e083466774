# SPDX-License-Identifier: Apache-2.0
"""Enforcing: what is dead stays dead while an optimizer trains on, and does not count.

The handle hangs on the optimizer by its step hooks alone: whoever needs to know what is enforced
(:func:`living_entries`) finds it there, and it vanishes with the optimizer.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dessilbi.blocks.sharding import local, local_part
from dessilbi.blocks.structure import Block, block_norms


class Enforcement:
    """Handle of :meth:`dessilbi.Ticket.enforce`; call :meth:`remove` to stop.

    Args:
        masks: Parameter -> element-wise mask, True where it lives; plain tensors on the CPU.
        optimizer: The optimizer that trains (some of) these parameters.

    Raises:
        ValueError: It trains none of them.
    """

    def __init__(self, masks: Mapping[nn.Parameter, Tensor], optimizer: Optimizer):
        self.masks = dict(masks)
        self._dead = {
            param: ~local_part(mask, param).to(local(param).device) for param, mask in masks.items()
        }
        self._counts: dict[tuple[object, ...], Tensor] = {}
        self._optimizer = optimizer
        trained = {param for group in optimizer.param_groups for param in group["params"]}
        if self._dead and trained.isdisjoint(self._dead):
            raise ValueError(
                "this optimizer trains none of the ticket's tensors: pass the one that trains "
                "this model"
            )
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Masked as soon as they are there, so that gradient clipping sees what a model without
        # the dead blocks would see, and so that closures are covered.
        self._handles += [
            param.register_post_accumulate_grad_hook(self._zero_gradient)  # type: ignore[no-untyped-call]
            for param in self._dead
            if param.requires_grad
        ]
        self._after_step()

    def _before_step(self, *_: Any) -> None:
        for param in self._dead:
            self._zero_gradient(param)

    def _after_step(self, *_: Any) -> None:
        self._before_step()
        self._zero_weights_and_state()

    @torch.no_grad()
    def _zero_gradient(self, param: Tensor) -> None:
        if param.grad is not None:
            local(param.grad).masked_fill_(self._dead[param], 0)  # type: ignore[index]

    @torch.no_grad()
    def _zero_weights_and_state(self) -> None:
        for param, dead in self._dead.items():
            local(param).masked_fill_(dead, 0)
            waiting = getattr(self._optimizer, "_waiting", {}).get(param)  # a loaded V, see wrap
            for value in (waiting, *self._optimizer.state.get(param, {}).values()):
                if isinstance(value, Tensor) and value.shape == param.shape:
                    local(value).masked_fill_(dead, 0)

    def remove(self) -> None:
        """Stop enforcing; blocks may grow again from now on."""
        for handle in self._handles:
            with suppress(KeyError):
                handle.remove()
        self._handles = []


def enforcements(optimizer: Optimizer) -> list[Enforcement]:
    """Return what is enforced on an optimizer at this moment."""
    owners = [getattr(h, "__self__", None) for h in optimizer._optimizer_step_post_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Enforcement)]


def living_entries(optimizer: Optimizer, param: Tensor, block: Block) -> Tensor | None:
    """Return how many entries of every block live, or None where nothing is enforced.

    Returns:
        Floating point counts of the grid's shape over the whole tensor, on the parameter's device.
    """
    found = [e for e in enforcements(optimizer) if param in e.masks]
    if not found:
        return None
    known, key = found[-1]._counts, (id(param), block, *found)
    if key not in known:
        alive = found[0].masks[param]  # type: ignore[index]
        for other in found[1:]:
            alive = alive & other.masks[param]  # type: ignore[index]
        counts = block_norms(alive.double(), block).square().round()
        device = local(param).device
        known[key] = counts.to(device, torch.float32 if device.type == "mps" else counts.dtype)
    return known[key]
