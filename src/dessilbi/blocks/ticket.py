# SPDX-License-Identifier: Apache-2.0
"""Ticket: which blocks of which tensors live. Support, mask and ticket are this one noun."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dessilbi.blocks.enforcing import Enforcement
from dessilbi.blocks.naming import canonical_names, unwrap
from dessilbi.blocks.sharding import local, local_part
from dessilbi.blocks.structure import Block, block_size, expand, grid_shape, resolve
from dessilbi.files.storage import from_json, to_json, told_by, write_atomic
from dessilbi.files.tensorfiles import open_tensors

FORMAT = "dessilbi.ticket"
VERSION = 1

# What reading a damaged or hostile file can raise, before we say so in one sentence.
_UNREADABLE = (
    safetensors.SafetensorError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class TensorSpec:
    """What a ticket knows of one structured tensor: its shape and how it is cut into blocks."""

    shape: tuple[int, ...]
    block: Block

    def __post_init__(self) -> None:
        """Check that the block fits the shape; files have lists where blocks have tuples."""
        object.__setattr__(self, "block", resolve(self.block, self.shape))

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks along each dimension."""
        return grid_shape(self.block, self.shape)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return prod(self.grid)

    @property
    def block_size(self) -> int:
        """Elements per block."""
        return block_size(self.block, self.shape)


class Ticket(Mapping[str, Tensor]):
    """An immutable mapping from parameter name to a boolean mask with one entry per block.

    Names are those of the plain model (no ``module.`` or ``_orig_mod.``). Masks have the shape of
    the tensor's grid of blocks; :meth:`mask_of` gives the element-wise mask.

    Args:
        masks: name -> bool tensor of the grid's shape (True: the block lives). Copied to the CPU.
        specs: name -> shape and block of the same tensors.
        origin: Where the ticket came from: plain JSON values, for people and files.

    Raises:
        ValueError: Names or shapes of masks and specs disagree.

    >>> spec = TensorSpec(shape=(2, 3), block=(1, None))
    >>> ticket = Ticket({"fc.weight": torch.tensor([[True], [False]])}, {"fc.weight": spec})
    >>> ticket.density
    0.5
    """

    __slots__ = ("_masks", "_origin", "_specs")

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        specs: Mapping[str, TensorSpec],
        origin: Mapping[str, Any] | None = None,
    ):
        if set(masks) != set(specs):
            odd = sorted(set(masks) ^ set(specs))
            raise ValueError(f"masks and specs name different tensors: {', '.join(odd)}")
        self._masks = {}
        for name, mask in masks.items():
            if mask.dtype != torch.bool or tuple(mask.shape) != specs[name].grid:
                raise ValueError(
                    f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}: "
                    f"it must be torch.bool of shape {specs[name].grid}, one entry per block"
                )
            self._masks[name] = mask.detach().to("cpu", copy=True)
        self._specs = MappingProxyType({name: specs[name] for name in masks})
        self._origin = MappingProxyType(dict(origin or {}))

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and block of each tensor, by name."""
        return self._specs

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where the ticket came from: plain values."""
        return self._origin

    def __getitem__(self, name: str) -> Tensor:
        """Return a copy of the block mask of ``name``."""
        return self._masks[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """Tickets are equal if they cut the same tensors alike and keep the same blocks."""
        if not isinstance(other, Ticket):
            return NotImplemented
        return self.specs == other.specs and all(
            torch.equal(mask, other._masks[name]) for name, mask in self._masks.items()
        )

    __hash__ = None  # type: ignore[assignment]  # equal by content, like other mappings

    def __reduce__(self) -> tuple[Any, ...]:
        return Ticket, (dict(self._masks), dict(self.specs), dict(self.origin))

    def mask_of(self, name: str) -> Tensor:
        """Return the element-wise mask of a tensor, a bool tensor of its shape."""
        spec = self.specs[name]
        return expand(self._masks[name], spec.block, spec.shape).clone()

    @property
    def kept_elements(self) -> int:
        """Number of elements in living blocks."""
        return sum(
            int(mask.sum()) * self.specs[name].block_size for name, mask in self._masks.items()
        )

    @property
    def total_elements(self) -> int:
        """Number of elements of the structured tensors."""
        return sum(prod(spec.shape) for spec in self.specs.values())

    @property
    def density(self) -> float:
        """Share of the structured tensors' elements that is kept, in [0, 1]."""
        return self.kept_elements / self.total_elements if self.total_elements else 0.0

    def densities(self) -> dict[str, float]:
        """Share of blocks kept, per tensor."""
        return {
            name: float(mask.float().mean()) if mask.numel() else 0.0
            for name, mask in self._masks.items()
        }

    def density_of_model(self, model: nn.Module) -> float:
        """Share of ALL parameters of ``model`` that is kept; unstructured ones count as kept."""
        total = sum(p.numel() for p in self._parameters_of(model).values())
        return 1.0 - (self.total_elements - self.kept_elements) / total if total else 1.0

    def apply_(self, model: nn.Module) -> nn.Module:
        """Set dead blocks of ``model`` to zero, in place.

        Returns:
            ``model`` itself.

        Raises:
            ValueError: The model lacks a tensor of the ticket or has it in another shape.
        """
        parameters = self._parameters_of(model)
        with torch.no_grad():
            for name in self._masks:
                param = parameters[name]
                own = local(param)
                own.masked_fill_(~local_part(self.mask_of(name), param).to(own.device), 0)
        return model

    def _parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        own = dict(unwrap(model).named_parameters())
        parameters = dict(zip(canonical_names(list(own)), own.values(), strict=True))
        for name, spec in self.specs.items():
            shape = tuple(parameters[name].shape) if name in parameters else None
            if shape != spec.shape:
                has = (
                    "has no parameter of that name"
                    if shape is None
                    else f"has it with shape {shape}"
                )
                raise ValueError(
                    f"this ticket is for another model: it needs {name} with shape {spec.shape} "
                    f"but the model {has}; pass the model the ticket was made from"
                )
            # A name that has this prefix everywhere is told without it.
            if f"module.{name}" in parameters.keys() - self.specs.keys():
                raise ValueError(
                    f"the model has {name} and module.{name}, and this ticket does not tell "
                    f"them apart: call that part of the model something else than 'module'"
                )
        return parameters

    def enforce(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Enforcement:
        """Keep dead blocks dead while ``optimizer`` trains ``model``.

        Dead is more than a zero weight: weights, gradients and all optimizer state shaped like the
        parameter (momentum, moments, the dual variable v) are zeroed at dead positions, now and
        around every step. Works with any torch optimizer. Gradients are masked as soon as they
        are accumulated, so clipping by norm sees living entries only, and under block_scale
        "sqrt" the threshold counts living entries only. A handle belongs to the optimizer object:
        after loading a checkpoint into a new one, enforce again.

        Args:
            model: The model; its weights are masked at once.
            optimizer: The optimizer that trains it.

        Returns:
            A handle; ``handle.remove()`` gives the blocks their freedom back.

        Raises:
            ValueError: As :meth:`apply_`.
        """
        parameters = self._parameters_of(model)
        return Enforcement(
            {parameters[name]: self.mask_of(name) for name in self._masks}, optimizer
        )

    def digest(self) -> str:
        """Return a checksum of what the ticket keeps of which tensors (not of its origin)."""
        told = hashlib.sha256()
        for name in sorted(self._masks):
            spec = self.specs[name]
            told.update(to_json([name, spec.shape, spec.block]).encode())
            told.update(pack_bits(self._masks[name]).tobytes())
        return told.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the ticket as one safetensors file (one bit per block, a JSON header)."""
        write_atomic(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the content of the file that :meth:`save` writes."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "tensors": {
                name: {"shape": spec.shape, "block": spec.block}
                for name, spec in self.specs.items()
            },
            "origin": dict(self.origin),
            "sha256": self.digest(),
        }
        bits = {name: torch.from_numpy(pack_bits(mask)) for name, mask in self._masks.items()}
        return safetensors.torch.save(bits, metadata={"ticket": to_json(header)})

    @classmethod
    def load(cls, path: str | Path) -> "Ticket":
        """Read a ticket written by :meth:`save`; nothing in the file is ever executed.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, foreign, or of a newer format.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no ticket file {path}; name one that exists")
        try:
            with open_tensors(path, framework="numpy") as file:
                header = from_json((file.metadata() or {}).get("ticket", "{}").encode())
                return cls._from_file(header, file)
        except _UNREADABLE as error:
            raise ValueError(
                f"{path} is not a readable ticket ({told_by(error)}): "
                f"give a file written by Ticket.save or `dessilbi ticket`"
            ) from None

    @classmethod
    def _from_file(cls, header: Any, file: Any) -> "Ticket":
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError("no ticket header")
        if header.get("version") != VERSION:
            raise ValueError(
                f"format version {told_by(header.get('version'), 40)}, this release reads {VERSION}"
            )
        specs = {
            name: TensorSpec(tuple(_whole(n) for n in entry["shape"]), tuple(entry["block"]))
            for name, entry in header["tensors"].items()
        }
        masks = {
            name: unpack_bits(file.get_tensor(name), spec.grid) for name, spec in specs.items()
        }
        ticket = cls(masks, specs, header.get("origin", {}))
        if ticket.digest() != header.get("sha256"):
            raise ValueError("its content does not match its checksum")
        return ticket

    def __repr__(self) -> str:
        """One line on the whole, then one per tensor."""
        kept = f"kept {self.kept_elements:,} of {self.total_elements:,} elements"
        lines = [f"Ticket(density={self.density:.4g}, {kept}{_describe(self.origin)})"]
        width = max((len(name) for name in self._masks), default=0)
        for name, mask in self._masks.items():
            blocks = f"{int(mask.sum()):,} of {mask.numel():,} blocks"
            lines.append(f"  {name:{width}}  {blocks}  {self.specs[name].block}")
        return "\n".join(lines)


def _describe(origin: Mapping[str, Any]) -> str:
    told = [f"{key} {origin[key]}" for key in ("order", "step", "epoch") if key in origin]
    if "density_before" in origin:
        told.append(f"closed from density {origin['density_before']:.4g}")
    return f", {', '.join(told)}" if told else ""


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def pack_bits(mask: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the mask's bits, eight to a byte, in row-major order."""
    return np.packbits(mask.detach().cpu().numpy().reshape(-1))


def unpack_bits(packed: np.ndarray[Any, Any], shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_bits`.

    Raises:
        ValueError: The number of bytes does not belong to ``shape``.
    """
    count = prod(shape)
    if packed.dtype != np.uint8 or packed.shape != ((count + 7) // 8,):
        raise ValueError(f"a mask of {packed.size} bytes cannot hold {count} blocks")
    bits = np.unpackbits(packed, count=count).astype(np.bool_)
    return torch.from_numpy(bits).reshape(tuple(shape))
