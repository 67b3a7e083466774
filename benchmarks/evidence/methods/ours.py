# SPDX-License-Identifier: Apache-2.0
"""DessiLBI as a user would call it: search, density control, tickets."""

import warnings
from collections.abc import Callable
from typing import Any

from benchmarks.evidence.methods.magnitude import cubic
from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import MOMENTUM, Searched, Stage, fit
from torch import nn
from torch.optim import AdamW, Optimizer

from dessilbi import DensityControl, DessiLBI, Path, param_groups, wrap
from dessilbi.dynamics.clock import PathClock, alphas, set_coupling
from dessilbi.dynamics.scheduling import RAMP, Schedules, piecewise

ELEMENTS = {"*.weight": "element"}


def element_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups with single weights for convolutions and linear layers alone."""
    kinds = (nn.Conv2d, nn.Linear)
    rules = {f"{n}.weight": "element" for n, m in model.named_modules() if isinstance(m, kinds)}
    return param_groups(model, rules | {"*": None})


def optimizer_for(groups: list[dict[str, Any]], base: str, lr: float, decay: float) -> Optimizer:
    """Return DessiLBI, or its dynamics around AdamW; lambda and nu are set later."""
    if base == "adamw":
        return wrap(AdamW(groups, lr=lr, weight_decay=decay), nu=1.0, lam=1.0)
    return DessiLBI(groups, lr=lr, momentum=MOMENTUM, weight_decay=decay)


def tightening(
    model: nn.Module,
    optimizer: Optimizer,
    path: Path,
    stage: Stage,
    density: float,
    order: str,
    between: tuple[float, float] | None,
    every: int = 10,
) -> Callable[[int], None] | None:
    """Return what enforces smaller and smaller tickets of the path while it is made."""
    if between is None:
        return None
    begin, end = between
    enforced: list[Any] = []

    def after(step: int) -> None:
        progress = (step + 1 - stage.first) / stage.steps
        if (step + 1) % every == 0 and begin < progress <= end + every / stage.steps:
            left = 1 - cubic(progress, 1 - density, begin=begin, end=end)
            ticket = path.ticket(density=left, order=order)
            enforced.append(ticket.enforce(model, optimizer))
            if len(enforced) > 1:
                enforced.pop(0).remove()

    return after


def search(
    task: Task,
    model: nn.Module,
    groups: list[dict[str, Any]],
    stage: Stage,
    *,
    seed: int,
    lr: float,
    density: float,
    coupling: float = 10.0,
    base: str = "sgd",
    decay: float = 0.0,
    ramp: Any = RAMP,
    kappa: float = 1.0,
    freeze: float | None = None,
    order: str = "weight",
    lam: float | None = None,
    tighten: tuple[float, float] | None = None,
) -> Searched:
    """Train W and Gamma over a stage, lambda found on the way.

    Args:
        task: Data and loss.
        model: Trained in place.
        groups: Of ``param_groups``.
        stage: Which part of which schedule.
        seed: Of the order of samples.
        lr: Its largest value.
        density: Of supp(Gamma) at the end.
        coupling: R = T/nu, T the path time of the stage.
        base: "sgd" or "adamw".
        decay: Weight decay.
        ramp: Points of the factor of 1/nu.
        kappa: Redundant scale of Gamma.
        freeze: Share of the path time after which lambda is constant.
        order: Of tickets.
        lam: Constant, in place of density control.
        tighten: From and until which share of the stage nested tickets are enforced on the way,
            along the cubic curve of gradual pruning; what has left the support early stays out.
    """
    optimizer = optimizer_for(groups, base, lr / kappa if base == "sgd" else lr, decay)
    for group in optimizer.param_groups:
        group["kappa"] = kappa
        if lam is not None:
            group["lam"] = lam
    scheduler = stage.scheduler(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weak or strong couplings are tried on purpose
        clock = PathClock(alphas(optimizer, scheduler, stage.steps))
        set_coupling(optimizer, coupling, total_time=clock.total, largest_alpha=clock.largest)
        if ramp:
            Schedules(optimizer, total_time=clock.total, coupling=piecewise(ramp))
        if lam is None:
            DensityControl(
                optimizer,
                density=density,
                total_steps=stage.steps,
                scheduler=scheduler,
                freeze=freeze,
            )
        path = Path(optimizer, every=max(1, stage.steps // 20))
        after = tightening(model, optimizer, path, stage, density, order, tighten)
        spent = fit(task, model, optimizer, stage, seed=seed, scheduler=scheduler, after=after)
    support = optimizer.support()
    facts = {
        "support": support.density,
        "lambda": next(g["lam"] for g in optimizer.param_groups if g.get("structure")),
        "nu": clock.total * kappa / coupling,
    }
    return Searched(model, lambda d: path.ticket(density=d, order=order), spent, facts, path)
