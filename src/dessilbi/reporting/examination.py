# SPDX-License-Identifier: Apache-2.0
"""Examination: what can be known of a recipe before it trains."""

from collections.abc import Iterator

from torch import Tensor

from dessilbi.dynamics.clock import PathClock
from dessilbi.dynamics.forecast import forecast
from dessilbi.dynamics.monitors import dead_units, warn_about_dead_units
from dessilbi.dynamics.safety import check_step, lipschitz
from dessilbi.training.engine import engine_for
from dessilbi.training.objective import loss_of
from dessilbi.training.recipes import Recipe
from dessilbi.training.setting import Setting, prepare
from dessilbi.training.steering import Steering

SAMPLES, BATCHES, ITERATIONS = 128, 2, 15


def examine(recipe: Recipe, data_root: str | None) -> Iterator[tuple[str, str]]:
    """Yield (what, finding) pairs about the initial weights of a recipe; trains nothing.

    Args:
        recipe: The recipe.
        data_root: The data folder, or None.

    Raises:
        ValueError, FileNotFoundError: As :func:`~dessilbi.training.setting.prepare`.
    """
    with engine_for("float32", device="cpu") as engine:
        setting = prepare(recipe, engine, data_root=data_root)
        if setting.steering is None:
            yield "recipe", f"{recipe.name}: nothing has a structure, so nothing can enter"
            return
        yield from _clock(setting, setting.steering)
        yield from _step(setting)
        yield from _entries(setting, setting.steering.clock)


def _clock(setting: Setting, steering: Steering) -> Iterator[tuple[str, str]]:
    clock = steering.clock
    yield "recipe", f"{setting.recipe.name}: {clock.num_steps:,} steps"
    yield "coupling", steering.describe()
    if clock.standing_still > 0.05:
        yield (
            "clock",
            f"95 % of the path time is over after {1 - clock.standing_still:.0%} of the steps",
        )


def _step(setting: Setting) -> Iterator[tuple[str, str]]:
    model = setting.model
    inputs, targets = setting.data.train.examples(SAMPLES * BATCHES)
    batches = list(zip(inputs.chunk(BATCHES), targets.chunk(BATCHES), strict=True))

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(model(batch[0]), batch[1])

    bound = check_step(setting.optimizer, lipschitz(model, loss, batches, iterations=ITERATIONS))
    yield "step", f"{bound}, at the initial weights and without momentum"
    shares = dead_units(model, loss, batches)
    warn_about_dead_units(shares)
    worst = max(shares, key=lambda name: shares[name])
    yield "dead units", f"at most {shares[worst]:.0%} of a layer ({worst})"


def _entries(setting: Setting, clock: PathClock) -> Iterator[tuple[str, str]]:
    recipe = setting.recipe
    if recipe.density is not None:
        yield "density", f"lambda will follow the density {recipe.density} ({recipe.calibrate})"
        return
    seen = forecast(setting.optimizer, clock)
    if seen.first > clock.total:
        yield (
            "first entry",
            (
                "none before the end, were the weights to stay as small as they begin; those that "
                "learn grow, and the run looks again early: or lower lam or nu, or say a density"
            ),
        )
    else:
        step = clock.step_at(seen.first)
        yield "first entry", f"expected at path time {seen.first:.4g}, step {step:,}"
    yield (
        "can enter",
        (
            f"{seen.blocks:.1%} of the blocks ({seen.elements:.1%} of the weights), judged by the "
            f"initial weights; {seen.at_constant_rate:.1%} at a constant learning rate"
        ),
    )
