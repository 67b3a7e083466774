# SPDX-License-Identifier: Apache-2.0
"""Path: watches an optimizer, remembers when every block entered, and gives out tickets.

An observer on the step hook: the optimizer does not know it. *First entry* is nested by
construction; the *support* at a point is not, because blocks do leave Gamma again.
"""

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.choosing.choosing import Family
from dessilbi.choosing.selection import Ranking, rank
from dessilbi.dynamics.clock import alpha_now
from dessilbi.dynamics.forecast import entry_times
from dessilbi.files.folders import kind_of
from dessilbi.files.runs import Run
from dessilbi.files.sealing import check_sealed
from dessilbi.graph.program import ExampleInputs
from dessilbi.optimizers import dual
from dessilbi.optimizers.optimizer import is_phantom_step
from dessilbi.path.asking import check_numbers, check_step, one_budget
from dessilbi.path.hints import EntryHint, warn_of_joined
from dessilbi.path.history import BELIEVED, NEVER, History
from dessilbi.path.lines import Point, Takes
from dessilbi.path.scores import (
    Order,
    Scores,
    block_scores,
    load_scores,
    order_keys,
    save_scores,
    usual_order,
)

NUM_POINTS = 100


class Path:
    """The regularisation path of one run: the whole family of models from simple to complex.

    Args:
        optimizer: A DessiLBI (or wrapped) optimizer with named parameters; watched from now on.
        every: Record a point every so many steps. By default about 100 points: a hundredth of
            ``total_steps`` if that is known, else an interval that doubles as the run grows.
        total_steps: Steps of the whole run, if known.
        total_time: Path time of the whole run (the sum of lr over all its steps), if known. With
            it, or with ``total_steps``, a run in which no block can enter is warned about early.
        file: Append every point to this file (it must not exist), safe against crashes.
        after: The path of a run that this one continues with other shapes, after ``compact``:
            steps and path time go on from there; first entries count from here.
        resume: What :meth:`state_dict` returned when the weights and the optimizer were saved:
            what ``file`` holds up to there is kept and continued, what came later is dropped.
            Without a file only the clock goes on.

    Raises:
        ValueError: The optimizer has no structured group or no names, a number is not > 0, or the
            file does not hold the path that ``resume`` is to continue.
        OSError: The file exists or cannot be written.

    >>> import torch
    >>> from dessilbi import DessiLBI
    >>> layer = torch.nn.Linear(4, 3)
    >>> groups = [{"params": [("weight", layer.weight)], "structure": "filter"}]
    >>> optimizer = DessiLBI(groups, lr=0.1, nu=1.0, lam=0.01)
    >>> path = Path(optimizer, every=1)
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     layer(torch.ones(1, 4)).sum().backward()
    ...     optimizer.step()
    >>> len(path.points), path.support(step=10).density
    (10, 1.0)
    >>> round(path.ticket(density=0.34).density, 2)
    0.33
    """

    knows_shapes = True  # so it cannot go on with a compacted model; see ``after``

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        every: int | None = None,
        total_steps: int | None = None,
        total_time: float | None = None,
        file: str | FilePath | None = None,
        after: "Path | None" = None,
        resume: Mapping[str, Any] | None = None,
    ):
        found = dual.named_members(optimizer)
        check_numbers(every, total_steps, total_time)
        self._joined: list[str] = [] if resume is None else list(resume.get("joined", ()))
        specs = {m.name: m.spec for m in found if m.name not in self._joined}
        if resume is None or file is None:
            units = {m.name: m.group.get("unit") for m in found if m.name in specs}
            self._history = History(specs, units, file)
        else:
            self._history = History.resume(file, resume["file"], specs=specs)
        self._scores: Scores | None = None
        self.step: int = 0 if after is None else after.step
        self.time: float = 0.0 if after is None else after.time
        self._total_steps, self._total_time = total_steps, total_time
        self._interval = every or (max(1, total_steps // NUM_POINTS) if total_steps else 1)
        self._adaptive, self._hint = every is None and total_steps is None, EntryHint()
        if resume is not None:
            self.step, self.time = int(resume["step"]), float(resume["time"])
            self._interval = int(resume["interval"])
            self._hint.load_state_dict(resume["hint"])
        self._closed = False
        self._optimizer: Optimizer | None = optimizer
        self._handle = optimizer.register_step_post_hook(self._after_step)

    @classmethod
    def load(cls, folder: str | FilePath, *, largest: int | None = None) -> "Path":
        """Read the path of a run folder; it answers questions and records nothing more.

        It may have ``largest`` blocks; by default as many as the run's first weights have bytes.

        Raises:
            FileNotFoundError: The folder has no path.
            ValueError: A file is damaged or not ours.
        """
        run = Run(FilePath(folder))
        if not run.path.is_file():
            told = f"{folder} is not a run folder with a path: {kind_of(folder, run.path.name)}"
            raise FileNotFoundError(f"{told}; name a folder that `dessilbi train` has written")
        check_sealed(run.path, run.scores)
        path = cls.__new__(cls)
        path._history = History.load(run.path, largest=largest or max(BELIEVED, run.weight_bytes))
        specs = path._history.specs
        path._scores = load_scores(run.scores, specs) if run.scores.is_file() else None
        path._optimizer, path._closed = None, False
        last = path.points[-1] if path.points else Point(0, 0.0, 0.0)
        path.step, path.time = last.step, last.time
        return path

    def state_dict(self) -> dict[str, Any]:
        """Return where this path stands, as plain JSON values, for ``Path(..., resume=...)``.

        Save it together with the weights and the optimizer, after the step.

        Raises:
            ValueError: The path has no file.
        """
        clock = {"step": self.step, "time": self.time, "interval": self._interval}
        told = {**clock, "hint": self._hint.state_dict(), "file": self._history.position()}
        joined = self._outside()
        return {**told, "joined": joined} if joined else told

    def _outside(self) -> list[str]:
        """Structured tensors of the optimizer that joined it later: no part of this path."""
        if self._optimizer is not None:
            found = dual.named_members(self._optimizer)
            self._joined = [m.name for m in found if m.name not in self._history.specs]
        return self._joined

    @property
    def points(self) -> list[Point]:
        """The recorded points, in order of their steps."""
        return list(self._history.points)

    @property
    def names(self) -> list[str]:
        """Names of the structured tensors."""
        return list(self._history.specs)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and block of the structured tensors, by name."""
        return dict(self._history.specs)

    @property
    def units(self) -> dict[str, str | None]:
        """The unit of each structured tensor, or None."""
        return dict(self._history.units)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if is_phantom_step(optimizer):
            return
        self.step += 1
        self.time += alpha_now(optimizer)
        if self.step % self._interval:
            return
        self._record()
        automatic = sum(not point.by_hand for point in self._history.points)
        if self._adaptive and automatic >= 2 * NUM_POINTS:
            self._history.thin(2 * self._interval)
            self._interval *= 2

    def record(self) -> Point:
        """Record a point now, whatever the interval; it is never thinned away.

        Raises:
            ValueError: This path watches no optimizer.
            OSError: The file cannot be written; what it holds stays.
        """
        self._record()
        self._history.keep_latest()
        return self._history.points[-1]

    def _record(self) -> None:
        optimizer = self._watched()
        if self.points and self.points[-1].step == self.step:
            return
        everything, specs = dual.support(optimizer), self._history.specs
        before = self._joined
        if (joined := self._outside()) and joined != before:
            warn_of_joined(joined)
        support = Ticket({name: everything[name] for name in specs}, specs)
        self._history.add(Point(self.step, self.time, support.density), support)
        total = self._total_time
        if total is None and self._total_steps is not None:
            total = self.time + max(0, self._total_steps - self.step) * alpha_now(optimizer)
        if total is not None:
            self._hint.look(optimizer, self.time, total, entered=support.kept_elements > 0)

    def _watched(self) -> Optimizer:
        if self._optimizer is None:
            past = "was closed" if self._closed else "was loaded from a run folder"
            raise ValueError(
                f"this path {past} and watches no optimizer: make a new one with Path(optimizer)"
            )
        return self._optimizer

    def log(self, **metrics: Any) -> None:
        """Attach numbers to the latest point, for example ``path.log(accuracy=0.98)``.

        Raises:
            ValueError: Nothing has been recorded yet.
            OSError: The file cannot be written.
        """
        self._history.log(metrics)

    def close(self) -> None:
        """Stop watching; everything recorded stays available."""
        if self._optimizer is not None:
            self._scores, self._joined = self.scores(), self._outside()
            self._handle.remove()
            self._optimizer, self._closed = None, True

    @property
    def history(self) -> History:
        """What was recorded: points, supports, first entries and births, block by block."""
        return self._history

    def move(self, optimizer: Optimizer, takes: Takes) -> None:
        """Watch an optimizer of other sizes from now on; see :meth:`History.reshape`."""
        self._watched()
        specs = {m.name: m.spec for m in dual.named_members(optimizer)}
        self._history.reshape(specs, takes, self.step)
        self._handle.remove()
        self._optimizer = optimizer
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def entry(self) -> dict[str, Tensor]:
        """Return the step of the point at which each block was first seen in Gamma; -1: never."""
        return {name: entry.clone() for name, entry in self._history.entries.items()}

    def predict(self) -> dict[str, Tensor]:
        """Return the path time at which each block entered or is expected to; inf: never.

        For blocks that have entered it is the time of the point at which they were first seen in
        Gamma. Compare with the path time of the whole run: what comes later will not enter.

        Raises:
            ValueError: This path watches no optimizer.
        """
        past = ([0, *self._history.steps()], [0.0, *(p.time for p in self.points), self.time])
        return entry_times(self._watched(), time=self.time, entered=self.entry(), past=past)

    def support(self, *, step: int) -> Ticket:
        """Return supp(Gamma) at the last point up to ``step`` (or the first that is kept).

        Raises:
            ValueError: No point was recorded by then.
        """
        check_step(self._history, step, self.step)
        index = max(0, sum(recorded <= step for recorded in self._history.steps()) - 1)
        origin = {"kind": "support", "step": self.points[index].step}
        return Ticket(self._history.support(index), self._history.specs, origin)

    def ticket(
        self,
        *,
        density: float | None = None,
        step: int | None = None,
        params: float | None = None,
        macs: float | None = None,
        bytes: float | None = None,  # noqa: A002  # the word people say
        order: Order | None = None,
        model: nn.Module | None = None,
        example_inputs: ExampleInputs | None = None,
    ) -> Ticket:
        """Return one member of the family: by a budget, or what had entered by ``step``.

        Args:
            density: Wanted share of kept elements, in (0, 1]; met from below to within one block.
                Tickets of one order are nested. Every layer keeps its best block and at least
                5 % of ``density``, as far as whole blocks allow.
            step: Keep the blocks whose first entry is at most this step.
            params: The largest ticket whose compacted model has at most so many parameters: a
                share of the dense model's if at most 1, an absolute number if above.
            macs: Likewise for the multiply-accumulates of one sample.
            bytes: Likewise for the bytes of parameters and buffers.
            order: By ||W|| over its mean in the layer ("relative"), ||W|| ("weight"), ||V||/lam
                ("dual") or first entry ("entry"). None: :func:`dessilbi.path.scores.usual_order`.
            model: With it (and ``example_inputs``) the ticket comes closed, ready for ``compact``,
                and ``density`` is that of the closed ticket. Every budget but density needs it.
            example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.

        Raises:
            ValueError: Not exactly one of density, step, params, macs and bytes is given, a value
                is out of range, or the path was loaded from a run that never finished.
        """
        budgets = (density, params, macs, bytes)
        quantity, limit = one_budget(step, budgets, model, example_inputs)
        if step is not None:
            check_step(self._history, step, self.step)
            masks = {n: (e != NEVER) & (e <= step) for n, e in self._history.entries.items()}
            return Ticket(masks, self._history.specs, {"kind": "entered", "step": step})
        if model is not None and example_inputs is not None:
            family = self.family(model, example_inputs=example_inputs, order=order)
            return family.choose(quantity, limit).ticket
        order = order or usual_order(self.specs)
        origin = {"kind": "density", "order": order, "density": limit, "step": self.step}
        return self.ranking(order).ticket(limit, origin)

    def ranking(self, order: Order | None = None) -> Ranking:
        """Return the ranking behind :meth:`ticket`; use it to draw many tickets at once.

        Raises:
            ValueError: The order is unknown, or the path has no scores.
        """
        history, order = self._history, order or usual_order(self._history.specs)
        keys = order_keys(order, self.scores(), history.entries)
        return rank(keys, history.specs, history.units, relative=order == "relative")

    def family(
        self, model: nn.Module, *, example_inputs: ExampleInputs, order: Order | None = None
    ) -> Family:
        """Return the closed, compactable tickets of an order with what they cost.

        Args:
            model: The model of this run; it is not changed.
            example_inputs: See :meth:`ticket`.
            order: See :meth:`ticket`.

        Raises:
            ValueError: As :meth:`ranking`, or the model is another or cannot be read.
        """
        order = order or usual_order(self._history.specs)
        return Family(
            order_keys(order, self.scores(), self._history.entries),
            self._history.specs,
            self._history.units,
            model=model,
            example_inputs=example_inputs,
            relative=order == "relative",
            origin={"kind": "budget", "order": order, "step": self.step},
        )

    def scores(self) -> Scores:
        """Return {"dual": ||V||/lam, "weight": ||W||} per block, by name; over units jointly.

        Of a watched optimizer they are those of this moment. Where every lam is infinite, "dual" is
        ||V|| by itself (divided by sqrt(|g|) under block_scale "sqrt").

        Raises:
            ValueError: The path was loaded from a run that left no scores.
        """
        if self._optimizer is not None:
            return block_scores(self._optimizer)
        if self._scores is None:
            raise ValueError(
                "this run left no final scores, so its blocks cannot be ranked: "
                "let it finish, or take a ticket by step"
            )
        return self._scores

    def save_scores(self, file: str | FilePath) -> None:
        """Write :meth:`scores` as safetensors, so that a loaded path can rank blocks."""
        save_scores(self.scores(), file)

    def __repr__(self) -> str:
        told = f"{len(self.points)} points to step {self.step}, path time {self.time:.4g}"
        told += f", density {self.points[-1].density:.4g}" if self.points else ""
        return f"Path({told}, {len(self.names)} tensors)"
