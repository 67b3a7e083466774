# SPDX-License-Identifier: Apache-2.0
"""Planning: the dry run of param_groups, before anything is trained."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from dessilbi.blocks.naming import canonical_names, unwrap
from dessilbi.blocks.structure import alias_of, extent, owners, resolve
from dessilbi.cuts.closing import settle
from dessilbi.cuts.costs import CostModel
from dessilbi.graph import Graph, Member, Unit, couplings, read_graph, why_alone
from dessilbi.graph.labels import Ids
from dessilbi.graph.program import ExampleInputs
from dessilbi.groups import Rules, groups_on
from dessilbi.planning.values import Plan, PlannedTensor, PlannedUnit, Removal

__all__ = ["Plan", "PlannedTensor", "PlannedUnit", "plan"]

Group = Mapping[str, Any]


def plan(
    model: nn.Module,
    rules: Rules | None = None,
    *,
    example_inputs: ExampleInputs,
    coupled: bool = True,
) -> Plan:
    """Say what training with param_groups can remove from a model, and what not and why.

    Args:
        model: The model; it is not changed.
        rules: Those of :func:`dessilbi.param_groups`.
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.
        coupled: Plan for ``param_groups(model, rules, example_inputs=...)``, or else for
            ``param_groups(model, rules)``.

    Returns:
        A plain value. Printed, it is a table of at most 80 columns.

    Raises:
        ValueError: As :func:`dessilbi.param_groups`.

    Warns:
        UserWarning: No unit can be removed as a whole.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> planned = plan(net, example_inputs=torch.ones(1, 1, 4, 4))
    >>> [(unit.name, unit.num_blocks, unit.parameters_per_block) for unit in planned.units]
    [('0.weight', 4, 18)]
    >>> planned.removable_parameters, planned.parameters  # all but the bias of the output
    (72, 74)
    """
    graph = read_graph(model, example_inputs)
    groups = groups_on(graph if coupled else None, model, rules)
    found = _plan(_Job(graph, unwrap(model), groups, coupled))
    if not found.removable_parameters:
        told = [f"{unit.name}: {unit.why}" for unit in found.units]
        told += [f"{name}: {why}" for name, why in graph.left_out.items()]
        warnings.warn(
            f"nothing in {found.model} can be removed by training with these groups "
            f"({told[0] if told else 'no layer of it was recognised'})",
            stacklevel=2,
        )
    return found


class _Job:
    """A graph, the groups planned on it, and what they have in common."""

    def __init__(
        self, graph: Graph, model: nn.Module, groups: Sequence[Group], coupled: bool
    ) -> None:
        self.graph, self.model, self.coupled = graph, model, coupled
        self.group_of = {name: group for group in groups for name, _ in group["params"]}
        self.couplings = couplings(graph)
        self.costs = CostModel(graph, model)
        self.dense = self.costs.dense
        self.writes = {member.name for unit in graph.units for member in unit.producers}
        self.follows = {member.name for unit in graph.units for member in unit.followers}

    def saved(self, blocks: Ids) -> tuple[int, int]:
        """Parameters and multiply-accumulates that go with these blocks."""
        rest = self.costs.after(np.isin(np.arange(self.graph.num_blocks), blocks))
        return self.dense.params - rest.params, self.dense.macs - rest.macs


def _plan(job: _Job) -> Plan:
    units = tuple(_unit(job, unit) for unit in job.graph.units)
    own = dict(job.model.named_parameters())
    sizes = dict(zip(canonical_names(list(own)), (p.numel() for p in own.values()), strict=True))
    whole = [u.blocks for u, p in zip(job.graph.units, units, strict=True) if p.removal == "whole"]
    parameters, macs = job.saved(np.concatenate([np.empty(0, np.int64), *whole]))
    tensors = tuple(_tensor(job, name, size) for name, size in sizes.items())
    return Plan(
        model=type(job.model).__name__,
        parameters=sum(sizes.values()),
        macs=job.dense.macs,
        removable_parameters=parameters,
        removable_macs=macs,
        structured_parameters=sum(t.size for t in tensors if t.structure is not None),
        units=units,
        tensors=tensors,
    )


def _unit(job: _Job, unit: Unit) -> PlannedUnit:
    removal, why = _removal(job, unit)
    parameters, macs = job.saved(unit.blocks)
    even = unit.blocks[[group[0] for group in job.graph.even_groups(unit)]]
    some_parameters, some_macs = job.saved(even)
    return PlannedUnit(
        name=unit.name,
        kind=unit.kind,
        removal=removal,
        why=why,
        num_blocks=unit.num_blocks,
        producers=_names(unit.producers),
        followers=_names(unit.followers),
        consumers=_names(unit.consumers),
        parameters=parameters,
        parameters_per_block=some_parameters // len(even),
        macs=macs,
        macs_per_block=some_macs // len(even),
        notes=_notes(job.graph, unit),
    )


def _names(members: Sequence[Member]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(member.name for member in members))


def _removal(job: _Job, unit: Unit) -> tuple[Removal, str]:
    """Whether the groups select a unit as a whole, and what stands in the way."""
    groups = [job.group_of[member.name] for member in unit.producers]
    bare = [m.name for m, g in zip(unit.producers, groups, strict=True) if g["structure"] is None]
    if bare:
        told = "it has no structure" if len(groups) == 1 else f"without structure: {_few(bare)}"
        return "never", f"{told}; {_remedy(job, unit)}"
    cuts = [_cut(job.graph, m, g) for m, g in zip(unit.producers, groups, strict=True)]
    first = next((i for i, cut in enumerate(cuts) if cut is not None), None)
    apart = [
        f"{member.name} ({group['structure']})"
        for i, (member, group) in enumerate(zip(unit.producers, groups, strict=True))
        if first is None or (i != first and not _joined(cuts[first], cuts[i], groups[first], group))
    ]
    if not apart:
        return "whole", ""
    told = (
        f"it has structure {groups[0]['structure']!r}"
        if len(groups) == 1
        else f"apart: {_few(apart)}"
    )
    return "apart", f"{told}; {_remedy(job, unit)}"


def _cut(graph: Graph, member: Member, group: Group) -> Ids | None:
    """The block of its structure that every block of the unit is, where it is exactly one."""
    shape = graph.shapes[member.name]
    block = resolve(group["structure"], shape, name=member.name)
    if any(block[d] not in (None, n) for d, n in enumerate(shape) if d != member.dim):
        return None
    length, size = block[member.dim], shape[member.dim]
    numbers = owners(length, size).numpy()[member.index]
    is_one = member.index.shape[1] == extent(length, size) and (numbers == numbers[:, :1]).all()
    return numbers[:, 0] if is_one else None


def _joined(one: Ids | None, two: Ids | None, first: Group, second: Group) -> bool:
    together = first.get("unit") is not None and first.get("unit") == second.get("unit")
    return together and one is not None and two is not None and np.array_equal(one, two)


def _remedy(job: _Job, unit: Unit) -> str:
    for member in unit.producers:
        if member.name not in job.couplings:
            return why_alone(job.graph, member.name)
    if len(unit.producers) == 1:
        whole = alias_of(job.couplings[unit.producers[0].name].structure)
        return f"structure {whole!r} selects it as a whole"
    return "structure 'unit' joins them" if job.coupled else "coupling joins them"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _notes(graph: Graph, unit: Unit) -> tuple[str, ...]:
    """Conditions under which dead blocks of a unit go."""
    found = []
    for even in graph.evens:
        touched = np.concatenate([even.inputs.ravel(), even.outputs.ravel()])
        if np.isin(unit.blocks, touched).any():
            count = len(even.outputs)
            found.append(f"as many must go from each of the {count} groups of {even.name}")
    for constant in graph.constants:
        if np.isin(unit.blocks, graph.axes[constant.axis][constant.columns]).any():
            name = constant.axis.name
            found.append(
                f"a dead block is a constant that becomes part of the bias behind {name}"
                if constant.bias is not None
                else f"one dead block stays: it carries a constant into {name}"
            )
    if graph.rects and not found:
        alone = np.arange(graph.num_blocks) == unit.blocks[0]
        if not settle(graph, alone).gone.any():
            found.append("a block goes only together with blocks of other units")
    return tuple(found)


def _tensor(job: _Job, name: str, size: int) -> PlannedTensor:
    group = job.group_of[name]
    structure = group["structure"]
    if structure is not None:
        rest = job.graph.left_out.get(name, "")
        why = rest if name in job.writes else why_alone(job.graph, name)
    elif name in job.follows and name not in job.writes:
        why = "goes with a unit"
    elif name in job.writes:
        why = "could be removed, but has no structure"
    else:
        why = why_alone(job.graph, name)
    return PlannedTensor(name, size, structure, group.get("unit"), why)
