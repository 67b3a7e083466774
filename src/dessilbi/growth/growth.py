# SPDX-License-Identifier: Apache-2.0
"""Growth: units of a model get wider while the function it computes stays the same.

New blocks start with the layer's own initialisation and are not read yet: the weights of those who
will read them are 0. So the answers are as before, and the gradient can use the new blocks from the
first step on. It is the mirror image of compaction and shares its rooms.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dessilbi.blocks.naming import unwrap
from dessilbi.blocks.ticket import Ticket
from dessilbi.compaction.certifying import (
    Reference,
    SilentError,
    find_references,
    left_out,
    outputs,
    probes_of,
)
from dessilbi.compaction.comparing import compare
from dessilbi.compaction.following import Scheduler, adopt, check_grows, follow
from dessilbi.compaction.proving import check_finite
from dessilbi.cuts.counting import count_macs
from dessilbi.graph import Graph, read_graph
from dessilbi.graph.inputs import Arguments
from dessilbi.graph.program import ExampleInputs, evaluating
from dessilbi.growth.planting import Init, Plant, built, stiff
from dessilbi.growth.widening import Change, Sizes, find_change, takes_of, widths_of
from dessilbi.optimizers.dual import named_members
from dessilbi.path.path import Path

TOLERANCE = 1e-9  # of the float64 certificate; exact growth reaches 1e-15


@dataclass(frozen=True)
class GrowthProof:
    """What growth did, in numbers.

    ``max_abs_diff`` is max |difference| of the outputs over all probes in the model's own type,
    ``max_relative_diff`` the largest relative to the size of an element, or to four times what is
    typical of its output. ``relative_diff`` is the certificate in float64: every element over how
    much it varies with the input, see ``compaction/comparing.py``; None where the model does not
    run in float64 or its output does not vary. ``grown`` says unit -> blocks before and after.
    MACs are those of one sample.
    """

    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    max_abs_diff: float
    max_relative_diff: float
    relative_diff: float | None
    probes: int
    grown: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A small table."""
        rows = [
            ("parameters", self.params_before, self.params_after),
            ("MACs", self.macs_before, self.macs_after),
            *((name, *widths) for name, widths in self.grown.items()),
        ]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{name:<{width}}{before:>18,}{after:>18,}" for name, before, after in rows]
        lines.append(f"max |difference| {self.max_abs_diff:.3g} on {self.probes} probes")
        told = "not certified" if self.relative_diff is None else f"{self.relative_diff:.3g}"
        return "\n".join([*lines, f"relative, float64 {told}", *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"notes": list(self.notes)}


@dataclass(frozen=True)
class Grown:
    """A wider model, the optimizer that goes on with it, and the proof that nothing else changed.

    ``sizes`` are the widths of all units now, ``change`` says where the new entries are.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> grown = grow(net, {"0": 5}, example_inputs=torch.randn(2, 4))
    >>> grown.sizes, grown.model[0].out_features
    ({'0.weight': 5}, 5)
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    proof: GrowthProof
    sizes: Mapping[str, int]
    change: Change

    def follow(self, scheduler: Scheduler) -> Scheduler:
        """Return a copy of a learning-rate scheduler that goes on with ``optimizer``.

        Call it before the scheduler's next step; the one given still drives the old optimizer.

        Raises:
            ValueError: No optimizer was given to :func:`grow`, or the scheduler drives another.
        """
        return adopt(scheduler, self._optimizer("scheduler"))

    def follow_path(self, path: Path) -> Path:
        """Let a path watch ``optimizer`` from now on, and return it.

        Steps, path time and first entries go on; new blocks are noted with the step of their birth
        (``path.history.births``). It no longer watches the old optimizer.

        Raises:
            ValueError: No optimizer was given to :func:`grow`, or the path watches another.
        """
        path.move(self._optimizer("path"), takes_of(path.history.specs, self.change.cuts))
        return path

    def _optimizer(self, what: str) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise ValueError(
                f"no optimizer went along: call grow(..., optimizer=...) with the {what}'s"
            )
        return self.optimizer


def grow(
    model: nn.Module,
    sizes: Sizes,
    *,
    example_inputs: ExampleInputs,
    optimizer: torch.optim.Optimizer | None = None,
    fresh: bool = False,
    init: Init | None = None,
    seed: int | None = None,
) -> Grown:
    """Widen units of a model; what hangs together gets wider together.

    Args:
        model: The model; it is not changed.
        sizes: Unit or layer -> new width in blocks (filters, neurons, heads), not below the old.
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.
        optimizer: The optimizer that trains the model, to go on with the wider one: V and momentum
            of new entries are 0, all else goes on. This one still trains the original.
        fresh: Also draw the weights that read new blocks, as a fresh model would; the function is
            then another. By default they are 0.
        init: Called with a copy of each layer that changes, after its own ``reset_parameters``, to
            draw values for the new blocks.
        seed: Decides these values alone, and leaves the global random state as it was; without it
            they are drawn as PyTorch always does.

    Returns:
        The wider model, the optimizer that goes on (if one was given) and the proof.

    Raises:
        ValueError: A name is unknown or has no width that can change, a width is below the old one
            or makes groups uneven, the model cannot be read, the optimizer cannot follow, or the
            function would change.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> wider = grow(net, {"0": 5}, example_inputs=torch.randn(2, 4)).model
    >>> wider[2]
    Linear(in_features=5, out_features=2, bias=True)
    >>> int(wider[2].weight.count_nonzero())
    6
    """
    model = unwrap(model)
    check_finite(model)
    graph = read_graph(model, example_inputs)
    return grow_on(
        graph,
        model,
        find_change(graph, sizes),
        example_inputs=example_inputs,
        optimizer=optimizer,
        plant=Plant(fresh, init, seed),
    )


def grow_on(
    graph: Graph,
    model: nn.Module,
    change: Change,
    *,
    example_inputs: ExampleInputs,
    optimizer: torch.optim.Optimizer | None,
    plant: Plant,
) -> Grown:
    """Do what :func:`grow` says, on a graph that is already read."""
    if optimizer is not None:
        check_grows(optimizer, model, change.cuts)
        members = named_members(optimizer) if _has_structure(optimizer) else ()
        takes_of({member.name: member.spec for member in members}, change.cuts)  # none is torn
    references, notes = _references(model, example_inputs)
    try:
        others = [built(each.model, change, plant) for each in references]
        worst = max(
            (each.certify(other) for each, other in zip(references, others, strict=True)),
            default=None,
        )
        wide = built(model, change, plant)
        proof = _proof(model, wide, change, example_inputs, worst, notes)
    except (RuntimeError, TypeError, LookupError) as error:  # forward holds sizes
        raise stiff(model, change, error) from None
    if not plant.fresh:
        _check(model, proof, change)
    if optimizer is not None:
        optimizer = follow(optimizer, model, wide, change.cuts, None, born=change.born)
    after = {name: new for name, (_, new) in change.widths.items()}
    return Grown(wide, optimizer, proof, widths_of(graph) | after, change)


def _has_structure(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("structure") is not None for group in optimizer.param_groups)


def _references(
    model: nn.Module, example_inputs: ExampleInputs
) -> tuple[list[Reference], tuple[str, ...]]:
    try:
        return find_references(model, Ticket({}, {}), example_inputs), ()
    except SilentError:
        return [], ("the output does not vary with the input, so little could be compared",)
    except Exception:  # forward does not run in float64
        return [], ("the model does not run in float64: compared in its own type alone",)


def _few(names: Iterable[str]) -> str:
    told = list(names)
    return ", ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")


def _check(model: nn.Module, proof: GrowthProof, change: Change) -> None:
    """Refuse growth that changes the function."""
    exact = proof.relative_diff is None or proof.relative_diff <= TOLERANCE
    if not exact or not proof.max_relative_diff <= 1e-3:
        found = proof.max_relative_diff if exact else proof.relative_diff
        raise ValueError(
            f"{type(model).__name__} computes something else once {_few(change.widths)} is wider "
            f"(relative difference {found:.2g}): something reads it without a weight, or rounding "
            f"is magnified; leave it as wide as it is, or accept that with fresh=True"
        )


def _proof(
    model: nn.Module,
    wide: nn.Module,
    change: Change,
    example_inputs: ExampleInputs,
    worst: float | None,
    notes: tuple[str, ...],
) -> GrowthProof:
    probes = probes_of(example_inputs)
    expected, found = _answers(model, wide, probes)
    gap = compare(expected, found, exact=False)
    return GrowthProof(
        params_before=sum(p.numel() for p in model.parameters()),
        params_after=sum(p.numel() for p in wide.parameters()),
        macs_before=macs_of(model, probes[0]),
        macs_after=macs_of(wide, probes[0]),
        max_abs_diff=gap.largest,
        max_relative_diff=gap.relative,
        relative_diff=worst,
        probes=len(expected),
        grown=dict(change.widths),
        notes=(*notes, *gap.notes(), *left_out(model, probes[0])),
    )


def _answers(
    model: nn.Module, wide: nn.Module, probes: list[Arguments]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return what both answer, without drawn probes that the model itself cannot take."""
    expected, found = outputs(model, probes[:1]), outputs(wide, probes[:1])
    for probe in probes[1:]:
        if told := _tried(model, probe):
            expected, found = expected + told, found + outputs(wide, [probe])
    return expected, found


def _tried(model: nn.Module, probe: Arguments) -> list[list[Tensor]]:
    try:
        return outputs(model, [probe])
    except Exception:  # a number out of range, sizes that do not agree
        return []


def macs_of(model: nn.Module, arguments: Arguments) -> int:
    """Return the multiply-accumulates of one sample."""
    args, kwargs = arguments
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()]
    with evaluating(model):
        return count_macs(model, arguments, samples=max(1, len(tensors[0])) if tensors else 1)
