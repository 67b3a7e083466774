# SPDX-License-Identifier: Apache-2.0
"""Proving: numbers before and after, and the certificate that two models compute the same."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from dessilbi.graph.program import ExampleInputs, as_arguments, evaluating
from dessilbi.graph.reader import flatten
from dessilbi.inputs import Arguments, describe, draw
from dessilbi.rewriting import wide_literals
from dessilbi.ticket import Ticket


@dataclass(frozen=True)
class Proof:
    """What compaction did, in numbers.

    ``relative_diff`` is the certificate: max |difference| of the outputs in float64 over all
    probes, divided by how much the output itself varies over them. ``max_abs_diff`` is the same in
    the model's own type, not divided. ``form`` is ``"module"`` (the class is kept) or
    ``"program"`` (the exported operations, for inference). ``sparse_bytes`` is what the smaller
    model takes where every tensor is stored in its smallest form, see :func:`sparse_bytes`; it is
    below ``bytes_after`` where single elements are dead inside living rows. ``kept_zero`` counts
    dead units that a layer needs, ``rounded`` those that stay so that a width is a multiple. MACs
    are those of one forward pass with the example inputs; a latency is median and spread.
    """

    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    macs_before: int
    macs_after: int
    max_abs_diff: float
    relative_diff: float
    probes: int
    dead: int
    removed: int
    revived: Mapping[str, int]
    kept_zero: Mapping[str, int]
    form: str
    sparse_bytes: int
    notes: tuple[str, ...] = ()
    rounded: Mapping[str, int] = field(default_factory=dict)
    latency_ms_before: tuple[float, float] | None = None
    latency_ms_after: tuple[float, float] | None = None

    def __str__(self) -> str:
        """A small table."""
        rows = [
            ("parameters", f"{self.params_before:,}", f"{self.params_after:,}"),
            ("bytes", f"{self.bytes_before:,}", f"{self.bytes_after:,}"),
            ("MACs", f"{self.macs_before:,}", f"{self.macs_after:,}"),
        ]
        if self.latency_ms_before and self.latency_ms_after:
            told = [
                f"{m:.2f} +- {s:.2f}" for m, s in (self.latency_ms_before, self.latency_ms_after)
            ]
            rows.append(("latency ms", *told))  # type: ignore[arg-type]
        lines = [f"{name:<12}{before:>18}{after:>18}" for name, before, after in rows]
        if self.sparse_bytes < self.bytes_after:
            lines.append(f"{'sparse bytes':<12}{'':>18}{self.sparse_bytes:>18,}")
        lines.append(f"max |difference| {self.max_abs_diff:.3g} on {self.probes} probes")
        lines.append(f"relative, float64 {self.relative_diff:.3g}")
        lines.append(f"removed {self.removed} of {self.dead} dead units, form: {self.form}")
        for label, found in (
            ("revived", self.revived),
            ("kept as zeros", self.kept_zero),
            ("kept as zeros to round a width up", self.rounded),
        ):
            lines += [f"{label}: {count} of {name}" for name, count in found.items()]
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Return plain values; latencies as ``..._ms_...`` and ``..._spread_...``."""
        told = asdict(self) | {"notes": list(self.notes)}
        for when in ("before", "after"):
            found = told.pop(f"latency_ms_{when}")
            told[f"latency_ms_{when}"], told[f"latency_spread_ms_{when}"] = found or (None, None)
        return told


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or infinite weights or statistics.

    Raises:
        ValueError: It has some; the tensor is named.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        is_mask = not isinstance(tensor, nn.Parameter) and not bool(tensor.isnan().any())
        if not is_mask and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that are not finite: restore a sound checkpoint")


def probes_of(example_inputs: ExampleInputs, count: int = 2) -> list[Arguments]:
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
        return [floating(model(*args, **kwargs)) for args, kwargs in probes]


def floating(value: Any) -> list[Tensor]:
    """Return the floating tensors in an answer of a model, in order."""
    if hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, name) for name in value.__dataclass_fields__]
    return [x for x in flatten(value) if isinstance(x, Tensor) and x.is_floating_point()]


def variation(found: Sequence[Sequence[Tensor]]) -> float:
    """Return how much the outputs differ between probes, at most."""
    first = found[0]
    gaps = [(a - b).abs().max() for other in found[1:] for a, b in zip(first, other, strict=True)]
    return max((float(gap) for gap in gaps), default=0.0)


def magnitude(found: Sequence[Sequence[Tensor]]) -> float:
    """Return max |output|."""
    return max((float(x.abs().max()) for some in found for x in some if x.numel()), default=0.0)


def tells(spread: float, size: float) -> bool:
    """Return whether outputs that vary by ``spread`` and are up to ``size`` can show a mistake."""
    return spread > 1e-4 * size


def relative(gap: float, spread: float, size: float) -> float:
    """Return a difference relative to variation (to size, where variation is near rounding)."""
    if size == 0:
        return gap
    return gap / (spread if tells(spread, size) else 1e3 * size)


@dataclass(frozen=True)
class Reference:
    """A float64 model, probes, its outputs, and how much these vary against their size.

    ``factor`` is what the probes' values were multiplied by; ``runner`` computes the outputs where
    the model itself cannot in float64.
    """

    model: nn.Module
    runner: nn.Module | None
    probes: list[Arguments]
    expected: list[list[Tensor]]
    variation: float
    size: float
    factor: float

    @property
    def tells(self) -> bool:
        """Whether rounding is far smaller than what the input does to the output."""
        return tells(self.variation, self.size)

    def certify(self, candidate: nn.Module) -> float:
        """Return the largest difference, relative to variation (to size where that is rounding)."""
        with wide_literals():
            gap = difference(self.expected, outputs(candidate, self.probes))
        return relative(gap, self.variation, self.size)


def find_references(
    closed: nn.Module, ticket: Ticket, example_inputs: ExampleInputs
) -> list[Reference]:
    """Return the model in float64 with probes that tell, and a calibrated copy if they do not.

    In a net whose signal fades (untrained, foreign statistics) inputs move the output by less than
    rounding. Then the same cut is also certified on a copy whose batch norms fit the probes and
    whose all-zero weights (an untrained head) are drawn at random.

    Raises:
        ValueError: The output does not depend on the input.
    """
    probes = probes_of(example_inputs)
    plain = _reference(copy.deepcopy(closed).double(), probes)
    if plain.tells:
        return [plain]
    awake = _wake(copy.deepcopy(closed).double(), ticket)
    calibrated = _reference(_calibrate(awake, wide(probes[0])), probes)
    if calibrated.tells:
        return [plain, calibrated]
    raise ValueError(_SILENT)


_SILENT = (
    "the output of the masked model does not depend on the input, so nothing can be "
    "certified: a layer without a bypass is wholly dead; choose a denser ticket"
)


def find_reference(model: nn.Module, example_inputs: ExampleInputs, runner: nn.Module) -> Reference:
    """Return what ``runner`` computes in float64 in the place of ``model``.

    Raises:
        ValueError: The output does not depend on the input.
    """
    found = _reference(model, probes_of(example_inputs), runner)
    if not found.tells:
        raise ValueError(_SILENT)
    return found


def _reference(
    model: nn.Module, probes: Sequence[Arguments], runner: nn.Module | None = None
) -> Reference:
    """Return the reference of the first of several input scales that tells, or the best one."""
    best = None
    for factor in (1.0, 1e2, 1e4):
        wider = [wide(probe, factor) for probe in probes]
        with wide_literals():
            found = outputs(runner or model, wider)
        new = Reference(model, runner, wider, found, variation(found), magnitude(found), factor)
        if best is None or new.variation * best.size > best.variation * new.size:
            best = new
        if best.tells:
            break
    assert best is not None
    return best


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


def difference(one: Sequence[Sequence[Tensor]], two: Sequence[Sequence[Tensor]]) -> float:
    """Return max |a - b|, infinite where shapes or finiteness differ."""
    worst = 0.0
    for mine, theirs in zip(one, two, strict=True):
        if len(mine) != len(theirs) or any(
            a.shape != b.shape for a, b in zip(mine, theirs, strict=True)
        ):
            return float("inf")
        for a, b in zip(mine, theirs, strict=True):
            gap = float((a - b).abs().max()) if a.numel() else 0.0
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def sparse_bytes(tensors: Mapping[str, Tensor], alive: Mapping[str, Tensor]) -> int:
    """Return the bytes of ``tensors``, each in the smallest of three forms.

    The forms are dense; one bit per element and the living values; and CSR with int32 indices
    (a row per index of dimension 0).

    Args:
        tensors: Parameters and buffers by name.
        alive: Boolean masks for some of them; what is not 0 counts as alive in any case.

    >>> mask = torch.zeros(10, 64, dtype=torch.bool)
    >>> mask[0, :3] = True
    >>> sparse_bytes({"w": torch.ones(10, 64) * mask}, {"w": mask})  # dense 2560, bits 92, CSR 68
    68
    """
    total = 0
    for name, tensor in tensors.items():
        count, width = tensor.numel(), tensor.element_size()
        forms = [count * width]
        if name in alive and tensor.dim():
            living = int((alive[name].to(tensor.device) | (tensor != 0)).sum())
            forms += [
                (count + 7) // 8 + living * width,
                4 * (tensor.shape[0] + 1) + living * (4 + width),
            ]
        total += min(forms)
    return total


def count_macs(model: nn.Module, arguments: Arguments) -> int:
    """Return multiply-accumulates of one forward pass with these inputs."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:  # shapes suffice
        with fake:
            return _count(model, pytree.tree_map_only(Tensor, fake.from_tensor, arguments))
    except Exception:  # forward looks at values
        return _count(model, arguments)


def _count(model: nn.Module, arguments: Arguments) -> int:
    counter = FlopCounterMode(display=False)
    args, kwargs = arguments
    with torch.no_grad(), counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


def measure_latency(
    model: Callable[..., Any], arguments: Arguments, repeats: int
) -> tuple[float, float]:
    """Return median and spread (half the range of the middle half) in milliseconds."""
    args, kwargs = arguments
    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            start = time.perf_counter()
            model(*args, **kwargs)
            times.append(1e3 * (time.perf_counter() - start))
    times = sorted(times[2:])
    quarter = len(times) // 4
    return median(times), (times[-1 - quarter] - times[quarter]) / 2
