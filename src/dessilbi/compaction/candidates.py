# SPDX-License-Identifier: Apache-2.0
"""Candidates: one smaller model in the forms it can take, before it is known which are exact.

``"module"`` cuts the Python modules, ``"sized module"`` also writes new sizes into attributes that
``forward`` reads, ``"program"`` is the exported program, rewritten.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dessilbi.blocks.naming import bias_name, tensor_names
from dessilbi.blocks.ticket import Ticket
from dessilbi.compaction.adapting import Rewriter
from dessilbi.compaction.blueprint import Blueprint, Form, Size, find_sizes, set_sizes, tensors_of
from dessilbi.compaction.certifying import Reference
from dessilbi.compaction.folding import fold
from dessilbi.compaction.proving import sparse_bytes
from dessilbi.compaction.rewriting import rewrite, sharing_copy, widen
from dessilbi.cuts.closing import Constants, Flags
from dessilbi.cuts.cutting import Cut, Cuts, cut_module, cut_tensor, find_cuts
from dessilbi.graph import Graph


@dataclass(frozen=True)
class Candidate:
    """Everything that is needed to build one smaller float64 model in its different forms."""

    reference: Reference
    folded: Mapping[str, Tensor]
    moved: tuple[str, ...]  # tensors that folding changed or added
    cuts: Cuts
    rewritten: Rewriter | ValueError

    @property
    def rewriter(self) -> Rewriter:
        """The rewritten program; raises why there is none."""
        if isinstance(self.rewritten, ValueError):
            raise self.rewritten
        return self.rewritten

    def offered(self) -> tuple[Size, ...]:
        """Return the attributes that equal an old size, and may hold it."""
        if isinstance(self.rewritten, ValueError) or not self.rewritten.resized:
            return ()
        try:
            small = cut_module(self.reference.model, self.cuts, self.folded)
        except Exception:  # then neither form of the module can be built
            return ()
        return find_sizes(small, self.rewritten.resized)

    def build(self, form: Form, sizes: Sequence[Size] = ()) -> nn.Module:
        """Return the float64 candidate, with ``sizes`` for a sized module."""
        if form == "program":
            return widen(sharing_copy(self.rewriter.module))
        return set_sizes(cut_module(self.reference.model, self.cuts, self.folded), sizes)

    def blueprint(self, form: Form, sizes: tuple[Size, ...] = ()) -> Blueprint:
        """Return what makes this form from a fresh model."""
        before = tensors_of(self.reference.model)
        added = tuple(name for name in self.folded if name not in before)
        return Blueprint(form, self.cuts, added, sizes, folded=bool(self.moved))

    def sparse_bytes(self, ticket: Ticket, types: Mapping[str, torch.dtype]) -> int:
        """Return the bytes of the smaller model where dead elements are not stored."""
        cut = {name: cut_tensor(t, self.cuts.get(name, ())) for name, t in self.folded.items()}
        small = {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in cut.items()}
        alive = {n: cut_tensor(ticket.mask_of(n), self.cuts.get(n, ())) for n in ticket}
        return sparse_bytes(small, alive)


def candidate(graph: Graph, gone: Flags, reference: Reference, constants: Constants) -> Candidate:
    """Cut the tensors of ``reference`` and rewrite its program.

    Args:
        graph: The graph of the model.
        gone: Blocks to remove.
        reference: The float64 model and what it computes.
        constants: What consumers read from dead blocks of the reference.
    """
    tensors = tensors_of(reference.model)
    folded = fold(graph, gone, constants, tensors)
    moved = tuple(name for name, tensor in folded.items() if tensor is not tensors.get(name))
    cuts = _with_biases(find_cuts(graph, gone), folded, tensors)
    try:
        rewritten: Rewriter | ValueError = rewrite(graph, gone, cuts, folded)
    except ValueError as error:  # the module may still follow
        rewritten = error
    return Candidate(reference, folded, moved, cuts, rewritten)


def _with_biases(
    cuts: dict[str, tuple[Cut, ...]], folded: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, tuple[Cut, ...]]:
    """A bias that folding added loses the same rows as its weight."""
    for name in [n for n in cuts if bias_name(n) in folded and bias_name(n) not in before]:
        rows = [c for c in cuts[name] if c.dim == 0]
        if rows:
            cuts[bias_name(name)] = (Cut(bias_name(name), 0, rows[0].size, rows[0].index),)
    return cuts


def narrow(model: nn.Module, types: Mapping[str, torch.dtype]) -> nn.Module:
    """Give every tensor the type it had; added biases take that of their weight."""
    done: dict[int, Tensor] = {}
    default = next((t for t in types.values() if t.is_floating_point), torch.float32)
    canonical = tensor_names(model)
    for prefix, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                name = canonical[f"{prefix}.{key}" if prefix else key]
                if id(tensor) not in done:
                    new = tensor.detach().to(types.get(name, default))
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    done[id(tensor)] = new
                own[key] = done[id(tensor)]
    return model
