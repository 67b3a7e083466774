# SPDX-License-Identifier: Apache-2.0
"""Program: a model as a plain list of operations, read once with torch.export.

The program is functional where it depends on the input (in-place operations are replaced), and it
names parameters and buffers as the model does.
"""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from dessilbi.blocks.naming import bias_name, tensor_names, unwrap

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]

# They look at shape and type of their argument, never at its values.
SHAPE_ONLY = frozenset(
    {"new_zeros", "new_ones", "new_full", "new_empty"}
    | {"sym_size", "sym_numel", "_assert_tensor_metadata"}
)


@dataclass(frozen=True)
class Program:
    """A model's operations, in order.

    Args:
        module: The operations; ``get_attr`` nodes fetch parameters, buffers and constants.
        weights: ``get_attr`` target -> name of that parameter in the model.
        buffers: ``get_attr`` target -> name of that buffer in the model.
        vacant: Names of biases that layers have a place for but do not use.
        writes: Whether an operation changes a buffer or constant in place.
    """

    module: fx.GraphModule
    weights: Mapping[str, str]
    buffers: Mapping[str, str]
    vacant: frozenset[str] = frozenset()
    writes: bool = False


def as_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into positional and keyword arguments of ``forward``.

    Raises:
        ValueError: They are neither a tensor, a sequence nor a mapping, or are empty.

    >>> as_arguments(torch.ones(1))
    ((tensor([1.]),), {})
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping) and example_inputs:
        return (), dict(example_inputs)
    is_sequence = isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str)
    if is_sequence and len(example_inputs):
        return tuple(example_inputs), {}
    raise ValueError(
        f"example_inputs is {type(example_inputs).__name__} without content or of a wrong type: "
        f"give a tensor, a non-empty tuple of forward's arguments, or a dict of its keywords"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode and restore every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def read_program(model: nn.Module, example_inputs: ExampleInputs) -> Program:
    """Read the operations of ``model``; its training mode and statistics stay untouched.

    The first dimension of the inputs stays open (a batch) wherever ``forward`` allows.

    Raises:
        ValueError: The model cannot be read with these inputs.
    """
    model = unwrap(model)
    args, kwargs = as_arguments(example_inputs)
    with evaluating(model), torch.no_grad():
        exported = export_program(model, args, kwargs)
        module = _inlined(exported.module(check_guards=False))
        if not _make_functional(module, _variable_nodes(module)):
            module = _inlined(exported.run_decompositions({}).module(check_guards=False))
            if not _make_functional(module, _variable_nodes(module)):
                raise ValueError(
                    f"{type(model).__name__} writes into a part of a tensor in forward, which "
                    f"cannot be followed exactly; write it with torch.cat or torch.where instead"
                )
    module.graph.eliminate_dead_code()
    plain = fx.GraphModule(module, module.graph)
    return Program(
        plain,
        _names(plain, model, model.named_parameters(remove_duplicate=False)),
        _names(plain, model, model.named_buffers(remove_duplicate=False)),
        _vacant_biases(model),
        any(node.op == "call_function" and _is_inplace(node) for node in plain.graph.nodes),
    )


def _vacant_biases(model: nn.Module) -> frozenset[str]:
    """Names of the biases that layers with a weight could have and do not."""
    canonical = tensor_names(model)
    weights = (
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if "bias" in module._parameters and module._parameters["bias"] is None
    )
    return frozenset(bias_name(canonical[name]) for name in weights if name in canonical)


def export_program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the ExportedProgram of a model in eval mode, its batch open where forward allows.

    Raises:
        ValueError: torch.export cannot follow the model with these inputs.
    """
    attempts: list[tuple[tuple[Any, Any], Any]] = [((args, kwargs), None)]
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    sizes = {x.shape[0] if x.dim() else None for x in tensors}
    if len(sizes) == 1 and None not in sizes:
        twice = 2 if sizes == {1} else 1  # export takes a batch of 1 for a constant
        wide = [_repeat(x, twice) for x in args], {k: _repeat(x, twice) for k, x in kwargs.items()}
        shapes = ([_open(x) for x in args], {k: _open(x) for k, x in kwargs.items()})
        attempts.insert(0, ((tuple(wide[0]), wide[1]), (*shapes[0], *shapes[1].values())))
    for (positional, named), shapes_or_none in attempts:
        spec: Any = shapes_or_none
        if spec is not None and named:
            names = zip(_argument_names(model), positional, strict=False)
            spec = {k: _open(x) for k, x in (*names, *named.items())}
        try:
            with quiet(*_TALK):
                return torch.export.export(
                    model, positional, named, dynamic_shapes=spec, strict=False
                )
        except Exception as error:
            failure = error
    detail = str(failure).strip().splitlines() or [type(failure).__name__]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception:
        remedy = "forward does not accept them: give inputs that it does"
    else:
        remedy = "forward accepts them, but torch.export cannot follow it: change what it stops at"
    raise ValueError(
        f"{type(model).__name__} cannot be read with these example inputs "
        f"({type(failure).__name__}: {detail[0]}); {remedy}"
    ) from None


# These log a traceback, or a graph, where a model cannot be followed.
_TALK = ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes", "export._trace")


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep loggers of torch from telling what we say in one sentence, or nobody can act on."""
    loggers = [logging.getLogger(f"torch.{name}") for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was


def _argument_names(model: nn.Module) -> list[str]:
    code: Any = model.forward.__code__
    return list(code.co_varnames[1 : code.co_argcount])


def _repeat(x: Any, times: int) -> Any:
    return torch.cat([x] * times) if isinstance(x, Tensor) and times > 1 else x


def _open(x: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) else None


def op_name(node: fx.Node) -> str:
    """Return the operation's plain name, without its overload: ``conv2d``, ``add``, ``getitem``."""
    target = node.target
    if isinstance(target, OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def _inlined(module: fx.GraphModule) -> fx.GraphModule:
    """Open regions that only switch gradients or autocast off: they compute the same outside."""
    graph = module.graph
    for node in list(graph.nodes):
        name = op_name(node) if node.op == "call_function" else ""
        first = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
        if first is None or (name == "wrap_with_autocast" and node.args[2]):
            continue
        region = getattr(module, node.args[first].target)
        if any(inner.op == "get_attr" for inner in region.graph.nodes):
            continue
        inputs = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        with graph.inserting_before(node):
            results = graph.graph_copy(
                _inlined(region).graph, dict(zip(inputs, node.args[first + 1 :], strict=True))
            )
        for user in list(node.users):  # each picks one of the results
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)
    return module


def _variable_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose value depends on the input or on a parameter."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            found.add(node)
        elif node.op == "get_attr":
            if isinstance(_fetch(module, str(node.target)), nn.Parameter):
                found.add(node)
        elif op_name(node) not in SHAPE_ONLY and any(
            source in found for source in node.all_input_nodes
        ):
            found.add(node)
    return found


def _fetch(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _is_inplace(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    if op_name(node) == "getitem":
        return _is_view(node.all_input_nodes[0])
    if not isinstance(node.target, OpOverload):
        return False
    returns = node.target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _make_functional(module: fx.GraphModule, variable: set[fx.Node]) -> bool:
    """Replace in-place operations on variable values; False where aliases make that unsafe."""
    graph = module.graph
    position = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_inplace(node):
            continue
        changed = node.args[0]
        if changed not in variable and node not in variable:
            continue
        others = [user for user in changed.users if user is not node]
        functional = getattr(torch.ops.aten, op_name(node).removesuffix("_"), None)
        overload = getattr(functional, node.target._overloadname, None)
        unsafe = any(_is_view(user) for user in others) or _seen_later(changed, node, position)
        if unsafe or overload is None or changed.op in ("placeholder", "get_attr"):
            return False
        node.target = overload
        for user in others:
            if position[user] > position[node]:
                user.replace_input_with(changed, node)
    module.recompile()
    return True


def _seen_later(changed: fx.Node, node: fx.Node, position: Mapping[fx.Node, int]) -> bool:
    """Whether a tensor that ``changed`` is a view of is used again after ``node``."""
    while _is_view(changed):
        base = changed.all_input_nodes[0]
        if base.op != "call_function":
            return True
        if any(user is not changed and position[user] > position[node] for user in base.users):
            return True
        if any(user is not changed and _is_view(user) for user in base.users):
            return True
        changed = base
    return False


def _names(
    module: fx.GraphModule, model: nn.Module, named: Iterator[tuple[str, Tensor]]
) -> dict[str, str]:
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    canonical = tensor_names(model)
    for name, tensor in named:
        names[name] = first.setdefault(id(tensor), canonical[name])
    targets = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    return {target: names[target] for target in sorted(targets) if target in names}
