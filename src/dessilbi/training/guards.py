# SPDX-License-Identifier: Apache-2.0
"""Guards: numbers that are not finite, memory that ran out, processes that died; in one sentence.

A run stops at the first step whose loss or gradient is not finite, or passes over such steps: then
W, V, momentum, BatchNorm statistics and the clock stay as they were, in every process.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from shlex import quote
from typing import Literal, NoReturn

import torch
from torch import Tensor

from dessilbi.blocks.sharding import local
from dessilbi.files.runs import Run, TrainingError
from dessilbi.training.checkpoints import Checkpoints
from dessilbi.training.data import Data
from dessilbi.training.engine import Engine
from dessilbi.training.position import Position, Totals
from dessilbi.training.recipes import Recipe
from dessilbi.training.setting import Setting

OnNan = Literal["stop", "skip"]
MOST = 100  # steps passed over in a row, before the run ends after all

_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED")
_NO_PEER = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")


class Guard:
    """Looks at losses and gradients; every process makes one.

    Args:
        setting: Of the run.
        engine: Of the run.
        totals: Sums of the epoch, which a step that is passed over must not enter.
        position: Counts the steps that were passed over.
        run: To name in messages.
        checkpoints: Likewise.
        on_nan: "stop" or "skip".
    """

    def __init__(
        self,
        setting: Setting,
        engine: Engine,
        totals: Totals,
        position: Position,
        *,
        run: Run,
        checkpoints: Checkpoints,
        on_nan: OnNan,
    ):
        self.setting, self.engine, self.totals, self.position = setting, engine, totals, position
        self.run, self.checkpoints, self.on_nan = run, checkpoints, on_nan
        # One process on a CPU sees every number at no cost, before it does harm.
        self.watchful = engine.world_size == 1 and engine.device.type == "cpu"
        self._skips = on_nan == "skip"
        self._kept: tuple[list[float | Tensor], list[Tensor]] = ([], [])

    @torch.no_grad()
    def begin(self) -> None:
        """Before a step: keep what forward passes change, should the step be passed over."""
        if self._skips:
            buffers = [local(buffer).clone() for buffer in self.setting.model.buffers()]
            self._kept = self.totals.sums(), buffers

    def check_loss(self) -> None:
        """Refuse a loss that is not finite before it does harm, where it is known at once."""
        if self.watchful and not self._skips and not math.isfinite(self.totals.loss):
            self.refuse(f"the loss is {self.totals.loss}")

    def passes(self) -> bool:
        """Return whether the step may be taken; every process must ask, after the backward pass."""
        if not self._skips:
            if self.watchful and not self._gradients_are_finite():
                self.refuse(f"the gradient is not finite (the loss is {self.totals.loss:.4g})")
            return True
        sound = self.totals.finite and self._gradients_are_finite()
        (broken,) = self.engine.any(not sound)
        if broken:
            self._pass_over()
        else:
            self.position.skipped_in_a_row = 0
        return not broken

    @torch.no_grad()
    def _pass_over(self) -> None:
        sums, buffers = self._kept
        self.totals.set(sums, loss=self.totals.loss if self.totals.finite else math.nan)
        for buffer, kept in zip(self.setting.model.buffers(), buffers, strict=True):
            local(buffer).copy_(kept)
        self.position.skipped += 1
        self.position.skipped_in_a_row += 1
        if self.position.skipped_in_a_row >= MOST:
            self.refuse(f"{MOST} steps in a row had no finite loss and gradient, the last one")

    def _gradients_are_finite(self) -> bool:
        if self.engine.scaler is not None:  # it skips its own steps, and lowers its scale
            return True
        params = [p for group in self.setting.optimizer.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in params if p.grad is not None]
        # A sum carries every NaN and infinity, and costs far less than a largest value.
        sums = [g.sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        return not sums or bool(torch.stack([each.isfinite() for each in sums]).all())

    @torch.no_grad()
    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse to save weights, V or momentum that are not finite; every process must ask."""
        weights = {f"model/{name}" for name, _ in self.setting.model.named_parameters()}
        looked = {
            name: local(tensor)
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and (name in weights or name.startswith("optimizer/"))
        }
        broken = next((name for name, t in looked.items() if not t.isfinite().all()), None)
        if self.engine.any(broken is not None)[0]:
            self.refuse(f"{broken or 'a part of the model'} is not finite")

    def refuse(self, what: str) -> NoReturn:
        """End the run: say what was found, where, and how to go on."""
        latest = self.checkpoints.latest()
        good = "the beginning" if latest is None else f"the last good checkpoint ({latest.name})"
        lr = self.setting.optimizer.param_groups[0]["lr"]
        skip = "" if self._skips else " and pass over such batches"
        advice = (
            f"lower optimizer.lr (now {float(lr):.3g}) or raise optimizer.nu and train again, or "
            f"go on from {good}{skip} with: {resuming(self.run, self.setting.data)} --on-nan skip"
        )
        raise TrainingError(
            f"{what} at step {self.position.step + 1}: {advice}; what was saved is kept"
        )


def resuming(run: Run, data: Data) -> str:
    """Return the command that goes on with a run, as one can paste it."""
    told = f"dessilbi train --resume {quote(str(run.folder))}"
    return told if data.root is None else f"{told} --data {quote(data.root)}"


@contextmanager
def explained(recipe: Recipe, engine: Engine) -> Iterator[None]:
    """Turn what a machine raises where it has no memory left, or lost a process, into a sentence.

    Raises:
        TrainingError: It happened.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _has(told, _NO_MEMORY):
            raise TrainingError(f"memory ran out with {_smaller(recipe)}") from None
        if engine.world_size > 1 and _has(told, _NO_PEER):
            raise TrainingError(
                "another process of this run ended: what was saved is kept, go on with --resume"
            ) from None
        raise


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def _smaller(recipe: Recipe) -> str:
    """What a recipe uses, and what would use less."""
    size, pieces = recipe.batch_size, recipe.accumulate
    finer = next((n for n in range(2 * pieces, size + 1) if size % n == 0), None)
    ways = [f"accumulate={finer}"] if finer else []
    ways += [f"batch_size={size // 2}"] if size > 1 else []
    ways += ["precision=bf16"] if recipe.precision == "float32" else []
    return (
        f"batch_size={size} in {pieces} piece{'s' * (pieces > 1)} ({recipe.precision}): try "
        f"{', '.join(ways) or 'a smaller model'} in a new run, or free memory and go on with "
        f"--resume; what was saved is kept"
    )
