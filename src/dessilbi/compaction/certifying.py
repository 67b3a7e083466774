# SPDX-License-Identifier: Apache-2.0
"""Certifying: whether two models compute the same, in float64 and on inputs that tell."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dessilbi.blocks.ticket import Ticket
from dessilbi.compaction.comparing import TELLS, compare, compared, sharpness, unseen
from dessilbi.compaction.rewriting import wide_literals
from dessilbi.graph.inputs import Arguments, describe, draw
from dessilbi.graph.program import ExampleInputs, as_arguments, evaluating

DRAWN = 3  # the example and two drawn probes


class SilentError(ValueError):
    """What a model answers says nothing about what it computes."""


def probes_of(example_inputs: ExampleInputs, count: int = DRAWN - 1) -> list[Arguments]:
    """Return the example inputs and ``count`` others of the same kind, on the same devices."""
    args, kwargs = as_arguments(example_inputs)

    def beside(value: Any, example: Any) -> Any:
        return value.to(example.device) if isinstance(value, Tensor) else value

    others = [
        (
            tuple(beside(x, e) for x, e in zip(drawn[0], args, strict=True)),
            {name: beside(x, kwargs[name]) for name, x in drawn[1].items()},
        )
        for drawn in draw(describe(example_inputs), count)
    ]
    return [(args, kwargs), *others]


def wide(arguments: Arguments, factor: float = 1.0) -> Arguments:
    """Return the same arguments in float64, times a factor."""

    def double(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() * factor if is_float else value

    args, kwargs = arguments
    return tuple(double(x) for x in args), {k: double(x) for k, x in kwargs.items()}


def outputs(model: nn.Module, probes: Sequence[Arguments]) -> list[list[Tensor]]:
    """Return every tensor the model returns, per probe, in eval mode."""
    with evaluating(model), torch.no_grad():
        return [compared(model(*args, **kwargs)) for args, kwargs in probes]


def left_out(model: nn.Module, arguments: Arguments) -> list[str]:
    """Say what a model returns beside tensors, which nobody compares."""
    args, kwargs = arguments
    with evaluating(model), torch.no_grad():
        types = unseen(model(*args, **kwargs))
    return [f"what the model returns as {', '.join(types)} was not compared"] if types else []


@dataclass(frozen=True)
class Reference:
    """A float64 model and what it computes for some probes.

    Args:
        model: The model.
        runner: Computes the outputs where the model itself cannot in float64.
        probes: Inputs.
        numbers: Their places in :func:`probes_of`, without those that the model cannot take; higher
            numbers for probes in which only one argument is drawn.
        expected: Output tensors per probe.
        factor: What the values of the probes were multiplied by.
    """

    model: nn.Module
    runner: nn.Module | None
    probes: list[Arguments]
    numbers: list[int]
    expected: list[list[Tensor]]
    factor: float

    @property
    def tells(self) -> bool:
        """Whether rounding is far smaller than what the input does to the output."""
        return sharpness(self.expected) > TELLS

    def certify(self, candidate: nn.Module) -> float:
        """Return the relative difference of its answers, see :func:`compare`."""
        with wide_literals():
            return compare(self.expected, outputs(candidate, self.probes)).relative


def find_references(
    closed: nn.Module, ticket: Ticket, example_inputs: ExampleInputs
) -> list[Reference]:
    """Return the model in float64 with probes that tell, and a calibrated copy if they do not.

    In a net whose signal fades (untrained, foreign statistics) inputs move the output by less than
    rounding. Then the same cut is also certified on a copy whose batch norms fit the probes and
    whose all-zero weights (an untrained head) are drawn at random.

    Raises:
        SilentError: The output does not depend on the input, or cannot be compared.
    """
    probes = probes_of(example_inputs)
    plain = _reference(copy.deepcopy(closed).double(), probes)
    if plain.tells:
        return [plain]
    awake = _wake(copy.deepcopy(closed).double(), ticket)
    calibrated = _reference(_calibrate(awake, wide(probes[0])), probes)
    if calibrated.tells:
        return [plain, calibrated]
    raise _silent(plain)


def _silent(reference: Reference) -> SilentError:
    """Return why nothing can be certified."""
    what = "the output of the masked model does not depend on the input"
    why = "a layer without a bypass is wholly dead; choose a denser ticket"
    if not any(x.is_floating_point() for some in reference.expected for x in some):
        what = "the model returns no tensor of floating type"
        why = "compact the part of it that computes numbers"
    elif len(reference.probes) == 1:
        what = "the model takes no inputs but the examples themselves (values drawn like them fail)"
        why = "give examples in which every number may stand anywhere"
    return SilentError(f"{what}, so nothing can be certified: {why}")


def find_reference(model: nn.Module, example_inputs: ExampleInputs, runner: nn.Module) -> Reference:
    """Return what ``runner`` computes in float64 in the place of ``model``.

    Raises:
        SilentError: The output does not depend on the input, or cannot be compared.
    """
    found = _reference(model, probes_of(example_inputs), runner)
    if not found.tells:
        raise _silent(found)
    return found


def _reference(
    model: nn.Module, probes: Sequence[Arguments], runner: nn.Module | None = None
) -> Reference:
    """Return the reference of the first of several input scales that tells, or the best one."""
    best = None
    for factor in (1.0, 1e2, 1e4):
        wider = [wide(probe, factor) for probe in (*probes, *_one_by_one(*probes[:2]))]
        try:
            with wide_literals():
                found = _usable(runner or model, wider)
        except Exception:  # too large for this model
            if best is None:
                raise
            break
        inputs = [wider[number] for number in found]
        new = Reference(model, runner, inputs, list(found), list(found.values()), factor)
        if best is None or sharpness(new.expected) > sharpness(best.expected):
            best = new
        if best.tells:
            break
    assert best is not None
    return best


def _one_by_one(example: Arguments, drawn: Arguments) -> list[Arguments]:
    """Return the example with one tensor drawn, for each of them."""
    (args, kwargs), (others, named) = example, drawn
    found: list[Arguments] = []
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            found.append(((*args[:place], others[place], *args[place + 1 :]), kwargs))
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            found.append((args, {**kwargs, name: named[name]}))
    return found


def _usable(model: nn.Module, probes: Sequence[Arguments]) -> dict[int, list[Tensor]]:
    """Return outputs by probe, without drawn probes that the model cannot take."""
    found: dict[int, list[Tensor]] = {}
    for number, probe in enumerate(probes):
        if number >= DRAWN and len(found) > 1:
            break
        try:
            values = outputs(model, [probe])[0]
        except Exception:  # a number out of range, sizes that do not agree
            if number == 0:
                raise
            continue
        if not any(bool(x.isnan().any()) for x in values):
            found[number] = values
    if 0 not in found:
        raise SilentError(
            "the masked model gives NaN for the example inputs: give inputs that it can handle"
        )
    return found


def _wake(model: nn.Module, ticket: Ticket) -> nn.Module:
    """Draw weights that are all zero, where the ticket lets them live."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1 and not bool(param.any()):
                noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                param.copy_(noise / param[0].numel() ** 0.5)
    return ticket.apply_(model)


def _calibrate(model: nn.Module, arguments: Arguments) -> nn.Module:
    """Set the statistics of batch norms to those of what they read."""

    def fit(module: Any, inputs: tuple[Tensor, ...]) -> None:
        lines = inputs[0].transpose(0, 1).flatten(1)
        spread = lines.var(1, correction=0)
        module.running_mean.copy_(lines.mean(1))
        module.running_var.copy_(torch.where(spread > 1e-12, spread, 1.0))

    handles = [
        module.register_forward_pre_hook(fit)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    outputs(model, [arguments])
    for handle in handles:
        handle.remove()
    return model
