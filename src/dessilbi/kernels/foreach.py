# SPDX-License-Identifier: Apache-2.0
"""The step over lists of tensors with torch's foreach operators: fewer launches on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dessilbi.blocks.structure import Block, expand


def _add_scaled_(xs: list[Tensor], ys: list[Tensor], factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        torch._foreach_add_(xs, torch._foreach_mul(ys, factor))
    else:
        torch._foreach_add_(xs, ys, alpha=factor)


def _by_device_and_dtype(params: list[Tensor], vs: list[Tensor | None]) -> list[list[int]]:
    """Indices of tensors that foreach operators can take together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (p, v) in enumerate(zip(params, vs, strict=True)):
        key = (p.device, p.dtype, None if v is None else v.dtype)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _directions(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    *,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return d (docs/mathematics.md) and the buffers; ``grads`` are not written to."""
    ds = list(torch._foreach_neg(grads)) if maximize else grads
    if weight_decay != 0:
        ds = list(torch._foreach_add(ds, params, alpha=weight_decay))
    if momentum == 0:
        return ds, buffers
    old = [i for i, buffer in enumerate(buffers) if buffer is not None]
    if old:
        known = [buffer for buffer in buffers if buffer is not None]
        torch._foreach_mul_(known, momentum)
        torch._foreach_add_(known, [ds[i] for i in old], alpha=1 - dampening)
    filled = [d.clone() if b is None else b for b, d in zip(buffers, ds, strict=True)]
    if nesterov:
        return list(torch._foreach_add(ds, filled, alpha=momentum)), list(filled)
    return filled, list(filled)


def _gammas(
    vs: list[Tensor],
    scales: Sequence[Tensor | None],
    blocks: Sequence[Block],
    *,
    kappa: float,
    lam: float,
) -> list[Tensor]:
    """Gamma of each tensor; see ``reference.gamma_of``."""
    result: list[Tensor] = [torch.empty(0)] * len(vs)
    soft = [i for i, scale in enumerate(scales) if scale is None]
    if soft:
        # v - clamp(v, -lam, lam) is soft-thresholding in operators that foreach has.
        chosen = [vs[i] for i in soft]
        clamped = torch._foreach_clamp_min(chosen, -lam)
        torch._foreach_clamp_max_(clamped, lam)
        gammas = torch._foreach_sub(chosen, clamped)
        if kappa != 1:
            torch._foreach_mul_(gammas, kappa)
        for i, gamma in zip(soft, gammas, strict=True):
            result[i] = gamma
    for i, scale in enumerate(scales):
        if scale is not None:
            result[i] = vs[i] * expand(scale * kappa, blocks[i], vs[i].shape)
    return result


def foreach_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    vs: list[Tensor | None],
    scales: list[Tensor | None],
    blocks: list[Block | None],
    *,
    lr: float | Tensor,
    kappa: float,
    nu: float,
    lam: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """As ``reference.reference_step_``, over all tensors of a kind at once."""
    for indices in _by_device_and_dtype(params, vs):
        ps = [params[i] for i in indices]
        ds, buffers = _directions(
            ps,
            [grads[i] for i in indices],
            [momentum_buffers[i] for i in indices],
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
        for i, buffer in zip(indices, buffers, strict=True):
            momentum_buffers[i] = buffer

        duals = [v for i in indices if (v := vs[i]) is not None]
        cuts = [block for i in indices if (block := blocks[i]) is not None]
        if not duals:
            _add_scaled_(ps, ds, -(kappa * lr))
            continue
        gammas = _gammas(duals, [scales[i] for i in indices], cuts, kappa=kappa, lam=lam)
        ws = [p.to(v.dtype) for p, v in zip(ps, duals, strict=True)]
        # Old W and old Gamma on purpose: both updates use the values before the step.
        rs = list(torch._foreach_sub(ws, gammas))
        torch._foreach_div_(rs, nu)
        _add_scaled_(duals, rs, lr)
        _add_scaled_(ws, [d.to(w.dtype) for d, w in zip(ds, ws, strict=True)], -(kappa * lr))
        _add_scaled_(ws, rs, -(kappa * lr))
        if ws[0] is not ps[0]:
            torch._foreach_copy_(ps, ws)
