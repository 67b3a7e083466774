# SPDX-License-Identifier: Apache-2.0
"""The step, one tensor at a time, as the mathematics states it (docs/mathematics.md)."""

from torch import Tensor

from dessilbi.blocks.structure import Block, expand


def gamma_of(v: Tensor, scale: Tensor | None, block: Block, *, kappa: float, lam: float) -> Tensor:
    """Return Gamma = kappa prox(V), a function of V alone.

    Args:
        v: The dual variable.
        scale: max(0, 1 - lam_g / ||V_g||) per block, of the grid's shape; None for independent
            blocks of one element, which are soft-thresholded at ``lam`` directly.
        block: The block shape.
        kappa: The factor kappa.
        lam: The threshold, used when ``scale`` is None.

    Returns:
        A new tensor shaped like ``v``.
    """
    if scale is None:
        # Soft-thresholding, written so that an infinite threshold is no special case.
        gamma = v - v.clamp(-lam, lam)
        return gamma if kappa == 1 else gamma.mul_(kappa)
    return v * expand(scale * kappa, block, v.shape)


def add_scaled_(x: Tensor, y: Tensor, factor: float | Tensor) -> None:
    """Compute x += factor y; a tensor factor stays on its device."""
    if isinstance(factor, Tensor):
        x.add_(y * factor)
    else:
        x.add_(y, alpha=factor)


def couple_(p: Tensor, v: Tensor, r: Tensor, lr: float | Tensor, *, kappa: float) -> None:
    """Add the coupling's part of the update: V += lr r, W -= kappa lr r, in place.

    Args:
        p: W, moved by its own optimizer already.
        v: V.
        r: (W - Gamma)/nu of the pair before the step, in the dtype of V.
        lr: alpha, the step of path time.
        kappa: The factor kappa.
    """
    add_scaled_(v, r, lr)
    w = p.to(v.dtype)  # p itself when the dtypes agree
    add_scaled_(w, r, -(kappa * lr))
    if w is not p:
        p.copy_(w)


def reference_step_(
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
    """Advance W, V and momentum by one step, in place; gradients are left as they are.

    Args:
        params: W of each tensor.
        grads: Gradient of each tensor, same shape.
        momentum_buffers: The buffer of each tensor, None before its first step; filled in place.
        vs: V of each tensor in float32 or wider; None for a tensor without structure.
        scales: The OLD shrink factors per block (see :func:`gamma_of`).
        blocks: The block shapes; None for a tensor without structure.
        lr: alpha, the step of the dual variable; W moves by kappa * alpha.
        kappa: The factor kappa.
        nu: Strength of the coupling is 1/nu.
        lam: Threshold of tensors whose scale is None.
        momentum: tau.
        dampening: As in torch.optim.SGD.
        weight_decay: L2 penalty, joins the gradient before the momentum.
        nesterov: Use g' + tau m instead of m.
        maximize: Ascend the loss instead.
    """
    for i, p in enumerate(params):
        d = -grads[i] if maximize else grads[i]
        if weight_decay != 0:
            d = d.add(p, alpha=weight_decay)
        if momentum != 0:
            buffer = momentum_buffers[i]
            if buffer is None:
                buffer = momentum_buffers[i] = d.clone()
            else:
                buffer.mul_(momentum).add_(d, alpha=1 - dampening)
            d = d.add(buffer, alpha=momentum) if nesterov else buffer

        v, block = vs[i], blocks[i]
        if v is None or block is None:
            add_scaled_(p, d, -(kappa * lr))
            continue
        # float32 at least, also for bf16 weights; this is p itself when the dtypes agree.
        w = p.to(v.dtype)
        gamma = gamma_of(v, scales[i], block, kappa=kappa, lam=lam)
        # Old W and old Gamma on purpose: both updates use the values before the step.
        r = (w - gamma).div_(nu)
        add_scaled_(v, r, lr)
        add_scaled_(w, d.to(w.dtype), -(kappa * lr))
        add_scaled_(w, r, -(kappa * lr))
        if w is not p:
            p.copy_(w)
