# SPDX-License-Identifier: Apache-2.0
"""Guarding: a program that is handed out checks what it is given.

What was no tensor, and every size that could not stay open, is written into its operations. Other
values would be ignored, and other sizes broadcast or be reshaped into something else. The check is
an operation of the program, so that copies have it, and an export makes it when it is traced.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

_PLAIN = (bool, int, float, str)


@has_side_effect  # nobody reads its result, and it is no dead code
def check_inputs(wanted: Sequence[Any], *given: Any) -> None:
    """Refuse inputs for which a program was not made.

    Args:
        wanted: Name and what is allowed of each: the sizes of a tensor, in which a name stands for
            any number (the same where it comes again), or a plain value.
        given: The inputs.

    Raises:
        ValueError: One of them is another.

    >>> check_inputs([("x", ("batch", 4)), ("flag", True)], torch.ones(7, 4), True)
    >>> check_inputs([("x", ("batch", 4))], torch.ones(7, 1))
    Traceback (most recent call last):
        ...
    ValueError: x is (7, 1), and this program was made for (batch, 4): give inputs like those it was compacted with, or compact the model again with others
    """  # noqa: E501
    traced = next((value for value in given if isinstance(value, fx.Proxy)), None)
    if traced is not None:  # a program is traced when it is read from a file of torch.save
        traced.tracer.create_proxy("call_function", check_inputs, (wanted, *given), {})
        return
    sizes: dict[str, Any] = {}
    for (name, allowed), value in zip(wanted, given, strict=True):
        told: Any = tuple(value.shape) if isinstance(value, Tensor) else value
        if isinstance(allowed, tuple | list):
            good = isinstance(value, Tensor) and len(told) == len(allowed)
            good = good and all(
                size == (sizes.setdefault(one, size) if isinstance(one, str) else one)
                for size, one in zip(told, allowed, strict=True)
            )
        else:
            good = not isinstance(value, Tensor) and value == allowed
        if not good:
            raise ValueError(
                f"{name} is {_shown(told)}, and this program was made for {_shown(allowed)}: give "
                f"inputs like those it was compacted with, or compact the model again with others"
            )


def guard(module: fx.GraphModule) -> fx.GraphModule:
    """Let a program check its inputs before anything else, in place."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    words: dict[str, str] = {}  # sizes that stay open, by the symbol they have in the program
    wanted = [(node, _allowed(node, words)) for node in inputs]
    known = [(node, allowed) for node, allowed in wanted if allowed is not Ellipsis]
    if not known:
        return module
    after = inputs[-1].next
    with module.graph.inserting_before(after):
        spec = tuple((node.name, allowed) for node, allowed in known)
        module.graph.call_function(check_inputs, (spec, *(node for node, _ in known)))
    module.recompile()
    return module


def inputs_note(module: fx.GraphModule) -> list[str]:
    """Say what a guarded program takes."""
    told = [
        f"{name} {_shown(allowed)}"
        for node in module.graph.nodes
        if node.target is check_inputs
        for name, allowed in node.args[0]
    ]
    return [f"the program takes these inputs, and checks them: {', '.join(told)}"] if told else []


def _shown(value: Any) -> str:
    """A shape with the words of its open sizes, or a plain value."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(str, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _allowed(node: fx.Node, words: dict[str, str]) -> Any:
    """Return what may stand at a placeholder, ``...`` where nothing is known."""
    value = node.meta.get("val", ...)
    if isinstance(value, Tensor):
        return tuple(_size(size, words) for size in value.shape)
    return value if value is None or isinstance(value, _PLAIN) else ...


def _size(size: int | torch.SymInt, words: dict[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    return words.setdefault(str(size), f"batch{len(words) + 1}" if words else "batch")
