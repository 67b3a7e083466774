# SPDX-License-Identifier: Apache-2.0
"""Plan: what training can remove and what not, as a plain value that prints as tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from typing import Any, Literal

from dessilbi.blocks.structure import Structure
from dessilbi.planning.text import alike, common, families, indented, listed, percent, row

Removal = Literal["whole", "apart", "never"]


@dataclass(frozen=True)
class PlannedUnit:
    """Blocks of several tensors that can only be removed together.

    Args:
        name: That of its first producer.
        kind: What a block is: "head" (of attention), "filter" (of convolutions), "neuron" (of a
            linear layer) or "width" (of a residual stream).
        removal: "whole": the penalty selects or drops all producers of a block together; "apart":
            every producer has a structure, but a block goes only if all of them happen to be empty;
            "never": a producer has no structure, so no block ever goes.
        why: What stands in the way, where removal is not "whole".
        num_blocks: How many blocks there are; one always stays.
        producers: Tensors that write the unit.
        followers: Tensors (also buffers) that go with it: biases, norms, depthwise rows, gates.
        consumers: Tensors that read it and lose columns.
        parameters: Of all blocks, columns of consumers included.
        parameters_per_block: Of one block.
        macs: Multiply-accumulates of all blocks, for one sample.
        macs_per_block: Of one block.
        notes: What else decides whether a dead block can go.
    """

    name: str
    kind: str
    removal: Removal
    why: str
    num_blocks: int
    producers: tuple[str, ...]
    followers: tuple[str, ...]
    consumers: tuple[str, ...]
    parameters: int
    parameters_per_block: int
    macs: int
    macs_per_block: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedTensor:
    """One parameter: its structure, the unit it is coupled into, and why there is no more.

    ``why`` says, for a structured tensor, why (some of) its blocks cannot be removed, and for the
    others why there is no structure; it is empty where all is well.
    """

    name: str
    size: int
    structure: Structure | None
    unit: str | None
    why: str


@dataclass(frozen=True)
class Plan:
    """What param_groups does with a model, and what that lets training remove.

    Args:
        model: The model's class.
        parameters: Of the whole model.
        macs: Multiply-accumulates of the whole model for one sample (convolutions, linear layers,
            matrix products and attention).
        removable_parameters: In units whose removal is "whole", columns of consumers included.
        removable_macs: The same for multiply-accumulates.
        structured_parameters: In tensors with a structure.
        units: Everything that can be removed together.
        tensors: Every parameter.

    >>> import torch
    >>> from dessilbi import plan
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    >>> net.append(torch.nn.Linear(16, 2))[0].out_channels
    4
    >>> print(str(plan(net, example_inputs=torch.ones(1, 1, 4, 4))).splitlines()[1])
    removable as whole units: 97.3 % of the parameters, 100.0 % of the MACs
    """

    model: str
    parameters: int
    macs: int
    removable_parameters: int
    removable_macs: int
    structured_parameters: int
    units: tuple[PlannedUnit, ...]
    tensors: tuple[PlannedTensor, ...]

    def __repr__(self) -> str:
        """What ``print`` shows, also in a notebook."""
        return str(self)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def rules(self, kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return rules for :func:`dessilbi.param_groups` that structure some kinds of units only.

        Every other parameter is left without structure.

        Args:
            kinds: Kind of a unit ("head", "neuron", "filter", "width") -> options of its groups,
                for example ``{"head": {"lam": 6.0}, "neuron": {"lam": 2.0}}``.

        Raises:
            ValueError: No unit of the model is of that kind.

        >>> import torch
        >>> from dessilbi import param_groups, plan
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)
        >>> x = torch.ones(1, 3, 8)
        >>> rules = plan(layer, example_inputs=x).rules({"head": {"lam": 2.0}})
        >>> groups = param_groups(layer, rules, example_inputs=x)
        >>> [(g["params"][0][0], g["structure"], g["lam"]) for g in groups if g["structure"]]
        [('self_attn.in_proj_weight', 'head:4+4+4', 2.0)]
        """
        known = {unit.kind for unit in self.units}
        for kind in kinds:
            if kind not in known:
                raise ValueError(
                    f"{self.model} has no units of kind {kind!r}: it has "
                    f"{', '.join(map(repr, sorted(known))) or 'none that can be removed'}"
                )
        found = {
            escape(name): {"structure": "unit", **kinds[unit.kind]}
            for unit in self.units
            if unit.kind in kinds
            for name in unit.producers
        }
        return {**found, "*": None}

    def __str__(self) -> str:
        """Tables of at most 80 columns; what differs only in the numbers of its name is one row."""
        lines = _summary(self)
        for removal, title in _TITLES.items():
            found = [unit for unit in self.units if unit.removal == removal]
            lines += _unit_table(self, title, found) if found else []
        fixed = [tensor for tensor in self.tensors if tensor.structure is not None and tensor.why]
        plain = [tensor for tensor in self.tensors if tensor.structure is None]
        lines += _tensor_table("Structured, but what it selects cannot be removed", fixed)
        lines += _tensor_table("Without structure", plain)
        return "\n".join(lines)


_TITLES: dict[Removal, str] = {
    "whole": "Units that the penalty selects as a whole",
    "apart": "Units whose parts are selected apart: a block goes only if all of it is empty",
    "never": "Units that never go, because a part of them has no structure",
}
_UNIT_WIDTHS = (8, 13, 8, 12, 8)
_TENSOR_WIDTHS = (9, 13)
_MANY = 40  # rows above which alike units share one even where their numbers differ


def _summary(plan: Plan) -> list[str]:
    parameters = max(plan.parameters, 1)
    removable = percent(plan.removable_parameters / parameters)
    macs = percent(plan.removable_macs / max(plan.macs, 1))
    structured = percent(plan.structured_parameters / parameters)
    lines = [
        *indented(
            f"{plan.model}: {plan.parameters:,} parameters, {plan.macs:,} MACs per sample", 0
        ),
        f"removable as whole units: {removable} % of the parameters, {macs} % of the MACs",
        f"with a structure: {structured} % of the parameters",
        "(a weight counts in the unit that it writes and in the one that it reads)",
    ]
    if not plan.removable_parameters:
        lines.insert(-3, "WARNING: nothing of it can be removed by training with these groups")
    return lines


def _unit_table(plan: Plan, title: str, units: Sequence[PlannedUnit]) -> list[str]:
    head = ("blocks", "parameters", "MACs %", "parameters", "MACs %")
    lines = ["", title, f"{'whole unit':>60}{'one block saves':>20}", *row("", head, _UNIT_WIDTHS)]
    rows = families(units, _numbers)
    if len(rows) > _MANY:
        rows = families(units, lambda unit: (unit.num_blocks, _words(unit)))
    for family in rows:
        lines += _unit_lines(family, max(plan.macs, 1))
    return lines


def _unit_lines(family: Sequence[PlannedUnit], macs: int) -> list[str]:
    def mean(values: Iterable[int]) -> float:
        return sum(values) / len(family)

    cells = (
        f"{mean(u.num_blocks for u in family):,.0f}",
        f"{mean(u.parameters for u in family):,.0f}",
        percent(mean(u.macs for u in family) / macs),
        f"{mean(u.parameters_per_block for u in family):,.0f}",
        percent(mean(u.macs_per_block for u in family) / macs),
    )
    told = "each" if len({_numbers(u) for u in family}) == 1 else "on average"
    notes = [f"{family[0].kind}s"] if family[0].kind != "filter" else []
    notes += [f"{len(family)} units, {told}"] if len(family) > 1 else []
    several = f" ({'; '.join(notes)})" if notes else ""
    lines = row(common([u.name for u in family]) + several, cells, _UNIT_WIDTHS)
    columns = list(zip(*(u.producers for u in family), strict=True))
    others = family[0].producers[1:] if len(family) == 1 else [common(c) for c in columns[1:]]
    lines += listed(others, "with") if others else []
    for texts in zip(*((u.why, *u.notes) for u in family), strict=True):
        lines += indented(common(texts), 2) if texts[0] else []
    return lines


def _words(unit: PlannedUnit) -> tuple[str, ...]:
    return tuple(map(alike, (unit.name, unit.kind, *unit.producers, unit.why, *unit.notes)))


def _numbers(unit: PlannedUnit) -> tuple[object, ...]:
    return (unit.num_blocks, unit.parameters, unit.macs, *_words(unit))


def _tensor_table(title: str, tensors: Sequence[PlannedTensor]) -> list[str]:
    if not tensors:
        return []
    lines = ["", title, *row("", ("tensors", "parameters"), _TENSOR_WIDTHS)]
    for family in families(tensors, lambda t: (alike(t.why), t.structure)):
        size = sum(tensor.size for tensor in family)
        structure = family[0].structure
        why = common([tensor.why for tensor in family])
        told = why if structure is None else f"{structure}: {why}"
        lines += row(told, (f"{len(family):,}", f"{size:,}"), _TENSOR_WIDTHS)
        lines += listed([tensor.name for tensor in family])
    return lines
