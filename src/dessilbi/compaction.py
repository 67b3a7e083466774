# SPDX-License-Identifier: Apache-2.0
"""Compaction: a closed ticket becomes a smaller, ordinary model that computes the same function.

The cut is applied to the Python modules where ``forward`` follows the new sizes; otherwise the
exported program is rewritten. Either way the result is certified in float64, or refused.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.closing import Settled, close, close_on, dead_blocks, settle, units_of
from dessilbi.cutting import Cut, Cuts, cut_module, find_cuts
from dessilbi.folding import fold
from dessilbi.graph import Graph, read_graph
from dessilbi.graph.program import ExampleInputs, evaluating
from dessilbi.naming import canonical_name, unwrap
from dessilbi.proving import (
    Arguments,
    Proof,
    count_macs,
    difference,
    find_references,
    measure_latency,
    outputs,
    probes_of,
    wide,
)
from dessilbi.rewriting import Resized, Rewriter, bias_name, rewrite, widen
from dessilbi.ticket import Ticket

TOLERANCE = 1e-9  # of the float64 certificate; exact compactions reach 1e-15

__all__ = ["Compacted", "close", "compact"]


@dataclass(frozen=True)
class Compacted:
    """A smaller model, the proof that it computes the same, and what was cut."""

    model: nn.Module
    proof: Proof
    optimizer: torch.optim.Optimizer | None
    cuts: Cuts


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
        optimizer: Not followed yet.
        multiple_of: Round widths up to a multiple, for hardware.
        latency_repeats: Measure latency with so many runs (0: not at all).

    Returns:
        The new model, the proof, and the kept indices of every tensor that was cut.

    Raises:
        ValueError: The ticket is of another model or not closed, the model cannot be read, has
            NaN weights, or no exact compaction was found.

    >>> from dessilbi.ticket import TensorSpec
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> spec = TensorSpec(shape=(3, 4), block=(1, None))
    >>> ticket = Ticket({"0.weight": torch.tensor([[True], [False], [True]])}, {"0.weight": spec})
    >>> x = torch.randn(2, 4)
    >>> compact(net, close(ticket, net, example_inputs=x), example_inputs=x).model[0]
    Linear(in_features=4, out_features=2, bias=True)
    """
    if optimizer is not None:
        raise ValueError(
            "compact(optimizer=...) is not available yet: compact without it and give the new "
            "model a new optimizer"
        )
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}: give a whole number >= 1")
    model = unwrap(model)
    ticket.density_of_model(model)  # checks names and shapes
    _check_finite(model)
    graph = read_graph(model, example_inputs)
    if close_on(graph, ticket) != ticket:
        raise ValueError(
            "this ticket is not closed, so dead blocks still act through biases and norms: "
            "call close(ticket, model, example_inputs=...) first"
        )
    settled = settle(graph, dead_blocks(graph, ticket), multiple_of=multiple_of)
    closed = ticket.apply_(copy.deepcopy(model))
    return _certified(_Job(model, closed, graph, settled, example_inputs, latency_repeats, ticket))


def _check_finite(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that are not finite: restore a sound checkpoint")


@dataclass(frozen=True)
class _Job:
    model: nn.Module
    closed: nn.Module
    graph: Graph
    settled: Settled
    example_inputs: ExampleInputs
    latency_repeats: int
    ticket: Ticket


def _certified(job: _Job) -> Compacted:
    """Build candidates until one is exact."""
    references = find_references(job.closed, job.ticket, job.example_inputs)
    plan = [_plan(job, reference.model) for reference in references]
    types = {name: tensor.dtype for name, tensor in _tensors(job.closed).items()}
    reasons = []
    for form in ("module", "sized module", "program"):
        try:
            smaller = [p.build(form) for p in plan]
            if smaller[0] is None:
                continue
            worst = max(r.certify(s) for r, s in zip(references, smaller, strict=True) if s)
        except Exception as error:  # forward may break in any way once sizes change
            reasons.append(f"{form}: {str(error).splitlines()[0] if str(error) else error!r}")
            continue
        if worst <= TOLERANCE:
            notes = tuple(plan[0].rewritten.forced) if form == "program" else ()
            program = plan[0].rewritten.module
            small = _narrow(program if form == "program" else smaller[0], types)
            proof = _proof(job, small, program, worst, form, notes)
            return Compacted(small, proof, None, plan[0].cuts)
        reasons.append(f"{form}: relative difference {worst:.2g}")
    raise ValueError(
        f"no exact compaction of {type(job.model).__name__} was found ({'; '.join(reasons)}); "
        f"leave the units concerned alive or report the model"
    )


@dataclass(frozen=True)
class _Plan:
    """Everything that is needed to build one smaller model in its different forms."""

    model: nn.Module
    folded: Mapping[str, Tensor]
    cuts: Cuts
    rewritten: Rewriter

    def build(self, form: str) -> nn.Module | None:
        """Return the float64 candidate; None where the form would be the same as the last."""
        if form == "program":
            return widen(copy.deepcopy(self.rewritten.module))
        small = cut_module(_place(copy.deepcopy(self.model), self.folded), self.cuts)
        if form == "sized module" and not _set_sizes(small, self.rewritten.resized):
            return None
        return small


def _plan(job: _Job, reference: nn.Module) -> _Plan:
    tensors = _tensors(reference)
    gone = job.settled.gone
    args, kwargs = wide(probes_of(job.example_inputs)[0])
    folded = fold(job.graph, job.settled.dead, gone, tensors, (*args, *kwargs.values()))
    cuts = _with_biases(find_cuts(job.graph, gone), folded, tensors)
    return _Plan(reference, folded, cuts, rewrite(job.graph, gone, cuts, folded))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {canonical_name(name): tensor.detach() for name, tensor in named}


def _with_biases(
    cuts: dict[str, tuple[Cut, ...]], folded: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, tuple[Cut, ...]]:
    """A bias that folding added loses the same rows as its weight."""
    for name in [n for n in cuts if bias_name(n) in folded and bias_name(n) not in before]:
        rows = [c for c in cuts[name] if c.dim == 0]
        if rows:
            cuts[bias_name(name)] = (Cut(bias_name(name), 0, rows[0].size, rows[0].index),)
    return cuts


def _place(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Write tensors into a model in place, adding biases it did not have."""
    own = _tensors(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in own:
                own[name].copy_(tensor)
            else:
                owner, _, key = name.rpartition(".")
                setattr(model.get_submodule(owner), key, nn.Parameter(tensor.clone()))
    return model


def _narrow(model: nn.Module, types: Mapping[str, torch.dtype]) -> nn.Module:
    """Give every tensor the type it had; added biases take that of their weight."""
    done: dict[int, Tensor] = {}
    default = next((t for t in types.values() if t.is_floating_point), torch.float32)
    for prefix, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                name = canonical_name(f"{prefix}.{key}" if prefix else key)
                if id(tensor) not in done:
                    new = tensor.detach().to(types.get(name, default))
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    done[id(tensor)] = new
                own[key] = done[id(tensor)]
    return model


def _set_sizes(model: nn.Module, resized: list[Resized]) -> bool:
    """Write new sizes into the attributes that hold the old ones, where the program changed."""
    found = False
    before: dict[str, dict[str, Any]] = {}
    for change in resized:
        module = model.get_submodule(change.module)
        own = before.setdefault(change.module, dict(vars(module)))
        for key, value in own.items():
            if type(value) is int and value == change.old and not key.startswith("_"):
                setattr(module, key, change.new)
                found = True
    return found


def _proof(
    job: _Job,
    small: nn.Module,
    program: torch.fx.GraphModule,
    worst: float,
    form: str,
    notes: tuple[str, ...],
) -> Proof:
    closed, settled, graph = job.closed, job.settled, job.graph
    probes = probes_of(job.example_inputs)
    gap = difference(outputs(closed, probes), outputs(small, probes))
    if not isfinite(gap):
        raise ValueError(
            f"the compacted {type(job.model).__name__} is exact in float64 but not finite in its "
            f"own type; compact it in float32"
        )
    timed = [_latency(each, probes[0], job.latency_repeats) for each in (closed, small)]
    before, after = (_size(each) for each in (closed, small))
    return Proof(
        params_before=before[0],
        params_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        macs_before=count_macs(graph.reading.program.module, probes[0]),
        macs_after=count_macs(widen(copy.deepcopy(program)), wide(probes[0])),
        max_abs_diff=gap,
        relative_diff=worst,
        probes=len(probes),
        dead=int(settled.dead.sum()),
        removed=int(settled.gone.sum()),
        revived={k: len(v) for k, v in job.ticket.origin.get("revived", {}).items()},
        kept_zero=units_of(graph, np.asarray(settled.kept)),
        form="program" if form == "program" else "module",
        notes=notes,
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
