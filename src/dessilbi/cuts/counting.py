# SPDX-License-Identifier: Apache-2.0
"""Counting: multiply-accumulates of one sample.

A sample is one entry of the first dimension of the first input that has dimensions. What is
computed once for a whole batch is shared out among its samples.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from dessilbi.graph.inputs import Arguments
from dessilbi.graph.program import Program
from dessilbi.graph.reader import Reader, shape_of


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


# Attention on a CPU, which torch 2.11 does not count.
ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
UNKNOWN = {} if ON_CPU in flop_registry else {ON_CPU: _attention}


def count_macs(model: Callable[..., Any], arguments: Arguments, samples: int = 1) -> int:
    """Return multiply-accumulates of one of the ``samples`` in these inputs.

    >>> count_macs(torch.nn.Linear(3, 5), ((torch.ones(4, 3),), {}), samples=4)
    15
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:  # shapes suffice
        with fake:
            found = _count(model, pytree.tree_map_only(Tensor, fake.from_tensor, arguments))
    except Exception:  # forward looks at values
        found = _count(model, arguments)
    return found // samples


def count_program(reading: Reader) -> int | None:
    """Return multiply-accumulates of a program for its whole batch, None where only values tell."""
    nodes = reading.program.module.graph.find_nodes(op="placeholder")
    inputs = tuple(_blank(node.meta.get("val")) for node in nodes)

    def run(*inputs: Any) -> Any:
        program = runnable(reading.program)
        return fx.Interpreter(program).run(*inputs, enable_io_processing=False)

    try:
        return count_macs(run, (inputs, {}))
    except Exception:
        return None


def runnable(program: Program) -> fx.GraphModule:
    """Return a program that may be run: a copy of one that writes into its own tensors."""
    return copy.deepcopy(program.module) if program.writes else program.module


def repeated(arguments: Arguments, samples: int) -> Arguments:
    """Return the arguments with their batch repeated to ``samples``, where it is a divisor."""
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.dim()]
    sizes = {x.shape[0] for x in tensors}
    times = samples // sizes.pop() if len(sizes) == 1 else 1
    if times < 2:
        return arguments
    found: Arguments = pytree.tree_map_only(Tensor, lambda x: torch.cat([x] * times), arguments)
    return found


def _blank(value: Any) -> Any:
    """Return zeros in the place of what torch.export recorded."""
    if not isinstance(value, Tensor):
        return value
    return torch.zeros(shape_of(value), dtype=value.dtype, device=value.device)


def _count(model: Callable[..., Any], arguments: Arguments) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN)
    args, kwargs = arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the model or a flag of torch warns of is not asked
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), counter:
            model(*args, **kwargs)  # fused recurrent layers would not be counted
    return counter.get_total_flops() // 2
