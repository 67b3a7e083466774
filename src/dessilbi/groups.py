# SPDX-License-Identifier: Apache-2.0
"""Groups: from a model and a few rules to the param groups of an optimizer."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

from torch import Tensor, nn

from dessilbi.blocks.naming import canonical_names, unwrap
from dessilbi.blocks.structure import Structure, alias_of, resolve
from dessilbi.graph import Coupling, Graph, couplings, filters, read_graph, why_alone
from dessilbi.graph.foreign import is_conv1d
from dessilbi.graph.program import ExampleInputs
from dessilbi.optimizers.optimizer import DessiLBI

Rule = Structure | Mapping[str, Any] | None
Rules = Mapping[str, Rule] | Sequence[tuple[str, Rule]]

UNIT = "unit"  # the structure that means: as the graph of the model has it
_OPTIONS = frozenset(signature(DessiLBI).parameters) - {"params"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def param_groups(
    model: nn.Module,
    rules: Rules | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
) -> list[dict[str, Any]]:
    """Return param groups with names: filters for convolutions, elements for linear layers.

    Everything else (biases, norms, embeddings, recurrent and packed attention weights) stays
    without structure and is trained as by plain SGD, unless a rule says otherwise.

    With ``example_inputs`` filters are coupled: blocks of several tensors that can only be removed
    together (the filters that meet in a residual sum, the rows of one attention head in q, k and v)
    become one *unit*, so that the penalty acts on what can be removed. Coupled by default is every
    unit that has a filter in it: the weight of a convolution, or of a linear layer that is applied
    at every position of a sample (per token or pixel, as in transformers), which is a convolution
    of size 1. A linear layer that reads one vector per sample (the classifier behind a CNN) keeps
    its elements unless it shares a unit with a filter; a rule ``"unit"`` couples it as well. What
    merely follows a unit (depthwise convolutions, gates) has no structure. What cannot be removed
    (the output layer, filters under a LayerNorm) keeps its structure of the first paragraph, and so
    does what the penalty cannot act on as a whole (packed q, k and v; split channels).
    :func:`dessilbi.plan` shows all of it before training.

    Args:
        model: The model, also inside DDP or torch.compile; names are those of the plain model.
        rules: Glob pattern of parameter names -> structure (alias, tuple or None), or a dict of
            group options such as {"structure": "filter", "lam": 0.1}. Patterns are tried in order
            and the first that matches decides; options it does not name keep the default.
            With ``example_inputs``, the structure "unit" couples what matches and has a unit; so
            does any structure that cuts a tensor into just the blocks of its unit. Another
            structure, or {"unit": None}, takes the tensor out; the others stay one unit.
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords, to
            read what hangs together; None couples nothing.

    Returns:
        Groups for DessiLBI, in the order in which their parameters appear; parameters with the
        same options share one.

    Raises:
        ValueError: A pattern matches no parameter, an option is misspelt, a structure does not
            fit its tensor, "unit" is asked of what has none, members of a unit would get
            different ``lam`` or ``block_scale``, or the model cannot be read.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    >>> for group in param_groups(net, {"2.weight": {"structure": "element", "lam": 0.1}}):
    ...     print([name for name, _ in group["params"]], group["structure"], group.get("lam"))
    ['0.weight'] filter None
    ['0.bias', '2.bias'] None None
    ['2.weight'] element 0.1
    """
    if example_inputs is None:
        return groups_on(None, model, rules)
    graph = read_graph(model, example_inputs)
    groups = groups_on(graph, model, rules)
    if not any(group.get("unit") for group in groups):
        warnings.warn(
            f"no parameter of {type(model).__name__} was coupled into a unit; "
            f"dessilbi.plan(model, example_inputs=...) says why",
            stacklevel=2,
        )
    return groups


def groups_on(graph: Graph | None, model: nn.Module, rules: Rules | None) -> list[dict[str, Any]]:
    """Return the groups of :func:`param_groups` on a graph already read; None couples nothing."""
    plain = unwrap(model)
    ordered = list(rules.items() if isinstance(rules, Mapping) else rules or ())
    own = dict(plain.named_parameters())
    named = list(zip(canonical_names(list(own)), own.values(), strict=True))
    _check_patterns([pattern for pattern, _ in ordered], [name for name, _ in named])
    structures = _default_structures(plain)
    places = {name: _Place(structures.get(param), None, False) for name, param in named}
    if graph is not None:
        places |= _places(graph, places)
    groups: dict[str, dict[str, Any]] = {}
    asked: dict[str, list[str]] = {}
    for name, param in named:
        pattern, rule = next((r for r in ordered if fnmatchcase(name, r[0])), ("", {}))
        options = dict(rule) if isinstance(rule, Mapping) else {"structure": rule}
        _check_options(name, options)
        if options.get("structure") == UNIT:
            asked.setdefault(pattern, []).append(name)
        options = _settle(name, param, options, places[name])
        key = repr(sorted(options.items()))
        group = groups.setdefault(key, {"params": [], **options})
        group["params"].append((name, param))
    _check_asked(graph, asked, places)
    if graph is not None:
        _check_units(list(groups.values()))
    return list(groups.values())


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise ValueError(
                f"the rule {pattern!r} matches no parameter: those of the model are {shown}"
            )


def _default_structures(model: nn.Module) -> dict[Tensor, str]:
    found: dict[Tensor, str] = {}
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS):
            found[module.weight] = "filter"
        elif isinstance(module, _TRANSPOSED):
            found[module.weight] = "channel"  # a transposed convolution's filters are dimension 1
        elif isinstance(module, nn.Linear) or is_conv1d(module):
            found[module.weight] = "element"
    # A weight shared with an embedding is read by rows there: leave it alone.
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found.pop(module.weight, None)
    return found


@dataclass(frozen=True)
class _Place:
    """What a parameter gets by itself, the coupling it has, and whether it takes it by default."""

    structure: str | None
    coupling: Coupling | None
    joins: bool


def _places(graph: Graph, alone: Mapping[str, _Place]) -> dict[str, _Place]:
    """The places that differ from those without a graph."""
    coupled, sliding = couplings(graph), filters(graph)
    places: dict[str, _Place] = {}
    for unit in graph.units:
        joins = any(member.name in sliding for member in unit.producers)
        for member in unit.producers:
            if member.name in alone and member.name in coupled:
                structure = alone[member.name].structure
                places[member.name] = _Place(structure, coupled[member.name], joins)
    writes = {member.name for unit in graph.units for member in unit.producers}
    for unit in graph.units:
        for member in unit.followers:
            if member.name in alone and member.name not in writes:
                places[member.name] = _Place(None, None, False)
    return places


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    for option in options:
        meant = get_close_matches(option, _OPTIONS, n=1, cutoff=0.75)
        if option not in _OPTIONS and meant:
            raise ValueError(f"the rule for {name} has {option!r}: did you mean {meant[0]!r}?")
    if options.get("structure") == UNIT and "unit" in options:
        raise ValueError(
            f"the rule for {name} has structure 'unit' and unit={options['unit']!r}: give one of "
            f"them, or another structure"
        )


def _settle(name: str, param: Tensor, options: dict[str, Any], place: _Place) -> dict[str, Any]:
    """Fill in the structure, and the unit where the parameter is coupled."""
    wanted = options.get("structure", UNIT if place.joins else place.structure)
    coupling = None if "unit" in options else place.coupling
    if wanted == UNIT and coupling is None:
        wanted = place.structure
    elif wanted == UNIT or (
        wanted is not None
        and coupling is not None
        and _cuts(wanted, param, name) == _cuts(coupling.structure, param, name)
    ):
        assert coupling is not None
        return options | {"structure": alias_of(coupling.structure), "unit": coupling.unit}
    if wanted is not None:
        resolve(wanted, param.shape, name=name)
    if wanted is None or isinstance(wanted, str):
        return options | {"structure": wanted}
    structure = tuple(tuple(n) if isinstance(n, list) else n for n in wanted)
    return options | {"structure": structure}


def _cuts(structure: Structure, param: Tensor, name: str) -> list[int | tuple[int, ...]]:
    """Block lengths in numbers, so that None and a whole dimension are the same."""
    block = resolve(structure, param.shape, name=name)
    return [size if n is None else n for n, size in zip(block, param.shape, strict=True)]


def _check_asked(
    graph: Graph | None, asked: Mapping[str, Sequence[str]], places: Mapping[str, _Place]
) -> None:
    """A rule "unit" must find a unit."""
    for pattern, names in asked.items():
        if graph is None:
            raise ValueError(
                f"the rule {pattern!r} asks for structure 'unit', which is read off the model: "
                f"give param_groups example_inputs=..., or name another structure"
            )
        if all(places[name].coupling is None for name in names):
            name = next((name for name in names if name in graph.left_out), names[0])
            raise ValueError(
                f"the rule {pattern!r} asks for structure 'unit' but {name} has none: "
                f"{why_alone(graph, name)}; name another structure or None"
            )


def _check_units(groups: Sequence[Mapping[str, Any]]) -> None:
    first: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        unit = group.get("unit")
        if unit is None:
            continue
        other = first.setdefault(unit, group)
        for option in ("lam", "block_scale"):
            if other.get(option) != group.get(option):
                told = [
                    f"{g['params'][0][0]} "
                    + (f"with {option}={g[option]!r}" if option in g else f"without {option}")
                    for g in (other, group)
                ]
                raise ValueError(
                    f"the rules give unit {unit!r} both {told[0]} and {told[1]}, but its members "
                    f"are selected together: let one pattern give all of them the same {option}, "
                    f"or take one out with {{'unit': None}}"
                )
