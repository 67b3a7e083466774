# SPDX-License-Identifier: Apache-2.0
"""Walking: from a program to a finished reading, one operation after the other."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from dessilbi.graph.labels import blank, small, tidy
from dessilbi.graph.program import SHAPE_ONLY, Program, op_name
from dessilbi.graph.reader import RULES, Known, Reader, Weight, blank_like, flatten, shape_of

# Shaped like an activation: constants if that has no labels, labelled like it otherwise.
LIKE = frozenset({"zeros_like", "ones_like", "full_like", "empty_like"})


def read(program: Program) -> Reader:
    """Walk the program once."""
    reader = Reader(program, uses=_uses(program), batch=_samples(program))
    for node in program.module.graph.nodes:
        reader.node = node
        value = _value(reader, node)
        reader.values[node] = (
            reader.labels.simplify(tidy(value)) if isinstance(value, Tensor) else value
        )
    _freeze_what_varies(reader)
    return reader


def _samples(program: Program) -> int:
    """Size of the first dimension of the first input that has one."""
    inputs = (
        node.meta.get("val") for node in program.module.graph.nodes if node.op == "placeholder"
    )
    sizes = (shape_of(value) for value in inputs if isinstance(value, Tensor) and value.dim())
    return max(1, next(sizes, (1,))[0])


def _uses(program: Program) -> Counter[str]:
    """How many operations read every parameter."""
    counts: Counter[str] = Counter()
    for node in program.module.graph.nodes:
        if node.op == "get_attr" and node.target in program.weights:
            counts[program.weights[str(node.target)]] += len(node.users)
    return counts


def _freeze_what_varies(reader: Reader) -> None:
    """Settle ``must_not_vary`` now that all merges are known; reasons keep the program's order."""
    frozen, reader.labels.frozen = reader.labels.frozen, []
    ordered = []
    done = 0
    for labels, dims, reason, place, only in reader.flat:
        roots = torch.from_numpy(reader.labels.roots(small([labels])[0].numpy()))
        first = roots
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        odd = (roots != first).any(dim=dims, keepdim=True).expand(roots.shape)
        ordered += frozen[done:place]
        done = max(done, place)
        reader.labels.frozen = ordered
        if bool(odd.any()):
            reader.labels.freeze((roots[odd] if only is None else only).numpy(), reason)
    reader.labels.frozen = ordered + frozen[done:]


def _value(reader: Reader, node: fx.Node) -> Any:
    if node.op == "placeholder":
        return blank_like(node.meta.get("val"))
    if node.op == "get_attr":
        return _attribute(reader, str(node.target))
    args = fx.map_arg(node.args, reader.values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, reader.values.__getitem__)
    if node.op == "output":
        return reader.unknown(args, reason="it is an output of the model")
    name = op_name(node)
    if name == "_assert_tensor_metadata":
        return None
    live = [x for x in flatten((args, kwargs)) if isinstance(x, Tensor | Weight)]
    plain = name in SHAPE_ONLY or not live
    if name in LIKE and not any(small([reader.labels_of(x)])[0].any() for x in live):
        plain = True
    found = None if plain else RULES.get(name)
    if found is None and not plain:
        return reader.unknown(args, kwargs)
    try:
        return found(reader, *args, **kwargs) if found else _compute(reader, node)
    except Exception as error:  # a form of the operation that its rule did not foresee
        reason = f"{reader.where} is used in a way that its rule does not follow ({error!r})"
        return reader.unknown(args, kwargs, reason=reason)


def _attribute(reader: Reader, target: str) -> Any:
    value: Any = reader.program.module
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        return value
    if target in reader.program.weights:
        name = reader.program.weights[target]
        reader.shapes[name] = tuple(value.shape)
        return Weight(name, tuple(value.shape))
    name_or_none = reader.program.buffers.get(target)
    if name_or_none is not None:
        reader.shapes[name_or_none] = tuple(value.shape)
    if isinstance(value, nn.Parameter):
        return blank(value.shape)
    value = value.detach()  # where the program writes, it must not write into the model
    return Known(value.clone() if reader.program.writes else value, name_or_none)


def _compute(reader: Reader, node: fx.Node) -> Any:
    """Run an operation on plain values; its result does not depend on the input.

    Activations get stand-ins: such operations look at their shape and type only.
    """

    def plain(source: fx.Node) -> Any:
        return _plain(reader.values[source], source.meta.get("val"))

    if not callable(node.target):
        return reader.unknown(*map(reader.values.__getitem__, node.all_input_nodes))
    result = node.target(*fx.map_arg(node.args, plain), **fx.map_arg(node.kwargs, plain))
    if isinstance(result, tuple | list):
        return tuple(Known(item) if isinstance(item, Tensor) else item for item in result)
    return Known(result) if isinstance(result, Tensor) else result


def _plain(value: Any, example: Any) -> Any:
    if isinstance(value, tuple | list):
        examples = example if isinstance(example, tuple | list) else [None] * len(value)
        return type(value)(_plain(v, e) for v, e in zip(value, examples, strict=True))
    if isinstance(value, Known):
        return value.value
    if isinstance(value, Tensor | Weight):
        return torch.zeros(tuple(value.shape), dtype=getattr(example, "dtype", None))
    return value
