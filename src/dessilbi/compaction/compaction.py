# SPDX-License-Identifier: Apache-2.0
"""Compaction: a closed ticket becomes a smaller, ordinary model that computes the same function.

The cut is applied to the Python modules where ``forward`` follows the new sizes; otherwise the
exported program is rewritten. Either way the result is certified in float64, or refused.
"""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import fx, nn

from dessilbi.blocks.naming import unwrap
from dessilbi.blocks.ticket import Ticket
from dessilbi.compaction.adapting import Rewriter
from dessilbi.compaction.blueprint import FORMS, Blueprint, Form, Size, tensors_of
from dessilbi.compaction.candidates import Candidate, candidate, narrow
from dessilbi.compaction.certifying import (
    Reference,
    SilentError,
    find_reference,
    find_references,
    left_out,
    outputs,
    probes_of,
    wide,
)
from dessilbi.compaction.comparing import compare, difference, rounding
from dessilbi.compaction.folding import constants_of
from dessilbi.compaction.following import Scheduler, adopt, check_follows, follow
from dessilbi.compaction.guarding import guard, inputs_note
from dessilbi.compaction.proving import Proof, check_finite, measure_latency
from dessilbi.compaction.rehearsing import check_trains
from dessilbi.compaction.rewriting import place_tensors, sharing_copy, wide_literals, widen
from dessilbi.compaction.sizing import needed, told
from dessilbi.compaction.witness import Witness
from dessilbi.cuts.closing import Settled, close, close_on, dead_blocks, settle, units_of
from dessilbi.cuts.counting import count_macs, repeated, runnable
from dessilbi.cuts.cutting import Cuts, cut_ticket, find_cuts
from dessilbi.graph import Graph, read_graph
from dessilbi.graph.inputs import Arguments, describe
from dessilbi.graph.program import ExampleInputs, evaluating

TOLERANCE = 1e-9  # of the float64 certificate; exact compactions reach 1e-15

__all__ = ["Compacted", "close", "compact"]


@dataclass(frozen=True)
class Compacted:
    """A smaller model, the proof that it computes the same, and what was cut.

    ``ticket`` says what is dead in the smaller model (single dead entries, blocks kept as zeros).
    It is enforced on ``optimizer``; enforce it yourself on any other, also after loading.
    ``closed`` is the ticket it was cut by, ``blueprint`` makes the same cut on a fresh model, and
    ``witness`` holds answers of the masked model: what :func:`save_compact` needs.

    >>> from dessilbi.testing import random_ticket
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    >>> ticket = random_ticket(net, example_inputs=x, density=0.5)
    >>> small = compact(net, ticket, example_inputs=x)
    >>> small.proof.form, small.cuts["0.weight"][0].size, small.model[0].out_features
    ('module', 8, 4)
    """

    model: nn.Module
    proof: Proof
    optimizer: torch.optim.Optimizer | None
    blueprint: Blueprint
    ticket: Ticket
    closed: Ticket
    witness: Witness

    def __repr__(self) -> str:
        """The model's class and the proof; the tensors behind them are long."""
        return f"Compacted({type(self.model).__name__})\n{self.proof}"

    @property
    def cuts(self) -> Cuts:
        """Kept indices of every tensor that was cut."""
        return self.blueprint.cuts

    def follow(self, scheduler: Scheduler) -> Scheduler:
        """Return a copy of a learning-rate scheduler that goes on with ``optimizer``.

        Call it before the scheduler's next step; the one given still drives the old optimizer.

        Raises:
            ValueError: No optimizer was given to :func:`compact`, or the scheduler drives another.
        """
        if self.optimizer is None:
            raise ValueError(
                "no optimizer went along: call compact(..., optimizer=...) with the scheduler's"
            )
        return adopt(scheduler, self.optimizer)


def compact(
    model: nn.Module,
    ticket: Ticket,
    *,
    example_inputs: ExampleInputs,
    optimizer: torch.optim.Optimizer | None = None,
    multiple_of: int = 1,
    latency_repeats: int = 0,
) -> Compacted:
    """Remove what a closed ticket declares dead.

    ``compact(m, t).model(x)`` equals ``t.apply_(copy(m))(x)`` in eval mode.

    Args:
        model: The model; it is not changed.
        ticket: A closed ticket of it.
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.
        optimizer: The optimizer that trains the model, to go on with the smaller one: the result's
            ``optimizer`` continues as this one would under ``ticket.enforce``, with state, groups,
            options and hooks (docs/continuing.md). This one still trains the original.
        multiple_of: Round widths up to a multiple, for hardware, where the layer is wide enough.
        latency_repeats: Measure latency with so many runs (0: not at all).

    Returns:
        The new model, the proof, the optimizer that goes on (if one was given), the kept indices
        of every tensor that was cut, and the ticket in the new shapes.

    Raises:
        ValueError: The ticket is of another model or not closed, the model cannot be read, has
            NaN weights, no exact compaction was found, or the optimizer cannot follow; with it,
            also a model whose forward in training does not follow.

    >>> from dessilbi.blocks.ticket import TensorSpec
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> spec = TensorSpec(shape=(3, 4), block=(1, None))
    >>> ticket = Ticket({"0.weight": torch.tensor([[True], [False], [True]])}, {"0.weight": spec})
    >>> x = torch.randn(2, 4)
    >>> compact(net, close(ticket, net, example_inputs=x), example_inputs=x).model[0]
    Linear(in_features=4, out_features=2, bias=True)
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}: give a whole number >= 1")
    model = unwrap(model)
    ticket.density_of_model(model)  # checks names and shapes
    check_finite(model)
    describe(example_inputs)  # checks their values
    graph = read_graph(model, example_inputs)
    if close_on(graph, ticket) != ticket:
        raise ValueError(
            "this ticket is not closed, so dead blocks still act through biases and norms: "
            "call close(ticket, model, example_inputs=...) first"
        )
    closed = _explicit(ticket.apply_(copy.deepcopy(model)))
    job = _Job(
        model, closed, graph, ticket, example_inputs, multiple_of, latency_repeats, optimizer
    )
    try:
        references = find_references(closed, ticket, example_inputs)
    except SilentError:
        raise
    except Exception:  # forward does not run in float64
        return _compacted(job, [job.program_reference()])
    try:
        return _compacted(job, references)
    except _NearMissError:  # forward casts to a narrower type in between
        return _compacted(job, [job.program_reference()])


def _explicit(model: nn.Module) -> nn.Module:
    """Write out the eps that RMSNorm takes from the type, because the proof changes the type."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            dtype = torch.float32 if module.weight is None else module.weight.dtype
            module.eps = torch.finfo(dtype).eps
    return model


@dataclass(frozen=True)
class _Job:
    model: nn.Module
    closed: nn.Module
    graph: Graph
    ticket: Ticket
    example_inputs: ExampleInputs
    multiple_of: int
    latency_repeats: int
    optimizer: torch.optim.Optimizer | None

    def program_reference(self) -> Reference:
        """The program in float64, for a module that computes in a narrower type."""
        program = sharing_copy(self.graph.reading.program.module)
        model = copy.deepcopy(self.closed).double()
        place_tensors(program, self.graph, tensors_of(model))
        try:
            return find_reference(model, self.example_inputs, widen(program))
        except SilentError:
            raise
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be run in float64 to certify its compaction "
                f"({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from None


class _NearMissError(ValueError):
    """No form is exact, but one runs: where forward rounds in between, that may be all."""


def _compacted(job: _Job, references: list[Reference]) -> Compacted:
    """Build candidates until one is exact."""
    graph, dead = job.graph, dead_blocks(job.graph, job.ticket)
    args, kwargs = wide(probes_of(job.example_inputs)[0])
    inputs = (*args, *kwargs.values())
    constants = [constants_of(graph, dead, tensors_of(r.model), inputs) for r in references]
    settled = settle(graph, dead, multiple_of=job.multiple_of, constants=constants)
    if job.optimizer is not None:
        check_follows(job.optimizer, job.model, find_cuts(graph, settled.gone))
    candidates = [
        candidate(graph, settled.gone, reference, found)
        for reference, found in zip(references, constants, strict=True)
    ]
    trial = _Trial(candidates)
    # The program is exported in evaluation mode: not for training.
    for form in [f for f in FORMS if job.optimizer is None or f != "program"]:
        sizes: tuple[Size, ...] | None = ()
        if form == "sized module":
            sizes = needed(candidates[0].offered(), partial(trial.exact, form))
        if sizes is not None and trial.exact(form, sizes):
            worst = trial.worst(form, sizes)
            return _finish(job, settled, candidates[0], form, worst, sizes)
    reasons, best = trial.reasons.values(), min(trial.found.values())
    near = best < float("inf") and references[0].runner is None
    if job.optimizer is not None and not near:
        raise ValueError(
            f"{type(job.model).__name__} cannot be compacted to go on training, because its "
            f"forward holds sizes ({'; '.join(reasons)}); compute them from the weights, or "
            f"compact without optimizer=, which may give its exported program for inference"
        )
    raise (_NearMissError if near else ValueError)(
        f"no exact compaction of {type(job.closed).__name__} was found ({'; '.join(reasons)}); "
        f"leave the units concerned alive or report the model{_randomness(references[0])}"
    )


class _Trial:
    """Candidates in their forms, each built and certified once."""

    def __init__(self, candidates: list[Candidate]):
        self.candidates = candidates
        self.found: dict[tuple[Form, tuple[Size, ...]], float] = {}
        self.reasons: dict[Form, str] = {}

    def exact(self, form: Form, sizes: tuple[Size, ...]) -> bool:
        return self.worst(form, sizes) <= TOLERANCE

    def worst(self, form: Form, sizes: tuple[Size, ...]) -> float:
        """Return the largest relative difference of a form; infinite where it does not run."""
        if (form, sizes) not in self.found:
            try:
                worst = max(c.reference.certify(c.build(form, sizes)) for c in self.candidates)
                self.reasons[form] = f"{form}: relative difference {worst:.2g}"
            except Exception as error:  # forward may break in any way once sizes change
                worst = float("inf")
                told = str(error).splitlines()[0] if str(error) else repr(error)
                self.reasons[form] = f"{form}: {told}"
            self.found[form, sizes] = worst
        return self.found[form, sizes]


def _randomness(reference: Reference) -> str:
    """Say so if the model itself gives different results for the same input."""
    again = outputs(reference.runner or reference.model, reference.probes[:1])
    differs = difference(again, reference.expected[:1]) > 0
    return " (its output is random or changes from call to call)" if differs else ""


def _finish(
    job: _Job,
    settled: Settled,
    found: Candidate,
    form: Form,
    worst: float,
    sizes: tuple[Size, ...],
) -> Compacted:
    """Bring the exact candidate back to the model's types and write the proof."""
    probe = wide(probes_of(job.example_inputs)[0])
    small = found.rewriter.module if form == "program" else found.build(form, sizes)
    macs = _macs_after(job.graph, found, small, probe)
    small = narrow(small, {name: t.dtype for name, t in tensors_of(job.closed).items()})
    notes = told(sizes, found.offered()) if sizes else []
    if isinstance(small, fx.GraphModule) and form == "program":
        small = guard(small)
        notes = [*found.rewriter.forced, *inputs_note(small)]
    proof = _proof(job, settled, small, macs, worst, form, found, notes)
    ticket, optimizer = cut_ticket(job.ticket, found.cuts), job.optimizer
    if optimizer is not None:
        check_trains(job.model, small, job.example_inputs)
        optimizer = follow(optimizer, job.model, small, found.cuts, ticket)
    witness = Witness.of(found.reference, job.example_inputs)
    blueprint = found.blueprint(form, sizes)
    return Compacted(small, proof, optimizer, blueprint, ticket, job.ticket, witness)


def _macs_after(graph: Graph, found: Candidate, small: nn.Module, probe: Arguments) -> int:
    """Return the MACs of one sample, by the program where it could be rewritten."""
    batch = graph.reading.batch
    with wide_literals():
        program = found.build("program") if isinstance(found.rewritten, Rewriter) else None
        return count_macs(program or small, repeated(probe, batch), batch)


def _proof(
    job: _Job,
    settled: Settled,
    small: nn.Module,
    macs: int,
    worst: float,
    form: Form,
    found: Candidate,
    notes: list[str],
) -> Proof:
    closed, graph = job.closed, job.graph
    known = dict(enumerate(probes_of(job.example_inputs)))
    probes = [known[number] for number in found.reference.numbers if number in known]
    gap = compare(outputs(closed, probes), outputs(small, probes), exact=False)
    if not gap.within(rounding):
        raise ValueError(
            f"the compacted {type(closed).__name__} is exact in float64 but differs by "
            f"{gap.largest:.2g} in its own type; compact it in float32 or float64"
        )
    notes += gap.notes() + left_out(closed, probes[0])
    batch = graph.reading.batch
    timed = [_latency(each, probes[0], job.latency_repeats) for each in (closed, small)]
    before, after = (_size(each) for each in (closed, small))
    types = {name: tensor.dtype for name, tensor in tensors_of(closed).items()}
    sparse = found.sparse_bytes(job.ticket, types)
    if not settled.gone.any():
        notes.append("no tensor gets smaller: no whole unit is dead that could be removed")
    if job.optimizer is not None and found.moved:
        notes.append(
            "training goes on from the same function, not in the same steps: constants or the "
            f"size of an RMSNorm went into {', '.join(found.moved)}"
        )
    if sparse < after[1]:
        notes.append(
            "dead weights inside living units stay as zeros: only sparse storage saves them"
        )
    return Proof(
        params_before=before[0],
        params_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        macs_before=count_macs(runnable(graph.reading.program), repeated(probes[0], batch), batch),
        macs_after=macs,
        max_abs_diff=gap.largest,
        relative_diff=worst,
        probes=len(probes),
        dead=int(settled.dead.sum()),
        removed=int(settled.gone.sum()),
        revived={k: len(v) for k, v in job.ticket.origin.get("revived", {}).items()},
        kept_zero=units_of(graph, np.asarray(settled.kept)),
        form=form,
        sparse_bytes=sparse,
        notes=tuple(notes),
        rounded=units_of(graph, np.asarray(settled.rounded)),
        latency_ms_before=timed[0],
        latency_ms_after=timed[1],
    )


def _latency(model: nn.Module, arguments: Arguments, repeats: int) -> tuple[float, float] | None:
    if not repeats:
        return None
    with evaluating(model):
        return measure_latency(model, arguments, repeats)


def _size(model: nn.Module) -> tuple[int, int]:
    tensors = [*model.parameters(), *model.buffers()]
    count = sum(p.numel() for p in model.parameters())
    return count, sum(t.numel() * t.element_size() for t in tensors)
