# SPDX-License-Identifier: Apache-2.0
"""Saving: a compact model as a folder without pickle or code, and back.

The folder holds the weights, the ticket, answers of the masked model (all safetensors) and a
manifest. The model is built by the caller's factory or a registered name, cut again by the kept
indices, filled, and compared with the answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dessilbi import __version__
from dessilbi.blocks.naming import canonical_name, unwrap
from dessilbi.blocks.ticket import Ticket
from dessilbi.compaction.blueprint import OtherModelError, rebuild
from dessilbi.compaction.compaction import TOLERANCE, Compacted
from dessilbi.compaction.witness import Verdict, Witness, tolerance
from dessilbi.files.storage import DamagedFileError, new_folder, sha256_of, write_atomic
from dessilbi.files.tensorfiles import open_tensors
from dessilbi.graph.inputs import Scalar
from dessilbi.models.registry import Options, build_registered, check_registered
from dessilbi.saving.manifest import (
    FILES,
    TICKET,
    WEIGHTS,
    WITNESS,
    FactoryEntry,
    Manifest,
    cut_entry,
    input_entries,
    read_manifest,
    write_manifest,
)

Factory = Callable[[], nn.Module]


def save_compact(
    compacted: Compacted,
    folder: str | Path,
    *,
    factory: str | None = None,
    options: Options | None = None,
    retrained: bool = False,
    source: Mapping[str, Scalar] | None = None,
) -> Path:
    """Save a compact model: weights and buffers once, the cut, the proof. No pickle, no code.

    Args:
        compacted: What :func:`compact` returned.
        folder: A new or empty folder; it is there whole or not at all.
        factory: A registered name that builds the big model, such as "torchvision:resnet18";
            without it, loading needs the factory.
        options: Its plain keyword arguments, such as num_classes.
        retrained: Say that the weights were trained further after compaction. The folder then
            certifies the model as it is now instead of the masked one.
        source: Plain values to keep for people, such as the run the model came from.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds files.
        ValueError: The weights changed since compaction, an option is not allowed, or the inputs
            cannot be described.
        OSError: The disk is full or not writable; nothing is left behind.

    >>> import tempfile
    >>> from dessilbi.compaction.compaction import compact
    >>> from dessilbi.testing import random_ticket
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(2, 4)
    >>> small = compact(net, random_ticket(net, example_inputs=x, density=0.5), example_inputs=x)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     folder = save_compact(small, place + "/small")
    ...     sorted(file.name for file in folder.iterdir())
    ['manifest.json', 'ticket.safetensors', 'weights.safetensors', 'witness.safetensors']
    """
    if factory is not None:
        check_registered(factory, options or {})
    model, witness, blueprint = compacted.model, compacted.witness, compacted.blueprint
    inputs = input_entries(witness.inputs)
    if retrained:
        witness = witness.answered_by(model)
    verdict = witness.judge(model, folded=blueprint.folded)
    if not verdict.relative_diff <= tolerance(model, exact=TOLERANCE, folded=blueprint.folded):
        raise ValueError(
            f"the model is {verdict.relative_diff:.2g} away from what was certified: it was "
            f"changed after compaction; if you trained it further say retrained=True, "
            f"else compact again"
        )
    named = FactoryEntry(name=factory, options=dict(options or {})) if factory else None
    with new_folder(folder) as place:
        write_atomic(place / WEIGHTS, safetensors.torch.save(_stored(model)))
        answers = {
            f"{probe}.{number}": tensor.clone(memory_format=torch.contiguous_format)
            for probe, found in enumerate(witness.expected)
            for number, tensor in enumerate(found)
        }
        write_atomic(place / WITNESS, safetensors.torch.save(answers))
        compacted.closed.save(place / TICKET)
        manifest = Manifest(
            written_by=__version__,
            torch=torch.__version__,
            model=_class_path(model),
            factory=named,
            **dict(cut_entry(blueprint)),
            retrained=retrained,
            inputs=inputs,
            factor=witness.factor,
            ticket=compacted.closed.digest(),
            proof=compacted.proof.to_json(),
            source=dict(source or {}),
            files={name: sha256_of(place / name) for name in FILES},
        )
        write_manifest(place, manifest)
    return Path(folder)


@dataclass(frozen=True)
class Opened:
    """A saved compact model: rebuilt, filled, and compared with the answers it came with.

    ``verdict`` says how far it is from them in float64, ``tolerance`` what is accepted
    (relative).
    """

    folder: Path
    model: nn.Module
    manifest: Manifest
    ticket: Ticket
    witness: Witness
    verdict: Verdict
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the model computes what was certified."""
        return self.verdict.relative_diff <= self.tolerance


def load_compact(factory: Factory | str | None, folder: str | Path) -> nn.Module:
    """Load a saved compact model; nothing in the folder is executed.

    Args:
        factory: What builds the big model: a function without arguments, such as
            ``lambda: resnet18(num_classes=10)``; a registered name ("torchvision:resnet18"), which
            takes the options of the manifest; or None for the name in the manifest.
        folder: What :func:`save_compact` wrote.

    Returns:
        The small model on the factory's device, in eval mode.

    Raises:
        FileNotFoundError: The folder or a file of it is not there.
        ValueError: A file is damaged, was changed, or is of a newer format; or the factory makes
            another model than the one that was compacted.
        TypeError: The factory is a model, and no function that builds one.
        ImportError: A registered name needs a library that is not installed.

    >>> import tempfile
    >>> from dessilbi.compaction.compaction import compact
    >>> from dessilbi.testing import random_ticket
    >>> def factory():
    ...     first, last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
    ...     return torch.nn.Sequential(first, torch.nn.ReLU(), last)
    >>> net, x = factory(), torch.randn(2, 4)
    >>> small = compact(net, random_ticket(net, example_inputs=x, density=0.5), example_inputs=x)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     load_compact(factory, save_compact(small, place + "/small"))[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    if isinstance(factory, torch.nn.Module):
        raise TypeError(
            f"load_compact was given a {type(factory).__name__} itself: give a function that "
            f"builds the big model, for example lambda: {type(factory).__name__}(...)"
        )
    return open_certified(factory, folder).model


def open_certified(factory: Factory | str | None, folder: str | Path) -> Opened:
    """Load a saved compact model that computes what was certified; see :func:`load_compact`."""
    opened = open_compact(factory, folder)
    if not opened.holds:
        raise OtherModelError(
            f"its answers are {opened.verdict.relative_diff:.2g} away, relative to what the input "
            f"does to them"
        )
    return opened


def open_compact(factory: Factory | str | None, folder: str | Path) -> Opened:
    """Load a saved compact model and judge it, whatever the verdict; see :func:`load_compact`."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        blueprint, inputs = manifest.blueprint(), manifest.described_inputs()
    except ValueError as error:
        raise DamagedFileError(f"{folder} cannot be used: {error}") from None
    ticket = Ticket.load(folder / TICKET)
    witness = Witness(inputs, manifest.factor, _answers(folder / WITNESS))
    fresh = _fresh(factory, manifest, folder)
    try:
        small = rebuild(_typed(fresh, folder / WEIGHTS), blueprint, inputs)
    except (OtherModelError, DamagedFileError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if blueprint.form == "program" and manifest.torch != torch.__version__:
            reason += f"; it was saved with torch {manifest.torch}, this is {torch.__version__}"
        raise OtherModelError(reason) from None
    _fill(small, folder / WEIGHTS)
    small.eval()
    accepted = tolerance(small, exact=TOLERANCE, folded=blueprint.folded)
    verdict = witness.judge(small, folded=blueprint.folded)
    return Opened(folder, small, manifest, ticket, witness, verdict, accepted)


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Return what a file keeps of a model: parameters and persistent buffers, shared ones once."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in _slots(model).items()
    }


def _slots(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors themselves by name; buffers that are not persistent belong to the code."""
    passing = {
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        for key in module._non_persistent_buffers_set
    }
    named = (*model.named_parameters(), *model.named_buffers())
    return {canonical_name(name): tensor for name, tensor in named if name not in passing}


def _class_path(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _fresh(factory: Factory | str | None, manifest: Manifest, folder: Path) -> nn.Module:
    if callable(factory):
        model = factory()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the factory returned a {type(model).__name__}: it must return the model that was "
                f"compacted, a torch.nn.Module"
            )
        return unwrap(model)
    named = manifest.factory
    name = factory or (named.name if named else None)
    if name is None:
        raise ValueError(
            f"{folder} does not name a registered model ({manifest.model} was compacted): "
            f"give a factory, load_compact(lambda: YourModel(), folder)"
        )
    return build_registered(name, named.options if named else {})


def _typed(model: nn.Module, file: Path) -> nn.Module:
    """Give a fresh model the floating type of the file, where there is only one."""
    with _weights(file) as weights:
        types = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    floating = [_FLOATING[name] for name in types if name in _FLOATING]
    return model.to(floating[0]) if len(floating) == 1 else model


_FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _weights(file: Path) -> Any:
    return open_tensors(file)


def _fill(model: nn.Module, file: Path) -> None:
    """Put the weights of a file into a model; names and shapes are compared first."""
    slots = _slots(model)
    with _weights(file) as weights:
        names = set(weights.keys())
        for name in sorted(names ^ set(slots)):
            where = "the file has no" if name in slots else "it has no"
            raise OtherModelError(f"{where} {name}")
        for name, tensor in slots.items():
            shape = tuple(weights.get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                raise OtherModelError(f"{name} is {tuple(tensor.shape)}, not {shape}")
        for name, tensor in slots.items():
            value = weights.get_tensor(name)
            if value.is_floating_point() != tensor.is_floating_point():
                raise OtherModelError(f"{name} is {tensor.dtype}, not {value.dtype}")
            tensor.data = value.to(tensor.device, copy=True)  # not a view of the file


def _answers(file: Path) -> list[list[Tensor]]:
    found: dict[int, dict[int, Tensor]] = {}
    with _weights(file) as answers:
        for name in answers.keys():  # noqa: SIM118
            probe, dot, number = name.partition(".")
            if not (dot and probe.isdecimal() and number.isdecimal()):
                raise DamagedFileError(f"{file} holds {name!r}, which is not an answer")
            found.setdefault(int(probe), {})[int(number)] = answers.get_tensor(name)
    if sorted(found) != list(range(len(found))) or len(found) < 2:
        raise DamagedFileError(f"{file} does not hold two answers: restore it or compact again")
    return [[found[probe][n] for n in sorted(found[probe])] for probe in sorted(found)]
