# SPDX-License-Identifier: Apache-2.0
"""Proving: numbers before and after a compaction."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dessilbi.graph.inputs import Arguments


@dataclass(frozen=True)
class Proof:
    """What compaction did, in numbers.

    ``relative_diff`` is the certificate: the largest difference of an element of an output in
    float64, divided by how much that element varies over the probes (see
    ``compaction/comparing.py``; of whole numbers, the share that differs). ``max_abs_diff`` is the
    largest difference in the model's own type, not divided. ``form`` is ``"module"`` (the class is
    kept), ``"sized module"`` (attributes that hold sizes follow as well; the notes name them) or
    ``"program"`` (the exported operations, for inference). ``sparse_bytes`` is what the smaller
    model takes where every tensor is stored in its smallest form, see :func:`sparse_bytes`; it is
    below ``bytes_after`` where single elements are dead inside living rows. ``kept_zero`` counts
    dead units that a layer needs, ``rounded`` those that stay so that a width is a multiple. MACs
    are those of one sample, as everywhere (see :class:`Cost`); a latency is the median and spread
    of a forward pass with the example inputs.
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


def measure_latency(
    model: Callable[..., Any], arguments: Arguments, repeats: int
) -> tuple[float, float]:
    """Return median and spread (half the range of the middle half) in milliseconds.

    An accelerator that holds the inputs is waited for: calls return before it has done its work.
    """
    args, kwargs = arguments
    tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    devices = {x.device for x in tensors if x.device.type != "cpu"}
    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            _wait_for(devices)
            start = time.perf_counter()
            model(*args, **kwargs)
            _wait_for(devices)
            times.append(1e3 * (time.perf_counter() - start))
    times = sorted(times[2:])
    quarter = len(times) // 4
    return median(times), (times[-1 - quarter] - times[quarter]) / 2


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)
