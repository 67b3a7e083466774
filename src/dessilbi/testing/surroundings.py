# SPDX-License-Identifier: Apache-2.0
"""Checks beside the tools of torch: hooks, schedulers, GradScaler, profiler, AveragedModel."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from dessilbi.testing.problem import (
    STEPS,
    Factory,
    Named,
    NotApplicable,
    assert_partial,
    assert_same_run,
    assert_same_weights,
    fill_gradients,
    loss_of,
    make,
    train,
    weights_of,
)

Schedule = Callable[[Optimizer], Any]


class Holder(nn.Module):
    """A module that has given parameters under given dotted names."""

    def __init__(self, named: Named):
        super().__init__()
        for name, param in named:
            module: nn.Module = self
            *folders, last = name.split(".")
            for folder in folders:
                if not hasattr(module, folder):
                    module.add_module(folder, nn.Module())
                module = module.get_submodule(folder)
            module.register_parameter(last, param)


@contextmanager
def ignoring(message: str) -> Iterator[None]:
    """Ignore one warning that torch itself causes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield


def check_step_hooks_are_called_once_around_each_step(factory: Factory) -> None:
    """Pre-hooks see the weights before, post-hooks after; with the optimizer itself."""
    named, optimizer = make(factory)
    seen: list[tuple[str, Any, Tensor]] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("pre", o, weights_of(named)[0])))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("post", o, weights_of(named)[0])))
    before = weights_of(named)[0]
    train(named, optimizer, 1)
    assert [(when, o is optimizer) for when, o, _ in seen] == [("pre", True), ("post", True)]
    assert torch.equal(seen[0][2], before)
    assert torch.equal(seen[1][2], named[0][1])


def check_state_dict_hooks_are_called(factory: Factory) -> None:
    """Hooks around ``state_dict`` are called once, and the post-hook may replace what it gets."""
    named, optimizer = make(factory)
    train(named, optimizer, 2)
    seen = []

    def add_note(of: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        seen.append(of)
        return {**saved, "note": 1}

    optimizer.register_state_dict_pre_hook(seen.append)
    optimizer.register_state_dict_post_hook(add_note)
    saved = optimizer.state_dict()
    assert len(seen) == 2
    assert all(o is optimizer for o in seen)
    assert saved["note"] == 1
    assert set(saved) == {"state", "param_groups", "note"}


def check_load_state_dict_hooks_are_called(factory: Factory) -> None:
    """The pre-hook may replace what is loaded; the post-hook sees the state as it will be."""
    a, b = make(factory), make(factory)
    train(*a, steps=5)
    kept = {k: v for k, v in a[1].state.get(a[0][0][1], {}).items() if v.dim()}
    if not kept:
        raise NotApplicable("the optimizer keeps no state")
    key, value = next(iter(kept.items()))
    index = next(iter(a[1].state_dict()["state"]))

    def halve(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        state = {i: dict(s) for i, s in given["state"].items()}
        state[index][key] = state[index][key] * 0.5
        return {**given, "state": state}

    seen = []
    b[1].register_load_state_dict_pre_hook(halve)
    b[1].register_load_state_dict_post_hook(lambda o: seen.append(o.state[b[0][0][1]][key]))
    b[1].load_state_dict(a[1].state_dict())
    assert len(seen) == 1
    assert value.any()
    assert torch.equal(seen[0], value * 0.5)
    assert b[1].state[b[0][0][1]][key] is seen[0]


def _follows(factory: Factory, schedule: Schedule, *, metric: bool = False) -> None:
    """Train under a scheduler, and by hand with the options it gave SGD; they must agree."""
    a, b = make(factory), make(factory)
    followed = ("lr", "momentum", "betas")
    start, scheduler = _base_lr(a[1]), schedule(a[1])
    rates = set()
    for step in range(STEPS):
        rates.add(_base_lr(a[1]))
        for mine, theirs in zip(a[1].param_groups, b[1].param_groups, strict=True):
            theirs.update({option: mine[option] for option in followed if option in mine})
        train(*a, steps=1, first=step)
        train(*b, steps=1, first=step)
        if metric:
            scheduler.step(1.0)
        else:
            scheduler.step()
    assert len(rates) > 1, f"vacuous: the lr stayed at {start}"
    assert_same_run(a, b)
    constant = make(factory)
    train(*constant)
    assert not torch.equal(constant[0][0][1], a[0][0][1]), "the lr of the groups is not used"


def _base_lr(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def check_lambda_lr_is_followed(factory: Factory) -> None:
    """LambdaLR."""
    _follows(factory, lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + 0.1 * step)))


def check_one_cycle_lr_is_followed(factory: Factory) -> None:
    """OneCycleLR, which cycles momentum too."""

    def schedule(optimizer: Optimizer) -> lr_scheduler.OneCycleLR:
        cycles = "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))
        peak = 2 * _base_lr(optimizer)
        return lr_scheduler.OneCycleLR(
            optimizer, peak, total_steps=STEPS + 1, cycle_momentum=cycles
        )

    _follows(factory, schedule)


def check_cosine_warm_restarts_are_followed(factory: Factory) -> None:
    """CosineAnnealingWarmRestarts."""
    _follows(factory, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5))


def check_reduce_lr_on_plateau_is_followed(factory: Factory) -> None:
    """ReduceLROnPlateau."""
    _follows(factory, lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=8), metric=True)


def check_sequential_lr_is_followed(factory: Factory) -> None:
    """SequentialLR: warm-up, then decay."""

    def schedule(optimizer: Optimizer) -> lr_scheduler.SequentialLR:
        warm = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=5)
        decay = lr_scheduler.ExponentialLR(optimizer, 0.95)
        return lr_scheduler.SequentialLR(optimizer, [warm, decay], milestones=[5])

    with ignoring("The epoch parameter in"):
        _follows(factory, schedule)


def _scaled_step(named: Named, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(named)).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()


def check_grad_scaler_steps_are_the_unscaled_steps(factory: Factory) -> None:
    """Scaling the loss by a power of two and back changes nothing."""
    a, b = make(factory), make(factory)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(STEPS):
        _scaled_step(*a, scaler=scaler)
        b[1].zero_grad()
        loss_of(b[0]).backward()  # type: ignore[no-untyped-call]
        b[1].step()
    assert_same_run(a, b)


def check_grad_scaler_overflow_moves_nothing(factory: Factory) -> None:
    """A step with an infinite gradient leaves weights and state alone, and the run goes on."""
    named, optimizer = make(factory)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(STEPS):
        _scaled_step(named, optimizer, scaler)
    assert_partial(optimizer)
    weights = weights_of(named)
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    scaler.scale(loss_of(named)).backward()  # type: ignore[no-untyped-call]
    grad = named[0][1].grad
    assert grad is not None
    grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    for (_, p), old in zip(named, weights, strict=True):
        assert torch.equal(p, old)
        for key, value in state.get(p, {}).items():
            assert torch.equal(optimizer.state[p][key], value), f"{key} moved"
    _scaled_step(named, optimizer, scaler)
    assert not torch.equal(named[0][1], weights[0])


def check_grad_scaler_overflow_at_the_first_step_moves_nothing(factory: Factory) -> None:
    """The first step of mixed precision usually overflows; the run is as if it had not been."""
    a, b = make(factory), make(factory)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss_of(a[0])).backward()  # type: ignore[no-untyped-call]
    for _, p in a[0]:
        assert p.grad is not None
        p.grad.fill_(torch.inf)
    scaler.step(a[1])
    scaler.update()
    train(*a)
    train(*b)
    assert_same_weights(a[0], b[0])
    assert_partial(a[1])


def check_the_profiler_shows_steps(factory: Factory) -> None:
    """Steps carry torch's label with the optimizer's name."""
    named, optimizer = make(factory)
    fill_gradients(named, 0)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    label = f"Optimizer.step#{type(optimizer).__name__}.step"
    assert label in {event.name for event in profile.function_events}


def check_averaged_weights_are_those_of_the_run(factory: Factory) -> None:
    """AveragedModel averages what the optimizer makes."""
    named, optimizer = make(factory)
    model = Holder(named)
    averaged = AveragedModel(model)
    seen = []
    for step in range(STEPS):
        train(named, optimizer, 1, first=step)
        averaged.update_parameters(model)
        seen.append(weights_of(named)[0])
    mean = dict(averaged.module.named_parameters())[named[0][0]]
    assert_close(mean.detach(), torch.stack(seen).mean(0))
    assert_partial(optimizer)


SURROUNDINGS = [
    check_step_hooks_are_called_once_around_each_step,
    check_state_dict_hooks_are_called,
    check_load_state_dict_hooks_are_called,
    check_lambda_lr_is_followed,
    check_one_cycle_lr_is_followed,
    check_cosine_warm_restarts_are_followed,
    check_reduce_lr_on_plateau_is_followed,
    check_sequential_lr_is_followed,
    check_grad_scaler_steps_are_the_unscaled_steps,
    check_grad_scaler_overflow_moves_nothing,
    check_grad_scaler_overflow_at_the_first_step_moves_nothing,
    check_the_profiler_shows_steps,
    check_averaged_weights_are_those_of_the_run,
]
