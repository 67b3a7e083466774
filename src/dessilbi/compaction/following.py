# SPDX-License-Identifier: Apache-2.0
"""Following: the optimizer of a model goes on with the compacted one, its state cut alike.

A copy is made: the original optimizer still trains the original model. Groups keep their order and
options, so a scheduler follows by a copy as well.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

from dessilbi.blocks.enforcing import Enforcement, enforcements
from dessilbi.blocks.naming import tensor_names
from dessilbi.blocks.sharding import is_sharded
from dessilbi.blocks.structure import Block, indices
from dessilbi.blocks.ticket import Ticket
from dessilbi.cuts.cutting import Cut, Cuts, cut_tensor
from dessilbi.graph.labels import Ids
from dessilbi.optimizers import dual

Scheduler = TypeVar("Scheduler")

_HOOKED = ("step", "state_dict", "load_state_dict")
_CAME_FROM: WeakKeyDictionary[Optimizer, ref[Optimizer]] = WeakKeyDictionary()


def check_follows(optimizer: Optimizer, model: nn.Module, cuts: Cuts) -> None:
    """Refuse what cannot go on with a smaller model, before anything is done.

    Raises:
        ValueError: The optimizer trains something else, parts of its blocks would be cut off, or
            its state is not made of tensors shaped like the parameters.
    """
    names = _names(model)
    hooks = [h for layer in _layers(optimizer) for h in layer._optimizer_step_post_hooks.values()]
    if any(_stays(hook) for hook in hooks):
        warnings.warn(
            "the Path that watches this optimizer stays with the original model: call its close() "
            "before, and watch the smaller model with Path(small.optimizer, after=path)",
            stacklevel=3,
        )
    _check_params(optimizer, names, "compact")
    _check_state(optimizer, names, cuts, "compact")
    _check_structures(optimizer, names, cuts)


def check_grows(optimizer: Optimizer, model: nn.Module, cuts: Cuts) -> None:
    """Refuse what cannot go on with a wider model, before anything is done.

    Raises:
        ValueError: The optimizer trains something else, or its state is not made of tensors shaped
            like the parameters.
    """
    names = _names(model)
    _check_params(optimizer, names, "grow")
    _check_state(optimizer, names, cuts, "grow")


def _check_params(optimizer: Optimizer, names: Mapping[Tensor, str], what: str) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if is_sharded(param):
                raise ValueError(
                    f"this optimizer trains sharded parameters: {what} on one process, from a "
                    f"gathered checkpoint, and shard the other model"
                )
            if param not in names:
                raise ValueError(
                    f"this optimizer also trains a parameter of shape {tuple(param.shape)} that "
                    f"is not in the model: pass the optimizer that trains this model alone"
                )


def _names(model: nn.Module) -> dict[Tensor, str]:
    names = tensor_names(model)
    return {param: names[name] for name, param in model.named_parameters()}


def _layers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer and what it wraps."""
    yield optimizer
    if isinstance(base := getattr(optimizer, "base", None), Optimizer):
        yield base


def _check_state(optimizer: Optimizer, names: Mapping[Tensor, str], cuts: Cuts, what: str) -> None:
    for layer in _layers(optimizer):
        kind = type(layer).__name__
        for param, state in layer.state.items():
            if names.get(param) not in cuts and not isinstance(layer, LBFGS):
                continue
            tensors = [v for v in tree_leaves(state) if isinstance(v, Tensor)]
            fits = all(v.shape == param.shape or v.numel() == 1 for v in tensors)
            if not fits or (isinstance(layer, LBFGS) and cuts):
                raise ValueError(
                    f"the state that {kind} keeps of {names.get(param)} does not belong to single "
                    f"weights, so it cannot be cut: {what} without optimizer= and build a new "
                    f"{kind} for the other model"
                )


def _check_structures(optimizer: Optimizer, names: Mapping[Tensor, str], cuts: Cuts) -> None:
    """Blocks must stay or go as a whole, and those of a unit together."""
    units: dict[str, tuple[str, list[int]]] = {}
    for member in dual.members(optimizer):
        name = names[member.param]
        own = cuts.get(name, ())
        kept = [_kept_blocks(member, name, dim, own) for dim in range(member.param.dim())]
        if (unit := member.group.get("unit")) is None:
            continue
        along = next((d for d, n in enumerate(member.grid) if n > 1), 0)
        blocks = kept[along].tolist() if kept else [0]
        first, others = units.setdefault(unit, (name, blocks))
        if blocks != others:
            raise ValueError(
                f"unit {unit!r} joins {first} and {name}, but compaction removes other blocks of "
                f"one than of the other: compact without optimizer= and build a new one, or train "
                f"with the units of param_groups(model, example_inputs=...)"
            )


def _kept_blocks(member: dual.Member, name: str, dim: int, cuts: Sequence[Cut]) -> Ids:
    """Return which blocks stay along one dimension; refuses to keep parts of one."""
    length = member.block[dim]
    cut = next((cut for cut in cuts if cut.dim == dim), None)
    if length is None:
        return np.zeros(1, np.int64)
    if cut is None:
        return np.arange(member.grid[dim])
    stays = np.zeros(cut.size, bool)
    stays[cut.index] = True
    lines = stays.reshape(cut.groups, -1)
    lines = lines[lines.any(axis=1)]
    height = member.param.shape[0] // cut.groups
    if cut.groups > 1 and _spans(member.block, height) and (lines != lines[0]).any():
        raise _torn(member, name, "takes other channels from every group of")
    blocks = lines[:, indices(length, lines.shape[1]).numpy()]
    if (blocks != blocks[..., :1]).any():
        raise _torn(member, name, "removes parts of the blocks of")
    return np.flatnonzero(blocks[0, :, 0])


def _spans(block: Block, height: int) -> bool:
    """Whether blocks hold rows of several groups of ``height`` rows."""
    return not isinstance(block[0], int) or height % block[0] != 0


def _torn(member: dual.Member, name: str, what: str) -> ValueError:
    return ValueError(
        f"compaction {what} {name}, which was trained with structure "
        f"{member.group['structure']!r}, so its dynamics cannot go on as they were: compact "
        f"without optimizer= and build a new one for the smaller model"
    )


def follow(
    optimizer: Optimizer,
    model: nn.Module,
    small: nn.Module,
    cuts: Cuts,
    ticket: Ticket | None,
    *,
    born: Mapping[str, Tensor] | None = None,
) -> Optimizer:
    """Return an optimizer like ``optimizer`` that trains ``small`` from where it stands.

    State shaped like its parameter is cut; numbers such as ``step`` and pending gradients come
    along. Hooks are registered again, except those of a Path, which stays with the original, and
    those of enforced tickets. These are enforced anew in the smaller shapes, and so is ``ticket``:
    what compaction keeps as zeros, and single dead entries, stay dead. A bias that compaction
    added joins the group of the other biases if that has no structure, else the group of its
    weight if that has none, else the first that has none.

    Args:
        optimizer: The optimizer of ``model``, found fit by :func:`check_follows`; not changed.
        model: The big model.
        small: The smaller model, its parameters named as in ``model``.
        cuts: What stays of every tensor of ``model``.
        ticket: What is dead in ``small``; None: nothing but what is enforced.
        born: Masks, in the new shapes, of entries that are new where ``small`` is a wider model:
            their state starts at 0, and nothing enforced holds them.

    Raises:
        ValueError: There is no group for an added bias.
    """
    names, born = _names(model), born or {}

    def moved(value: Tensor, name: str) -> Tensor:
        part = cut_tensor(value, cuts.get(name, ()))
        return part.masked_fill_(born[name].to(part.device), 0) if name in born else part

    small_names = tensor_names(small)
    targets = {small_names[name]: param for name, param in small.named_parameters()}
    memo: dict[int, Any] = {}
    for param, name in names.items():
        memo[id(param)] = targets[name]
        if param.grad is not None and not param.grad.is_sparse:
            targets[name].grad = moved(param.grad, name)
    for layer in _layers(optimizer):
        waiting = getattr(layer, "_waiting", {}).items()
        own = [(p, v) for p, state in layer.state.items() for v in tree_leaves(state)]
        for param, value in (*own, *waiting):
            fits = isinstance(value, Tensor) and param in names and value.shape == param.shape
            if fits and id(value) not in memo:
                memo[id(value)] = moved(value, names[param])
    new = _copied(optimizer, memo)
    _add_biases(new, targets, set(names.values()))
    for old, fresh in zip(_layers(optimizer), _layers(new), strict=True):
        _CAME_FROM[fresh] = ref(old)
        _carry_hooks(old, fresh)
    _enforce(optimizer, new, names, targets, cuts, ticket, born)
    return new


def _copied(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Copy an optimizer, with what torch leaves out of copies (own attributes of a class)."""
    new = copy.deepcopy(optimizer, memo)
    for old, fresh in zip(_layers(optimizer), _layers(new), strict=True):
        for key, value in vars(old).items():
            # A scheduler replaces "step"; its copy will do the same for the new optimizer.
            if key not in vars(fresh) and key != "step":
                vars(fresh)[key] = copy.deepcopy(value, memo)
    return new


def _add_biases(new: Optimizer, targets: Mapping[str, Tensor], before: set[str]) -> None:
    """Let the optimizer train the biases that compaction added."""
    place = {p: group for group in new.param_groups for p in group["params"]}
    names = {param: name for name, param in targets.items()}
    for name in [n for n in targets if n not in before]:
        weight = targets.get(name.removesuffix("bias") + "weight")
        own = None if weight is None else place.get(weight)
        if own is None or weight is None:
            continue  # its weight is not trained either
        plain = [g for g in new.param_groups if g.get("structure") is None]
        biased = [g for g in plain if any(names[p].endswith("bias") for p in g["params"])]
        if not plain:
            raise ValueError(
                f"compaction adds {name}, and every group of this optimizer has a structure, "
                f"which is not for biases: compact without optimizer= and build a new one"
            )
        group = (biased or [g for g in plain if g is own] or plain)[0]
        group["params"].append(targets[name])
        if "param_names" in own and "param_names" in group:
            told = own["param_names"][[p is weight for p in own["params"]].index(True)]
            group["param_names"].append(told.removesuffix("weight") + "bias")


def _stays(hook: object) -> bool:
    """Whether a hook belongs to an observer of these very shapes, such as a Path."""
    return getattr(getattr(hook, "__self__", None), "knows_shapes", False) is True


def _carry_hooks(old: Optimizer, new: Optimizer) -> None:
    for kind in (f"{what}_{when}" for what in _HOOKED for when in ("pre", "post")):
        for hook in getattr(old, f"_optimizer_{kind}_hooks").values():
            if not (isinstance(getattr(hook, "__self__", None), Enforcement) or _stays(hook)):
                getattr(new, f"register_{kind}_hook")(hook)


def _enforce(
    old: Optimizer,
    new: Optimizer,
    names: Mapping[Tensor, str],
    targets: Mapping[str, nn.Parameter],
    cuts: Cuts,
    ticket: Ticket | None,
    born: Mapping[str, Tensor],
) -> None:
    """Keep dead in the new model what is dead in the old one and was not cut off."""
    alive = {name: ticket.mask_of(name) for name in ticket} if ticket is not None else {}
    for layer in _layers(old):
        for enforced in enforcements(layer):
            for param, mask in enforced.masks.items():
                if (name := names.get(param)) is not None:
                    smaller = cut_tensor(mask, cuts.get(name, ()))
                    if name in born:
                        smaller |= born[name]
                    alive[name] = alive.get(name, torch.ones_like(smaller)) & smaller
    trained = {p for group in new.param_groups for p in group["params"]}
    masks = {
        targets[name]: mask
        for name, mask in alive.items()
        if targets[name] in trained and not bool(mask.all())
    }
    if masks:
        Enforcement(masks, new)


def adopt(scheduler: Scheduler, optimizer: Optimizer) -> Scheduler:
    """Return a copy of a scheduler that drives the optimizer which followed its own.

    Args:
        scheduler: Any object that keeps its optimizer as ``optimizer``, such as those of torch.
        optimizer: What :func:`follow` returned for the scheduler's optimizer.

    Raises:
        ValueError: The scheduler drives another optimizer, or cannot be copied.
    """
    old = getattr(scheduler, "optimizer", None)
    came = {fresh: _CAME_FROM.get(fresh, lambda: None)() for fresh in _layers(optimizer)}
    new = next((fresh for fresh, before in came.items() if before is old), None)
    if old is None or new is None:
        raise ValueError(
            f"this {type(scheduler).__name__} drives another optimizer than the one that was "
            f"given along: pass the scheduler of that one"
        )
    try:
        adopted = copy.deepcopy(scheduler, {id(old): new})
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"this {type(scheduler).__name__} cannot be copied ({error}): build a new one for the "
            f"new optimizer and load the old one's state_dict()"
        ) from None
    _count_steps(new)
    return adopted


def _count_steps(optimizer: Optimizer) -> None:
    """Let torch count steps, as it does for every optimizer with a scheduler.

    That happens where a scheduler is built; what else this does to the groups is undone.
    """
    before = [dict(group) for group in optimizer.param_groups]
    rates = [copy.deepcopy(group["lr"]) for group in before]
    LambdaLR(optimizer, lambda _: 1.0)
    for group, old, lr in zip(optimizer.param_groups, before, rates, strict=True):
        group.clear()
        group.update(old)
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(lr)
