# SPDX-License-Identifier: Apache-2.0
"""Opening: a run folder is made, or taken in hand again, by one process at a time."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch

from dessilbi.files.runs import Run, create_run, locked, status_of
from dessilbi.files.sealing import seal_of
from dessilbi.files.storage import as_json
from dessilbi.training.engine import Engine
from dessilbi.training.environment import environment
from dessilbi.training.ingredients import model_of
from dessilbi.training.progress import Reporter, Silent
from dessilbi.training.setting import Setting
from dessilbi.training.state import whole
from dessilbi.training.watching import Tracker, Watching, tensorboard


def new_run(setting: Setting, out: str | FilePath | None, data_root: str | FilePath | None) -> Run:
    """Make the run folder with all that is known before the first step."""
    facts = environment() | {
        "engine": setting.facts,
        "data": None if data_root is None else str(FilePath(data_root).absolute()),
    }
    # Built once more, because the one in use may be on another device, and cut in parts.
    start = setting.start
    if start is None:
        initial = whole(model_of(setting.recipe, setting.data).state_dict())
    else:
        initial = whole(start.weights)
    place = FilePath("runs") / setting.recipe.name if out is None else FilePath(out)
    names = Run(place)
    files = {
        names.recipe.name: as_json(setting.recipe.model_dump()),
        names.environment.name: as_json(facts),
        names.init.name: safetensors.torch.save(initial),
        **(start.files(names) if start is not None else {}),
    }
    files[names.checksums.name] = seal_of(files).content()
    files[names.status.name] = as_json(status_of("running"))
    return create_run(place, files, or_next=out is None)


@contextmanager
def owned(run: Run, engine: Engine) -> Iterator[None]:
    """Hold the lock of a run in the first process, for all."""
    with ExitStack() as stack:
        engine.on_first(lambda: stack.enter_context(locked(run)))
        yield


def watching_of(
    run: Run,
    engine: Engine,
    reporter: Reporter | None,
    trackers: Sequence[Tracker],
    *,
    draw: bool,
    step: int,
) -> Watching:
    """Return who hears of a run: the reporter, trackers and, if it is to be drawn, TensorBoard."""
    drawn = [tensorboard(run.tensorboard, step=step)] if draw and engine.first else []
    return Watching(run, reporter or Silent(), [*trackers, *drawn], first=engine.first)


def compare(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn where a run goes on under conditions that change its last digits."""
    changed = [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]
    if changed:
        warnings.warn(
            f"this run goes on under other conditions ({', '.join(changed)}): its last digits may "
            f"differ from those of a run that was never cut",
            stacklevel=2,
        )
