# SPDX-License-Identifier: Apache-2.0
"""Graph: what hangs together in a model, read from its exported program.

``program`` reads the operations, ``labels`` travel through them, ``walking`` asks one small rule
per operation (``layers``, ``elementwise``, ``movement``, ``reductions``, ``contraction``; add yours
with :func:`rule`), ``reader`` is what a rule works with, ``units`` makes a plain value of it.
"""

from dessilbi.graph import contraction, elementwise, layers, movement, reductions
from dessilbi.graph.coupling import Coupling, couplings, filters, why_alone
from dessilbi.graph.reader import Known, Reader, Weight, rule
from dessilbi.graph.units import Graph, Member, Unit, read_graph

__all__ = [
    "Coupling",
    "Graph",
    "Known",
    "Member",
    "Reader",
    "Unit",
    "Weight",
    "couplings",
    "filters",
    "read_graph",
    "rule",
    "why_alone",
]

_RULES = (contraction, elementwise, layers, movement, reductions)  # imported for their rules
