# SPDX-License-Identifier: Apache-2.0
"""Drawing: a run and what one cares about become a ticket, closed and ready to be compacted."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor, nn

from dessilbi.blocks.ticket import Ticket
from dessilbi.choosing.choosing import QUANTITIES, Choice, Family
from dessilbi.cuts.closing import close_on
from dessilbi.cuts.costs import Cost, CostModel
from dessilbi.files.runs import Run
from dessilbi.files.sealing import check_sealed
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.graph import read_graph
from dessilbi.outcomes.measuring import choose_by_drop, choose_by_latency
from dessilbi.path.history import NEVER
from dessilbi.path.path import Path
from dessilbi.path.scores import ORDERS, Order, Scores, block_scores, order_keys, usual_order
from dessilbi.path.settling import settled, why_not
from dessilbi.training.checkpoints import Checkpoints
from dessilbi.training.data import Data
from dessilbi.training.engine import engine_for
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.finetune import sizes_of
from dessilbi.training.ingredients import data_of
from dessilbi.training.recipes import Recipe, RecipeError, validate_recipe
from dessilbi.training.setting import prepare
from dessilbi.training.starting import built, filled, load_start
from dessilbi.training.state import restore, templates

BUDGETS = (*QUANTITIES, "latency_ms", "max_drop")
MOMENTS = ("step", "epoch", "early")
LISTED = (1.0, 0.7, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)


@dataclass(frozen=True)
class Wish:
    """What a ticket is chosen by: one budget, one moment of the path, or a budget at a moment.

    Budgets: ``density``, ``params``, ``macs`` and ``bytes`` as in :meth:`Path.ticket`;
    ``latency_ms`` of the compacted model on this machine; ``max_drop``: points of validation
    accuracy that may be lost. Moments: ``step``, ``epoch``, or ``early``, the first point at which
    the path had settled. ``order`` as in :meth:`Path.ticket`.

    Raises:
        ValueError: Nothing is given, two budgets, two moments, or an unknown order.
    """

    density: float | None = None
    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency_ms: float | None = None
    max_drop: float | None = None
    step: int | None = None
    epoch: float | None = None
    early: bool = False
    order: Order | None = None

    def __post_init__(self) -> None:
        """Check what is given."""
        if len(self.given(BUDGETS)) > 1:
            raise ValueError(f"give exactly one of {_listed(self.given(BUDGETS))}")
        if len(self.given(MOMENTS)) > 1:
            raise ValueError(f"give exactly one of {_listed(self.given(MOMENTS))}")
        if not self.given((*BUDGETS, *MOMENTS)):
            raise ValueError(
                f"give a budget or a moment to choose by: exactly one of {_listed(BUDGETS)}, "
                f"or of {_listed(MOMENTS)}, or one of each"
            )
        if self.order is not None and self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not known: use one of {', '.join(ORDERS)}")

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """Return those of ``names`` that are set."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        # By identity: a step of 0 is asked for, and then refused.
        return {n: values[n] for n in names if values[n] is not None and values[n] is not False}

    @property
    def name(self) -> str:
        """A name for the file of the ticket."""
        told = self.given((*MOMENTS, *BUDGETS))
        parts = [key if value is True else f"{key}-{value:g}" for key, value in told.items()]
        return "-".join(parts).replace("_", "-")


@dataclass(frozen=True)
class Drawn:
    """A closed ticket, what its compacted model costs, and why it was chosen.

    ``accuracy`` is that of the run's W on this ticket, on the validation split and with BatchNorm
    statistics re-estimated; None where the run did not finish or its data is not there.
    """

    ticket: Ticket
    cost: Cost
    reason: str
    accuracy: float | None

    def __str__(self) -> str:
        """Two lines: what it costs, and why it was chosen."""
        told = "not judged" if self.accuracy is None else f"{100 * self.accuracy:.2f} %"
        cost = self.cost
        return (
            f"compacted: {cost.params:,} parameters, {cost.macs:,} MACs, {cost.bytes:,} bytes; "
            f"validation accuracy before any retraining: {told}\n"
            f"chosen: {self.reason}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        origin = self.ticket.origin
        return {
            "density": self.ticket.density,
            **asdict(self.cost),
            "accuracy": self.accuracy,
            "step": origin.get("step"),
            "order": origin.get("order"),
            "kind": origin.get("kind"),
            "reason": self.reason,
        }


class Drawer:
    """A run opened to take tickets from.

    Args:
        run: The run; it need not be finished for tickets of a moment.
        data_root: Folder of the data sets; without the data only its shape is made up.

    Raises:
        FileNotFoundError: The folder is not a run folder, or has no path.
        ValueError: A file is damaged.
    """

    def __init__(self, run: Run, *, data_root: str | None = None):
        self.run, self._root = run, data_root
        self._families: dict[tuple[Order, int | None], Family] = {}  # each reads the model's graph
        self.recipe = validate_recipe(run.read_recipe(), origin=str(run.recipe))
        self.path = Path.load(run.folder)
        self._start = load_start(run)
        self.data, self._missing = _data_or_shape(self.recipe, data_root)
        file = run.model if run.model.is_file() else run.init
        if self.recipe.grow is not None and file != run.model:
            raise FileNotFoundError(f"{run.folder} has not finished to grow: let it finish")
        check_sealed(file)
        model = built(self.recipe, self.data, self._start, sizes_of(run))
        try:
            self.model: nn.Module = filled(model, load_tensors(file), file)
        except ValueError:
            if self._missing is None or self.recipe.data.partition(":")[0] != "folder":
                raise
            raise self._missing from None  # only the folder says how many classes there are
        self.example: Tensor = self.data.blank()
        if self._missing is None:
            self.example, _ = self.data.train.examples(1)

    @property
    def order(self) -> Order:
        """The order to rank blocks by where none is asked for."""
        return usual_order(self.path.specs)

    def draw(self, wish: Wish) -> Drawn:
        """Return the ticket of a wish.

        Raises:
            ValueError: It cannot be had; the message says what can.
            FileNotFoundError: A budget at a moment needs a checkpoint that was not kept, or the
                accuracy data that is not there.
        """
        moment, why = self._moment(wish)
        budget = wish.given(BUDGETS)
        if not budget:
            assert moment is not None
            return self._entered(moment, why, early=wish.early)
        family = self.family(wish.order, step=moment)
        ((quantity, limit),) = budget.items()
        choice = self._choice(family, quantity, limit)
        reason = f"{choice.reason}{f', ranked as at step {moment} ({why})' if why else ''}"
        return Drawn(choice.ticket, choice.cost, reason, self.judge(choice.ticket))

    def family(self, order: Order | None = None, *, step: int | None = None) -> Family:
        """Return the closed tickets of an order, ranked as at the end or as at a checkpoint.

        Raises:
            ValueError: The run left no scores.
            FileNotFoundError: No checkpoint of this step was kept.
        """
        key = order or self.order, None if step == self.path.step else step
        if key not in self._families:
            self._families[key] = self._family(*key)
        return self._families[key]

    def _family(self, order: Order, step: int | None) -> Family:
        if step is None:
            return self.path.family(self.model, example_inputs=self.example, order=order)
        scores = self._scores_at(step)
        entries = {n: e.masked_fill(e > step, NEVER) for n, e in self.path.entry().items()}
        return Family(
            order_keys(order, scores, entries),
            self.path.specs,
            self.path.units,
            model=self.model,
            example_inputs=self.example,
            relative=order == "relative",
            origin={"kind": "budget", "order": order, "step": step},
        )

    def members(self, order: Order | None = None) -> list[Drawn]:
        """Return tickets of about a dozen densities, for a table of the family.

        Raises:
            ValueError: The run left no scores.
        """
        family, found = self.family(order), {}
        for density in LISTED:
            least = family.measure("density")(family.smallest)
            choice = family.choose("density", max(density, least))
            found[choice.count] = choice
        return [
            Drawn(choice.ticket, choice.cost, choice.reason, self.judge(choice.ticket))
            for choice in found.values()
        ]

    def judge(self, ticket: Ticket) -> float | None:
        """Return the validation accuracy of W on a ticket, where it can be known."""
        if self._missing is not None or not self.run.model.is_file():
            return None
        return accuracy(masked(self.model, ticket, self.data.train), self.data.validation)

    def _choice(self, family: Family, quantity: str, limit: float) -> Choice:
        if quantity == "latency_ms":
            return choose_by_latency(family, self.model, limit, example_inputs=self.example)
        if quantity != "max_drop":
            return family.choose(next(q for q in QUANTITIES if q == quantity), limit)
        if self._missing is not None:
            raise self._missing
        dense = accuracy(self.model, self.data.validation)
        return choose_by_drop(family, lambda t: self.judge(t) or 0.0, limit, dense=dense)

    def _moment(self, wish: Wish) -> tuple[int | None, str]:
        """The step of a wish, and how it was found."""
        if wish.step is not None:
            if wish.step > self.path.step:
                raise ValueError(
                    f"step={wish.step} is not on this path, which ends at step {self.path.step}"
                )
            return wish.step, f"step {wish.step}"
        if wish.epoch is not None:
            return self._step_of(wish.epoch), f"epoch {wish.epoch:g}"
        if not wish.early:
            return None, ""
        options = {} if self.recipe.stop is None else self.recipe.stop.model_dump()
        found = settled(self.path, **options)
        if found is None:
            raise ValueError(f"this path never settled ({why_not(self.path, **options)})")
        why = (
            f"the first point at which the path had settled: over the window its support moved "
            f"by {100 * found.distance:.2g} % and its ticket gained {100 * found.gain:.2g} points"
        )
        return found.step, why

    def _step_of(self, epoch: float) -> int:
        """The step at which an epoch was over, as the points of the path tell."""
        told = [(p.step, p.metrics["epoch"]) for p in self.path.points if p.metrics.get("epoch")]
        if not told:
            raise ValueError("this path does not tell its epochs: choose by --step")
        if not 0 < epoch <= told[-1][1] + 1e-9:
            raise ValueError(
                f"epoch={epoch:g} is not on this path, which ends at epoch {told[-1][1]:g}"
            )
        return round(epoch * told[-1][0] / float(told[-1][1]))

    def _entered(self, step: int, why: str, *, early: bool) -> Drawn:
        """The ticket of a moment alone."""
        chosen = self.path.support(step=step) if early else self.path.ticket(step=step)
        if not chosen.kept_elements:
            raise ValueError(f"nothing had entered the support by {why}: take a later moment")
        graph = read_graph(self.model, self.example)
        ticket = close_on(graph, chosen)
        empty = [name for name, share in ticket.densities().items() if name in chosen and not share]
        if empty:
            warnings.warn(
                f"nothing is left of {', '.join(empty)}: take a later moment, or a budget, which "
                f"lets no layer die",
                stacklevel=2,
            )
        what = "what was in the support at" if early else "all that had entered by"
        cost = CostModel(graph, self.model).of(ticket)
        return Drawn(ticket, cost, f"{what} {why}", self.judge(ticket))

    def _scores_at(self, step: int) -> Scores:
        """The scores of the blocks when a checkpoint was saved."""
        if self._missing is not None:
            raise self._missing
        if self.recipe.grow is not None:
            raise ValueError(
                f"{self.run.folder} grew, and its checkpoints have other widths than its end: "
                f"choose by a budget at the end, or by step, epoch or --early alone"
            )
        with engine_for(device="cpu") as engine:
            checkpoint = Checkpoints(self.run.checkpoints, engine, keep=1).at(step)
            if checkpoint.facts["listed"] is not None:
                raise ValueError(
                    f"{checkpoint.folder} is a checkpoint of fsdp2, which is not read here: choose "
                    f"by a budget at the end, or by step, epoch or --early alone"
                )
            setting = prepare(self.recipe, engine, data_root=self._root, start=self._start)
            model, optimizer = setting.model, setting.optimizer
            tensors = checkpoint.tensors(lambda listed: templates(model, optimizer, listed))
            restore(model, optimizer, tensors)
            if setting.steering is not None and "steering" in checkpoint.facts:
                setting.steering.load_state_dict(checkpoint.facts["steering"])  # lambda
            return block_scores(optimizer)


def _data_or_shape(recipe: Recipe, root: str | None) -> tuple[Data, Exception | None]:
    """The data of a recipe, or samples made up in its shape and why it is not there.

    Raises:
        RecipeError: The recipe does not fit its data.
    """
    try:
        return data_of(recipe, root=root), None
    except RecipeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        return shape_of(recipe), error


def shape_of(recipe: Recipe) -> Data:
    """Return samples made up in the shape of a recipe's data, which is not looked at.

    Raises:
        ValueError: The shape is known to the data alone, as that of a folder of images.
    """
    name = recipe.data if recipe.data.startswith("generated:") else f"generated:{recipe.data}"
    return data_of(recipe.model_copy(update={"data": name, "validation": 1}), root=None)


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    options = [f"--{name.replace('_', '-')}" for name in names]
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} and {options[-1]}"
