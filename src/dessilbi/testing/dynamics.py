# SPDX-License-Identifier: Apache-2.0
"""Checks of the dynamics of V and Gamma, for optimizers that have them: laws and limits."""

import copy
from functools import partial
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.testing import assert_close

from dessilbi.blocks.structure import Block, indices, resolve
from dessilbi.optimizers.optimizer import DessiLBI
from dessilbi.testing.problem import (
    STEPS,
    Factory,
    Named,
    NotApplicable,
    assert_partial,
    assert_same_run,
    density_of,
    fill_gradients,
    gradient,
    joint_blocks,
    make,
    norm_and_scale,
    train,
    units_of,
    weights_of,
)
from dessilbi.testing.reference import (
    Plain,
    Reference,
    alpha_of,
    gammas_of,
    group_of,
    make_dual,
)
from dessilbi.testing.stepping import refuses

close = partial(assert_close, rtol=1e-9, atol=1e-11)


def gamma_by_param(named: Named, optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """Return what ``optimizer.gamma()`` says, by parameter."""
    told: dict[str, Tensor] = optimizer.gamma()  # type: ignore[attr-defined]
    return {p: told[name] for name, p in named if name in told}


def set_options(optimizer: Optimizer, **options: Any) -> None:
    """Set options of all groups that have a structure."""
    for group in optimizer.param_groups:
        if group.get("structure") is not None:
            group.update(options)


def check_steps_agree_with_the_reference_loop(factory: Factory) -> None:
    """W, V and Gamma follow the slow loops over blocks, step by step."""
    named, optimizer = make_dual(factory)
    reference = Reference(named, optimizer)
    for step in range(STEPS):
        fill_gradients(named, step)
        reference.step(named)
        optimizer.step()
        told, gammas = gamma_by_param(named, optimizer), reference.gammas
        assert set(told) == set(reference.vs)
        for p, v in reference.vs.items():
            close(optimizer.state[p]["v"], v)
            close(p.detach(), reference.ws[p])
            close(told[p], gammas[p])
    assert_partial(optimizer)


def check_float32_steps_agree_with_the_reference_loop(factory: Factory) -> None:
    """The same in the precision that people train in."""
    named, optimizer = make_dual(factory, torch.float32)
    reference = Reference(named, optimizer)
    for step in range(STEPS):
        fill_gradients(named, step)
        reference.step(named)
        optimizer.step()
    for p, v in reference.vs.items():
        assert_close(optimizer.state[p]["v"], v, rtol=1e-4, atol=1e-6)
        assert_close(p.detach(), reference.ws[p], rtol=1e-4, atol=1e-6)
    assert_partial(optimizer)


def check_w_plus_kappa_v_is_conserved(factory: Factory) -> None:
    """The coupling moves W against kappa V: their sum moves as the plain optimizer moves W."""
    named, optimizer = make_dual(factory)
    plain, groups = Plain(named, optimizer), group_of(optimizer)
    for step in range(STEPS):
        fill_gradients(named, step)
        before = {}
        for (_, p), own in zip(named, plain.params, strict=True):
            v = optimizer.state.get(p, {}).get("v", torch.zeros_like(p))
            before[p] = (p.detach().clone(), v.clone())
            own.detach().copy_(p)
        plain.step(named)
        optimizer.step()
        for (_, p), own in zip(named, plain.params, strict=True):
            if p in groups:
                w, v = before[p]
                total = p.detach() + groups[p]["kappa"] * optimizer.state[p]["v"]
                moved = total - w - groups[p]["kappa"] * v
                close(moved, own.detach() - w)
    assert_partial(optimizer)


def check_without_gradient_blocks_enter_at_the_closed_form_step(factory: Factory) -> None:
    """With g = 0: W_k = q^k W_0, V_k = (1 - q^k) W_0/kappa until entry, q = 1 - kappa alpha/nu."""
    named, optimizer = make_dual(factory)
    for group in optimizer.param_groups:
        group.update(weight_decay=0.0)
    groups = group_of(optimizer)
    start = {p: p.detach().clone() for p in groups}

    def share(p: Tensor, k: int) -> float:
        alpha, group = alpha_of(optimizer, groups[p]), groups[p]
        return float((1 - (1 - group["kappa"] * alpha / group["nu"]) ** k) / group["kappa"])

    blocks = [(b, u[0][1]) for u in units_of(optimizer) for b in joint_blocks(u)]
    sizes = [norm_and_scale([start[p][at] for p, at in b], group) for b, group in blocks]
    first = blocks[0][0][0][0]
    ratios = [norm / scale for norm, scale in sizes]
    lam = share(first, STEPS) * sqrt(max(ratios) * min(ratios)) * 0.999
    set_options(optimizer, lam=lam)
    for step in range(1, STEPS + 1):
        for _, p in named:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        told = gamma_by_param(named, optimizer)
        for (block, _), (norm, scale) in zip(blocks, sizes, strict=True):
            entered = any(bool(told[p][at].any()) for p, at in block)
            if entered:
                assert norm * share(first, step) > lam * scale * (1 - 1e-9)
            elif step == STEPS or norm * share(first, step) > lam * scale * (1 + 1e-9):
                assert norm * share(first, step) <= lam * scale * (1 + 1e-9)
    assert_partial(optimizer)


def check_gamma_and_support_agree(factory: Factory) -> None:
    """The support is where Gamma is not zero, and its density counts the elements there."""
    named, optimizer = make_dual(factory, torch.float32)
    train(named, optimizer)
    gammas = gammas_of(optimizer, {p: optimizer.state[p]["v"] for p in group_of(optimizer)})
    told = gamma_by_param(named, optimizer)
    ticket = optimizer.support()  # type: ignore[attr-defined]
    names: dict[Tensor, str] = {p: name for name, p in named}
    kept = 0
    for p, gamma in gammas.items():
        assert_close(told[p], gamma)
        assert torch.equal(ticket.mask_of(names[p]), gamma != 0)
        kept += int((gamma != 0).sum())
    assert kept / sum(p.numel() for p in gammas) == density_of(optimizer)
    assert_partial(optimizer)


def check_single_element_blocks_are_soft_thresholded(factory: Factory) -> None:
    """With blocks (1, 1), Gamma = kappa sign(V) max(0, |V| - lam)."""
    named, optimizer = make_dual(factory)
    set_options(optimizer, structure=(1, 1), unit=None, block_scale="unit")
    train(named, optimizer)
    told = gamma_by_param(named, optimizer)
    for p, group in group_of(optimizer).items():
        v = optimizer.state[p]["v"]
        close(told[p], group["kappa"] * v.sign() * (v.abs() - group["lam"]).clamp(min=0))
    assert_partial(optimizer)


def check_an_alias_is_its_tuple(factory: Factory) -> None:
    """A structure by name or as block lengths: the same run."""
    a, b = make_dual(factory, torch.float32), make_dual(factory, torch.float32)
    blocks = {
        "element": (1, 1),
        "filter": (1, None),
        "neuron": (1, None),
        "channel": (None, 1),
        "layer": (None, None),
    }
    structures = {group["structure"] for group in a[1].param_groups} - {None}
    if not structures <= set(blocks):
        raise NotApplicable(f"structures {structures} are no aliases")
    for group in b[1].param_groups:
        group["structure"] = blocks.get(group["structure"])
    train(*a)
    train(*b)
    assert_same_run(a, b)


def check_an_infinite_lam_keeps_gamma_at_zero(factory: Factory) -> None:
    """V integrates, and nothing is selected."""
    named, optimizer = make_dual(factory, torch.float32)
    set_options(optimizer, lam=inf)
    train(named, optimizer)
    for p, gamma in gamma_by_param(named, optimizer).items():
        assert optimizer.state[p]["v"].any()
        assert not gamma.any()
    assert density_of(optimizer) == 0


def check_without_structure_it_is_the_plain_optimizer(factory: Factory) -> None:
    """``structure=None`` gives the weights of the plain optimizer, to the bit, and no V."""
    named, optimizer = make_dual(factory, torch.float32)
    set_options(optimizer, structure=None, unit=None)
    plain = Plain(named, optimizer)
    before = weights_of(named)
    for step in range(STEPS):
        fill_gradients(named, step)
        plain.step(named)
        optimizer.step()
    for (_, p), own, old in zip(named, plain.params, before, strict=True):
        assert torch.equal(p, own)
        assert not torch.equal(p, old)
        assert "v" not in optimizer.state.get(p, {})


def _reversed_blocks(param: Tensor, block: Block, dim: int) -> Tensor:
    """Return the order of indices along ``dim`` in which its blocks are reversed."""
    size = param.shape[dim]
    taken, order = indices(block[dim], size), torch.empty(size, dtype=torch.int64)
    order[taken] = taken.flip(0)
    return order


def check_permuting_blocks_permutes_results(factory: Factory) -> None:
    """Blocks have no order."""
    a, b = make_dual(factory), make_dual(factory)
    orders = {}
    for name, q in b[0]:
        structure = group_of(b[1])[q]["structure"]
        block = resolve(structure, q.shape)
        rows, columns = (_reversed_blocks(q, block, dim) for dim in (0, 1))
        orders[name] = (rows.unsqueeze(1), columns.unsqueeze(0))
        q.detach().copy_(q.detach()[orders[name]].clone())
    for step in range(STEPS):
        train(*a, steps=1, first=step)
        for name, q in b[0]:
            # Both orders are their own inverses.
            q.grad = gradient(name, q.detach()[orders[name]], step)[orders[name]]
        b[1].step()
    told = gamma_by_param(*a), gamma_by_param(*b)
    for (name, p), (_, q) in zip(a[0], b[0], strict=True):
        # Sums in another order, in bfloat16 inside of Muon, may round to other numbers.
        assert_close(p.detach()[orders[name]], q.detach(), rtol=1e-3, atol=1e-3)
        assert torch.equal(told[0][p][orders[name]] != 0, told[1][q] != 0)
    assert_partial(a[1])


def check_v_is_float32_or_wider_and_stays_so(factory: Factory) -> None:
    """V integrates steps too small for half precision, before and after loading."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        a, b = make_dual(factory, dtype), make_dual(factory, dtype)
        train(*a, steps=5)
        b[1].load_state_dict(copy.deepcopy(a[1].state_dict()))
        for (_, p), (_, q) in zip(a[0], b[0], strict=True):
            if p in group_of(a[1]):
                v, loaded = a[1].state[p]["v"], b[1].state[q]["v"]
                assert v.dtype == loaded.dtype == torch.promote_types(dtype, torch.float32)
                assert torch.equal(v, loaded)


def check_refused_options_leave_the_optimizer_as_it_was(factory: Factory) -> None:
    """One ValueError names option and value; nothing was added."""
    _, optimizer = make_dual(factory)
    count = len(optimizer.param_groups)
    late = torch.nn.Parameter(torch.ones(6, 5))
    for option, value in (
        ("nu", 0.0),
        ("nu", inf),
        ("kappa", -1.0),
        ("lam", 0.0),
        ("lam", float("nan")),
        ("structure", (4, None)),
        ("structure", "nothing"),
        ("block_scale", "cubic"),
        ("unit", ""),
    ):
        group = {"params": [("late", late)], "structure": "filter", option: value}
        message = refuses(optimizer.add_param_group, group)
        assert option in message
        assert str(value) in message
        assert len(optimizer.param_groups) == count


def check_groups_of_older_checkpoints_get_their_options(factory: Factory) -> None:
    """Options that a checkpoint does not know keep the values of the optimizer."""
    a, b = make_dual(factory, torch.float32), make_dual(factory, torch.float32)
    train(*a, steps=5)
    old = a[1].state_dict()
    for group in old["param_groups"]:
        for option in ("block_scale", "unit", "structure"):
            del group[option]
    b[1].load_state_dict(old)
    with torch.no_grad():
        for (_, p), (_, q) in zip(a[0], b[0], strict=True):
            q.copy_(p)
    train(*a, steps=STEPS, first=5)
    train(*b, steps=STEPS, first=5)
    assert_same_run(a, b)


def check_state_is_v_and_one_momentum(factory: Factory) -> None:
    """DessiLBI holds 8 bytes per structured float32 weight with momentum, 4 without."""
    for momentum, size in ((0.9, 8), (0.0, 4)):
        named, optimizer = make(factory)
        if not isinstance(optimizer, DessiLBI):
            raise NotApplicable("the optimizer is not DessiLBI")
        for group in optimizer.param_groups:
            group.update(momentum=momentum, nesterov=False)
        train(named, optimizer, 2)
        for p in group_of(optimizer):
            assert sum(x.nbytes for x in optimizer.state[p].values()) == size * p.numel()


DYNAMICS = [
    check_steps_agree_with_the_reference_loop,
    check_float32_steps_agree_with_the_reference_loop,
    check_w_plus_kappa_v_is_conserved,
    check_without_gradient_blocks_enter_at_the_closed_form_step,
    check_gamma_and_support_agree,
    check_single_element_blocks_are_soft_thresholded,
    check_an_alias_is_its_tuple,
    check_an_infinite_lam_keeps_gamma_at_zero,
    check_without_structure_it_is_the_plain_optimizer,
    check_permuting_blocks_permutes_results,
    check_v_is_float32_or_wider_and_stays_so,
    check_refused_options_leave_the_optimizer_as_it_was,
    check_groups_of_older_checkpoints_get_their_options,
    check_state_is_v_and_one_momentum,
]
