# SPDX-License-Identifier: Apache-2.0
"""Carrying: the fused part of an optimizer's step, and the norms it leaves for the next one.

A :class:`Fusion` belongs to one optimizer and lies outside of its ``state``. It holds nothing that
could not be computed again: it is made anew when groups, tensors or gradients are not those it was
made for, and norms are computed again from a V that somebody else has written to.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dessilbi.kernels.pieces import Options, Piece
from dessilbi.optimizers import dual
from dessilbi.optimizers.fusing import Choice, Group, choose, lies_as
from dessilbi.optimizers.options import check_gradient


class Owner(Protocol):
    """What a fusion needs of its optimizer."""

    @property
    def param_groups(self) -> list[Group]:
        """The groups."""

    @property
    def state(self) -> Any:
        """The state."""

    def _v_of(self, param: Tensor) -> Tensor:
        """V of a parameter, created on its first step."""

    def _buffer_of(self, param: Tensor, group: Group) -> tuple[Tensor | None, bool]:
        """Momentum of a parameter, created on its first step; whether it holds nothing yet."""


class Fusion:
    """The fused step of one optimizer.

    Args:
        asks: Whether a group asks for a fused kernel; None: if it is there.
        kept: The options of a group that cannot change without a new plan.
        state_keys: The state tensors that the kernel moves.
    """

    def __init__(
        self,
        asks: Callable[[Group], bool | None],
        kept: Callable[[Group], tuple[Any, ...]],
        state_keys: tuple[str, ...],
    ):
        self._asks, self._kept, self._state_keys = asks, kept, state_keys
        self._told: list[Any] = []
        self._lams: list[Any] = []
        self._choice = Choice([], {}, {})
        self._params: list[Tensor] = []
        self._groups: list[Group] = []
        self._idle: list[Tensor] = []
        self._carried: list[Carried] = []
        self._seen: list[Any] = []

    def choice(self, optimizer: Any) -> Choice:
        """Return what is fused, chosen anew if the groups have changed.

        Raises:
            ValueError: Members of a unit do not agree.
        """
        groups = optimizer.param_groups
        # Loading makes new groups of the same tensors; members must not read the old ones.
        told: list[Any] = [
            (id(group), *map(id, group["params"]), self._kept(group)) for group in groups
        ]
        # Hooks are part of it: they may enforce a ticket, which thresholds depend on.
        told.append(tuple(optimizer._optimizer_step_post_hooks))
        lams = [(group.get("lam"), group.get(dual.OWN_LAM)) for group in groups]
        if told != self._told:
            self._choice = choose(optimizer, self._asks, self._state_keys)
            self._carried = []
            # Held, so that none of their ids can come to mean another tensor or group.
            self._groups = list(groups)
            self._params = [p for group in groups for p in group["params"]]
        elif lams != self._lams:
            dual.units_of([member for unit in self._choice.units for member in unit])
        self._told, self._lams = told, lams
        return self._choice

    def settled(self, optimizer: Any) -> Choice:
        """Return :meth:`choice`, made anew also where tensors have come to lie otherwise.

        What it says stands until the step is over, so that another optimizer may step in between.
        """
        if _seen(optimizer, self.choice(optimizer)) != self._seen:
            self._told = []
            self._seen = _seen(optimizer, self.choice(optimizer))
        return self._choice

    def ready(
        self,
        optimizer: Any,
        options: Sequence[Options],
        olds: Mapping[Tensor, Tensor] | None = None,
    ) -> set[Tensor]:
        """Prepare a step of all fused tensors that have a gradient; nothing moves yet.

        Args:
            optimizer: The optimizer, always the same one.
            options: The numbers of its groups.
            olds: W before another optimizer moved it: only the coupling is to be added, where
                there is one, as :meth:`settled` chose.

        Returns:
            The parameters that :meth:`run` will move.

        Raises:
            ValueError: Members of a unit do not agree.
        """
        choice = self.choice(optimizer)
        if not choice.levels:
            return set()
        if not self._still_fits(optimizer, olds):
            for param in self._params:
                check_gradient(param)
            if olds is None:
                self._told = []  # state may lie differently now
            self._make(optimizer, self.choice(optimizer), olds)
            fits = [carried.still_fits(optimizer, olds) for carried in self._carried]
            assert all(fits), "a plan just made describes what it was made from"
        for carried in self._carried:
            carried.set(options)
        return {p for carried in self._carried for p in carried.moving}

    def _still_fits(self, optimizer: Any, olds: Mapping[Tensor, Tensor] | None) -> bool:
        if not self._carried or any(_moves(p, olds) for p in self._idle):
            return False
        return all(carried.still_fits(optimizer, olds) for carried in self._carried)

    def _make(self, optimizer: Any, choice: Choice, olds: Mapping[Tensor, Tensor] | None) -> None:
        places: dict[torch.device, list[Piece]] = {}
        for number, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                piece = _piece(optimizer, p, group, number, choice, olds)
                if piece is not None:
                    places.setdefault(p.device, []).append(piece)
        self._carried = [Carried(optimizer, choice, pieces) for pieces in places.values()]
        self._idle = [p for p in choice.levels if not _moves(p, olds)]

    def run(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> bool:
        """Take the step that :meth:`ready` prepared.

        Args:
            found_inf: Where it is not 0 nothing moves (GradScaler, on the tensors' device).
            grad_scale: What gradients are multiples of.

        Returns:
            Whether all momentum buffers hold something now.
        """
        filled = [carried.run(found_inf, grad_scale) for carried in self._carried]
        return all(filled)


def _piece(
    optimizer: Owner,
    p: Tensor,
    group: Group,
    number: int,
    choice: Choice,
    olds: Mapping[Tensor, Tensor] | None,
) -> Piece | None:
    if p not in choice.levels:
        return None
    levels = choice.levels[p]
    if not _moves(p, olds):
        # A member of a unit may lend its norms to the others.
        v = dual.v_of(optimizer, p)  # type: ignore[arg-type]
        lends = v is not None and group["unit"] is not None
        return Piece(p, v, None, levels, number, moves=False) if lends else None
    v = None if group["structure"] is None else optimizer._v_of(p)
    buffer, fresh = optimizer._buffer_of(p, group)
    return Piece(p, v, buffer, levels, number, fresh, old=None if olds is None else olds[p])


def _moves(p: Tensor, olds: Mapping[Tensor, Tensor] | None) -> bool:
    return p.grad is not None and (olds is None or p in olds)


def _seen(optimizer: Any, choice: Choice) -> list[Any]:
    """What a choice depends on beside the groups: how W and V lie in memory."""
    vs = [dual.v_of(optimizer, p) for p in choice.levels]
    seen = [None if v is None else (id(v), v.dtype, v.stride()) for v in vs]
    return [(p.dtype, p.stride(), own) for p, own in zip(choice.levels, seen, strict=True)]


class _Row(NamedTuple):
    """What a step must find as it was when the plan was made."""

    param: Tensor
    place: int
    dtype: torch.dtype
    strides: tuple[int, ...]
    numel: int
    moves: bool
    state: Any
    v: Tensor | None
    v_place: int
    buffer: Tensor | None
    buffer_place: int


class Carried:
    """A plan over tensors of one device, and what has to be as it was for the plan to hold."""

    def __init__(self, optimizer: Any, choice: Choice, pieces: list[Piece]):
        self._pieces = pieces
        self.moving = [piece.param for piece in pieces if piece.moves]
        index = {piece.param: i for i, piece in enumerate(pieces)}
        self._units: list[list[dual.Member]] = []
        members: list[list[int]] = []
        for unit in choice.units:
            own = [index[m.param] for m in unit if m.param in index]
            if own and pieces[own[0]].levels is not None:
                self._units.append(unit)
                members.append(own)
        kernel = choice.kernels[pieces[0].param]
        self._plan = kernel.plan(pieces, members, len(optimizer.param_groups))
        self._rows = [self._row(optimizer, piece) for piece in pieces]
        self._squared = [(i, x.v) for i, x in enumerate(pieces) if x.levels and x.v is not None]
        found = {member.param: member for member in dual.members(optimizer)}
        self._soft = [
            (i, found[piece.param])
            for i, piece in enumerate(pieces)
            if piece.v is not None and piece.levels is None
        ]
        self._versions = [-1] * len(pieces)
        self._options: list[Options] = []
        self._thresholds: list[Any] = [None] * len(self._units)
        self._grads: list[Tensor | None] = []
        self._filled = not any(piece.fresh for piece in pieces)
        self._olds = [(piece.param, piece.old) for piece in pieces if piece.old is not None]
        moved = [piece for piece in pieces if piece.moves]
        written = [x for piece in moved for x in (piece.param, piece.v, piece.buffer)]
        self._written = [x for x in written if x is not None]

    @staticmethod
    def _row(optimizer: Any, piece: Piece) -> _Row:
        p, v, buffer = piece.param, piece.v, piece.buffer
        return _Row(
            *(p, p.data_ptr(), p.dtype, p.stride(), p.numel()),
            *(piece.moves, optimizer.state.get(p)),
            *(v, 0 if v is None else v.data_ptr()),
            *(buffer, 0 if buffer is None else buffer.data_ptr()),
        )

    def still_fits(self, optimizer: Any, olds: Mapping[Tensor, Tensor] | None) -> bool:
        """Return whether tensors and state are as the plan has them; note down the gradients."""
        if olds is not None and any(olds.get(p) is not old for p, old in self._olds):
            return False
        known, self._grads = optimizer.state, []
        for row in self._rows:
            p, place, dtype, strides, numel, moves, state, v, v_place, buffer, buffer_place = row
            grad = p.grad
            if _moves(p, olds) is not moves or known.get(p) is not state:
                return False
            if p.data_ptr() != place or p.dtype is not dtype:
                return False
            if p.stride() != strides or p.numel() != numel:
                return False
            if v is not None:
                found = state.get(dual.STATE_KEY) if moves else dual.v_of(optimizer, p)
                if found is not v or v.data_ptr() != v_place:
                    return False
            if buffer is not None and (
                state.get("momentum_buffer") is not buffer or buffer.data_ptr() != buffer_place
            ):
                return False
            if olds is None and grad is not None and not lies_as(grad, p, p.dtype):
                check_gradient(p)
                if grad.dtype != p.dtype:
                    return False
                grad = torch.empty_like(p).copy_(grad)
            self._grads.append(grad)
        return True

    def set(self, options: Sequence[Options]) -> None:
        """Hand this step's numbers and gradients to the plan; bring its norms up to date."""
        plan = self._plan
        if not self._olds:
            plan.set_gradients(self._grads)
        followed = any(isinstance(own.lr, Tensor) for own in options)  # may change in place
        if followed or options != self._options:
            self._options = list(options)
            for number, own in enumerate(options):
                plan.set_options(number, own)
        thresholds: list[float | Tensor] = [dual.threshold(unit) for unit in self._units]
        for number, lam in enumerate(thresholds):
            if isinstance(lam, Tensor) or thresholds[number] != self._thresholds[number]:
                plan.set_threshold(number, lam)
        self._thresholds = thresholds
        for i, member in self._soft:
            plan.set_soft_threshold(i, member.lam)
        for i, v in self._squared:
            if v._version != self._versions[i]:
                plan.rebuild(i)
                self._versions[i] = v._version

    def run(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> bool:
        """Take the step, tell autograd what was written to; return whether momentum is filled."""
        self._plan.step(found_inf, grad_scale)
        self._grads = []
        increment_version(self._written)
        for i, v in self._squared:
            self._versions[i] = v._version
        if not self._filled and (found_inf is None or not found_inf.item()):
            self._plan.mark_filled()
            self._filled = True
        return self._filled
