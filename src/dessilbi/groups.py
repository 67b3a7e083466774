# SPDX-License-Identifier: Apache-2.0
"""Groups: from a model and a few rules to the param groups of an optimizer."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

from torch import Tensor, nn

from dessilbi.naming import canonical_names, unwrap
from dessilbi.optimizer import DessiLBI
from dessilbi.structure import Structure, resolve

Rule = Structure | Mapping[str, Any] | None

_OPTIONS = frozenset(signature(DessiLBI).parameters) - {"params"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def param_groups(
    model: nn.Module,
    rules: Mapping[str, Rule] | Sequence[tuple[str, Rule]] | None = None,
    *,
    example_inputs: Any = None,
) -> list[dict[str, Any]]:
    """Return param groups with names: filters for convolutions, elements for linear layers.

    Everything else (biases, norms, embeddings, recurrent and packed attention weights) stays
    without structure and is trained as by plain SGD, unless a rule says otherwise.

    Args:
        model: The model, also inside DDP or torch.compile; names are those of the plain model.
        rules: Glob pattern of parameter names -> structure (alias, tuple or None), or a dict of
            group options such as {"structure": "filter", "lam": 0.1}. Patterns are tried in order
            and the first that matches decides; options it does not name keep the default.
        example_inputs: Reserved for coupling filters into units; must be None in this release.

    Returns:
        Groups for DessiLBI, in the order in which their parameters appear; parameters with the
        same options share one.

    Raises:
        ValueError: A pattern matches no parameter, an option is misspelt, or a structure does not
            fit its tensor.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    >>> for group in param_groups(net, {"2.weight": {"structure": "element", "lam": 0.1}}):
    ...     print([name for name, _ in group["params"]], group["structure"], group.get("lam"))
    ['0.weight'] filter None
    ['0.bias', '2.bias'] None None
    ['2.weight'] element 0.1
    """
    if example_inputs is not None:
        raise ValueError(
            "example_inputs is not supported yet: this release does not couple filters into units; "
            "leave it out"
        )
    plain = unwrap(model)
    ordered = list(rules.items() if isinstance(rules, Mapping) else rules or ())
    own = dict(plain.named_parameters())
    named = list(zip(canonical_names(list(own)), own.values(), strict=True))
    _check_patterns([pattern for pattern, _ in ordered], [name for name, _ in named])
    defaults = _default_structures(plain)
    groups: dict[str, dict[str, Any]] = {}
    for name, param in named:
        options = _options_of(name, param, ordered, defaults.get(param))
        key = repr(sorted(options.items()))
        group = groups.setdefault(key, {"params": [], **options})
        group["params"].append((name, param))
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
        elif isinstance(module, nn.Linear):
            found[module.weight] = "element"
    # A weight shared with an embedding is read by rows there: leave it alone.
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found.pop(module.weight, None)
    return found


def _options_of(
    name: str, param: Tensor, rules: Sequence[tuple[str, Rule]], default: str | None
) -> dict[str, Any]:
    rule: Rule = default
    for pattern, chosen in rules:
        if fnmatchcase(name, pattern):
            rule = chosen
            break
    options = dict(rule) if isinstance(rule, Mapping) else {"structure": rule}
    for option in options:
        meant = get_close_matches(option, _OPTIONS, n=1, cutoff=0.75)
        if option not in _OPTIONS and meant:
            raise ValueError(f"the rule for {name} has {option!r}: did you mean {meant[0]!r}?")
    options.setdefault("structure", default)
    if options["structure"] is not None:
        resolve(options["structure"], param.shape, name=name)
        if not isinstance(options["structure"], str):
            options["structure"] = tuple(options["structure"])
    return options
