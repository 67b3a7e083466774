# SPDX-License-Identifier: Apache-2.0
"""Density control: the user says a density, and lambda is found while the run goes on.

An observer outside the optimizer: it reads the norms of V that a step leaves behind and writes
lambda into the param groups. The law W + kappa V holds under a moving lambda; that the iterates
converge is known only while lambda is constant.
"""

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dessilbi.choosing.selection import LAYER_FLOOR
from dessilbi.dynamics.clock import PathClock, alpha_now, alphas, warn_about_coupling
from dessilbi.dynamics.levels import Blocks
from dessilbi.dynamics.scheduling import claim_lam, release_lam
from dessilbi.dynamics.targets import Record, Target, controlled, targets_of
from dessilbi.optimizers import dual
from dessilbi.optimizers.optimizer import is_phantom_step

Mode = Literal["track", "late"]
MODES: tuple[Mode, ...] = ("track", "late")
START = 0.1  # selection begins at this share of the path time
LOOKS = {"track": 50, "late": 200}  # how often the norms are looked at over the path time
_NEARLY = 1e-6  # rounding in sums of alpha


class DensityControl:
    """Finds the lambda of a wanted density while an optimizer trains.

    ``track``: lambda follows a prediction of what will be needed at the end, refreshed 50 times;
    to the end, which meets the density from below to one block, or until ``freeze``, after which
    lambda is constant, as the theory wants it. ``late``: lambda is chosen once, early, never below
    what any block had reached: the very same run as that lambda from the start, with a density
    that is only met roughly.

    One lambda serves all layers. Where the groups carry different ``lam``, their ratios are kept.

    Args:
        optimizer: A DessiLBI (or wrapped) optimizer; watched from now on.
        density: Wanted share of kept elements, in (0, 1), over all structured tensors; or one for
            each pattern of names, tried in order: each gets a lambda of its own, and tensors that
            no pattern matches keep theirs.
        total_time: T, the path time of the whole run; or give ``total_steps``.
        scheduler: Moves the learning rate over ``total_steps``; None: it is constant.
        total_steps: Steps of the whole run.
        every: Optimizer steps per ``scheduler.step()``.
        mode: "track" or "late".
        freeze: Share of the path time after which "track" leaves lambda alone; None: to the end.
        floor: Every layer keeps its best block and at least this share of ``density`` of its own
            blocks: a layer that would have less gets a lower lambda. None: layers may die.

    Raises:
        ValueError: A value is out of range, the floor takes more than the density allows, no
            group has a structure, or a pattern fits nothing.
        TypeError: The scheduler is not one of torch's.

    >>> from dessilbi import DessiLBI
    >>> _ = torch.manual_seed(0)
    >>> layer = torch.nn.Linear(50, 20)
    >>> groups = [{"params": [("weight", layer.weight)], "structure": "element"}]
    >>> optimizer = DessiLBI(groups, lr=0.1, nu=1.0)
    >>> control = DensityControl(optimizer, density=0.25, total_steps=100)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     (layer(torch.randn(8, 50)) - 1).square().mean().backward()
    ...     optimizer.step()
    >>> optimizer.support().density
    0.25
    """

    knows_shapes = True  # compaction leaves it behind with the optimizer it watches

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        density: float | Mapping[str, float],
        total_time: float | None = None,
        scheduler: LRScheduler | None = None,
        total_steps: int | None = None,
        every: int = 1,
        mode: Mode = "track",
        freeze: float | None = None,
        floor: float | None = LAYER_FLOOR,
    ):
        _check(density, mode, freeze, floor)
        if (total_time is None) == (total_steps is None):
            raise ValueError("give DensityControl total_steps (and the scheduler), or total_time")
        largest = None
        if total_steps is not None:
            clock = PathClock(alphas(optimizer, scheduler, total_steps, every=every))
            total_time, largest = clock.total, clock.largest
        assert total_time is not None
        if not 0 < total_time < math.inf:
            raise ValueError(f"total_time={total_time!r} is not allowed: it must be > 0, finite")
        self.mode, self.freeze = mode, freeze
        self.total_time, self.total_steps = total_time, total_steps
        self.step, self.time = 0, 0.0
        self._looked = 0
        self.targets, self._places = targets_of(optimizer, density, floor)
        self._optimizer = optimizer
        warn_about_coupling(optimizer, total_time, largest_alpha=largest)
        claim_lam(optimizer, "DensityControl")
        for target, norms in self._norms():
            target.note(0, 0.0, target.blocks(norms).level(target.budget))
        self._write()
        self._handles = [optimizer.register_step_post_hook(self._after_step)]
        if mode == "track":
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        # Before all other observers, so that a Path records the support under the new lambda
        # whichever of the two was made first; behind what enforces a ticket, which changes V.
        hooks = optimizer._optimizer_step_post_hooks
        for key, hook in list(hooks.items()):
            observer = getattr(hook, "__self__", None)
            if observer is not self and getattr(observer, "knows_shapes", False):
                hooks[key] = hooks.pop(key)

    @property
    def lam(self) -> float | dict[str, float]:
        """Lambda now, in the measure of the first tensor's group; by pattern if several."""
        if len(self.targets) == 1:
            return self.targets[0].lam
        return {target.name: target.lam for target in self.targets}

    @property
    def history(self) -> dict[str, list[Record]]:
        """By pattern ("*" for all), what was seen and set, in order of time."""
        return {target.name: list(target.history) for target in self.targets}

    @torch.no_grad()
    def density(self) -> dict[str, float]:
        """Return the share of elements in supp(Gamma) now, by pattern ("*" for all)."""
        found = {}
        for target, norms in self._norms():
            blocks = target.blocks(norms)
            kept = [
                size * int((values > blocks.threshold(i, target.lam_of(i))).sum())
                for i, (size, values) in enumerate(zip(blocks.sizes, norms, strict=True))
            ]
            found[target.name] = sum(kept) / target.elements
        return found

    def _find_units(self) -> None:
        """Look the units up again: loading replaces the optimizer's groups."""
        units = controlled(self._optimizer)
        for target, places in zip(self.targets, self._places, strict=True):
            target.units = [units[place] for place in places]

    def _norms(self) -> list[tuple[Target, list[Tensor]]]:
        self._find_units()
        units = [unit for target in self.targets for unit in target.units]
        norms = iter(dual.norms_of(self._optimizer, units))
        return [(target, [next(norms) for _ in target.units]) for target in self.targets]

    def _look(self, time: float) -> int:
        """How many looks are due by a path time."""
        return math.floor(time / self.total_time * LOOKS[self.mode] + _NEARLY)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Before a look, see whose gradients leave the size of the weights alone."""
        if self._look(self.time + alpha_now(optimizer)) > self._looked:
            self._find_units()
            for target in self.targets:
                target.watch_gradients()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if is_phantom_step(optimizer):
            return
        self.step += 1
        self.time += alpha_now(optimizer)
        look = self._look(self.time)
        due = look > self._looked or self.step == self.total_steps
        self._looked = max(look, self._looked)
        if self.mode == "track" and due:
            self._track()
        elif self.mode == "late":
            self._choose_late(due)

    @torch.no_grad()
    def finish(self) -> None:
        """Look once more, as at the end of the run: for runs that end before their schedule does.

        That is so where a GradScaler has skipped steps, or a run was stopped early.
        """
        if self.mode == "track" and self.time < self.total_time * (1 - _NEARLY):
            self.total_time, self._looked = self.time, LOOKS[self.mode]
            self._track()

    def _track(self) -> None:
        share = self.time / self.total_time + _NEARLY
        total = self.time if self.step == self.total_steps else self.total_time
        at_end = self.time >= total * (1 - _NEARLY)
        for target, norms in self._norms():
            blocks = self._finite(target, norms)
            expected = self._expected(target, blocks, total)
            level, wanted = target.foresee(blocks, expected)
            if not target.fixed and share >= START:
                self._warn_if_still(target, blocks)
                target.lam = wanted
            # Once lambda is frozen, only the very end shows whether a layer misses its floor.
            if not target.fixed or at_end:
                target.keep_layers_alive(dict(enumerate(norms)), expected)
            target.note(self.step, self.time, level)
            target.fixed = self.freeze is not None and share >= self.freeze
        self._write()

    def _choose_late(self, due: bool) -> None:
        self._find_units()
        watched = [
            (target, [i for i, entered in enumerate(target.entered) if not entered])
            for target in self.targets
        ]
        units = [target.units[i] for target, indices in watched for i in indices]
        found = iter(dual.norms_of(self._optimizer, units))
        for target, indices in watched:
            target.watch({i: next(found) for i in indices})
        if not due:
            return
        for target, norms in self._norms():
            blocks = self._finite(target, norms)
            expected = self._expected(target, blocks, self.total_time)
            if not target.fixed:
                if self.time >= START * self.total_time:
                    self._warn_if_still(target, blocks)
                target.choose_late(blocks, expected, self.step, self.time, self.total_time)
            alive = {i: n for i, n in enumerate(norms) if not target.entered[i]}
            target.keep_layers_alive(alive, expected)
            if self.time >= self.total_time * (1 - _NEARLY):
                self._warn_below_floor(target, blocks)
        self._write()

    def _finite(self, target: Target, norms: list[Tensor]) -> Blocks:
        """The blocks of a target; no density can be found where V is no number any more."""
        for unit, values in zip(target.units, norms, strict=True):
            if not values.isfinite().all():
                raise ValueError(
                    f"V of {unit[0].name} is not finite at step {self.step}, so no lambda can be "
                    f"found: the training has diverged; go back to a checkpoint, lower the lr"
                )
        return target.blocks(norms)

    def _expected(self, target: Target, blocks: Blocks, total: float) -> list[Tensor]:
        """What the norms will have become at the end."""
        growths = dual.growth_of(self._optimizer, target.units, blocks.norms)
        return target.expect(blocks, growths, self.time, total)

    def _warn_if_still(self, target: Target, blocks: Blocks) -> None:
        begun = any(math.isfinite(record.lam) for record in target.history)
        if not begun and not any(blocks.largest(i) for i in range(len(target.units))):
            warnings.warn(
                f"V of {target.name} has not moved by step {self.step}, so nothing can enter "
                f"Gamma: check that gradients and learning rate are not zero",
                stacklevel=2,
            )

    def _warn_below_floor(self, target: Target, blocks: Blocks) -> None:
        """A lambda that has to stay above what was reached cannot always save a layer."""
        empty = [
            unit[0].name
            for i, (unit, floor) in enumerate(zip(target.units, target.floors, strict=True))
            if blocks.counts(target.lam_of(i))[i] < floor
        ]
        if empty:
            shown = ", ".join(empty[:6]) + (f" and {len(empty) - 6} more" if empty[6:] else "")
            warnings.warn(
                f"{shown} ended with fewer blocks than the floor: a lambda that is chosen late "
                f"must stay above every norm that was reached; use mode='track'",
                stacklevel=2,
            )

    def _write(self) -> None:
        """Write every lambda into its group; where its tensors differ, a lambda for each."""
        wanted = {
            member.param: target.lam_of(i) * target.weights[i]
            for target in self.targets
            for i, unit in enumerate(target.units)
            for member in unit
        }
        for group in self._optimizer.param_groups:
            if not any(param in wanted for param in group["params"]):
                continue
            lams = [wanted.get(param, group["lam"]) for param in group["params"]]
            if all(param in wanted for param in group["params"]):
                # Most tensors share the target's; kernels are fastest on those.
                group["lam"] = Counter(lams).most_common(1)[0][0]
            group.pop(dual.OWN_LAM, None)
            group.pop(dual.OWN_LAM_AT, None)
            if set(lams) != {group["lam"]}:
                group[dual.OWN_LAM], group[dual.OWN_LAM_AT] = lams, group["lam"]

    def close(self) -> None:
        """Stop watching; lambda stays what it is."""
        for handle in self._handles:
            handle.remove()
        release_lam(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return where the control stands, as plain values; it goes into a checkpoint."""
        return {
            "mode": self.mode,
            "step": self.step,
            "time": self.time,
            "looked": self._looked,
            "targets": [target.state_dict() for target in self.targets],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken, bit by bit; writes lambda.

        Raises:
            ValueError: The state is of another mode, density or set of tensors.
        """
        told = [(t["name"], t["density"], len(t["weights"])) for t in state["targets"]]
        own = [(t.name, t.density, len(t.units)) for t in self.targets]
        if state["mode"] != self.mode or told != own:
            raise ValueError(
                f"this state of DensityControl is of mode={state['mode']!r} and densities "
                f"{[(name, density) for name, density, _ in told]}, not of mode={self.mode!r} and "
                f"{[(name, density) for name, density, _ in own]}: go on with what was begun"
            )
        self.step, self.time = int(state["step"]), float(state["time"])
        self._looked = int(state["looked"])
        for target, saved in zip(self.targets, state["targets"], strict=True):
            target.load_state_dict(saved)
        self._find_units()
        self._write()

    def __repr__(self) -> str:
        wanted = ", ".join(f"{t.name}: {t.density:g} (lam {t.lam:.4g})" for t in self.targets)
        share = self.time / self.total_time
        return f"DensityControl({wanted}, {self.mode}, {share:.0%} of the path time)"


def _check(
    density: float | Mapping[str, float], mode: str, freeze: float | None, floor: float | None
) -> None:
    if isinstance(density, Mapping) and not density:
        raise ValueError("density={} is not allowed: give at least one pattern a density")
    for value in density.values() if isinstance(density, Mapping) else [density]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(f"density={value!r} is not allowed: it must be > 0 and < 1")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known: use one of {', '.join(MODES)}")
    if freeze is not None and not (mode == "track" and START <= freeze < 1):
        raise ValueError(
            f"freeze={freeze!r} is not allowed with mode={mode!r}: it is a share of the path time "
            f"from {START} up to 1, for mode='track'"
        )
    if floor is not None and not 0 <= floor <= 1:
        raise ValueError(f"floor={floor!r} is not allowed: it must be from 0 to 1, or None")
