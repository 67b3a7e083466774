# SPDX-License-Identifier: Apache-2.0
"""Manifest: the JSON file of a saved compact model, checked before anything in it is used.

It says what was cut and holds the checksums of all files, its own included. Checksums tell damage
and careless changes; who can write the folder can also write new checksums.
"""

import json
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dessilbi.compaction.blueprint import Blueprint, Form, Size
from dessilbi.cuts.cutting import Cut
from dessilbi.files.folders import MANIFEST, kind_of
from dessilbi.files.sealing import checksum_of
from dessilbi.files.storage import (
    LARGEST,
    DamagedFileError,
    as_json,
    sha256_of,
    to_json,
    told_by,
    write_json,
)
from dessilbi.graph.inputs import FixedInput, Input, Scalar, TensorInput

FORMAT = "dessilbi.compact"
VERSION = 1
NAME = MANIFEST
FileName = Literal["weights.safetensors", "witness.safetensors", "ticket.safetensors"]
FILES: tuple[FileName, ...] = get_args(FileName)
WEIGHTS, WITNESS, TICKET = FILES

Whole = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KeptEntry(_Part):
    """Indices of one dimension that stay: bits packed eight to a byte, in base64."""

    dim: Annotated[int, Field(ge=0, le=15)]
    size: Positive
    groups: Positive = 1
    kept: str


class SizeEntry(_Part):
    """An attribute of a module that holds a size."""

    module: str
    attribute: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
    old: Whole
    new: Whole


class TensorEntry(_Part):
    """A tensor that forward takes; see TensorInput."""

    kind: Literal["tensor"] = "tensor"
    name: str | None
    shape: Annotated[tuple[Whole, ...], Field(max_length=16)]
    dtype: str
    mean: float
    spread: float
    low: int
    high: int


class FixedEntry(_Part):
    """Another argument of forward."""

    kind: Literal["fixed"] = "fixed"
    name: str | None
    value: Scalar


class FactoryEntry(_Part):
    """A registered model and its plain options."""

    name: str
    options: dict[str, bool | int | float | str]


class CutEntry(_Part):
    """How a fresh model becomes the small one; see Blueprint."""

    form: Form
    cuts: dict[str, tuple[KeptEntry, ...]]
    biases: tuple[str, ...] = ()
    sizes: tuple[SizeEntry, ...] = ()
    folded: bool = False

    def blueprint(self) -> Blueprint:
        """Return the cut.

        Raises:
            ValueError: The kept indices make no sense.
        """
        cuts = {name: tuple(_cut(name, entry) for entry in own) for name, own in self.cuts.items()}
        sizes = tuple(Size(s.module, s.attribute, s.old, s.new) for s in self.sizes)
        return Blueprint(self.form, cuts, self.biases, sizes, self.folded)


def cut_entry(blueprint: Blueprint) -> CutEntry:
    """Return a blueprint as plain values."""
    return CutEntry(
        form=blueprint.form,
        cuts={name: kept_entries(cuts) for name, cuts in blueprint.cuts.items()},
        biases=blueprint.biases,
        sizes=tuple(SizeEntry(**vars(size)) for size in blueprint.sizes),
        folded=blueprint.folded,
    )


class Manifest(_Part):
    """What a saved compact model says of itself. ``model`` and ``source`` are for people only."""

    format: Literal["dessilbi.compact"] = "dessilbi.compact"
    version: Literal[1] = 1
    written_by: str
    torch: str
    model: str
    factory: FactoryEntry | None
    form: Form
    cuts: dict[str, tuple[KeptEntry, ...]]
    biases: tuple[str, ...]
    sizes: tuple[SizeEntry, ...]
    folded: bool
    retrained: bool
    inputs: Annotated[
        tuple[Annotated[TensorEntry | FixedEntry, Field(discriminator="kind")], ...],
        Field(max_length=64),
    ]
    factor: Annotated[float, Field(gt=0, le=1e6)]
    ticket: Digest
    proof: dict[str, Any]
    source: dict[str, Scalar]
    files: dict[FileName, Digest]

    def blueprint(self) -> Blueprint:
        """Return the cut.

        Raises:
            ValueError: The kept indices make no sense.
        """
        return CutEntry(**{name: getattr(self, name) for name in CutEntry.model_fields}).blueprint()

    def described_inputs(self) -> tuple[Input, ...]:
        """Return what forward takes.

        Raises:
            ValueError: A size or a type is not allowed.
        """
        return tuple(
            TensorInput(**entry.model_dump(exclude={"kind"}))
            if isinstance(entry, TensorEntry)
            else FixedInput(entry.name, entry.value)
            for entry in self.inputs
        )


def kept_entries(cuts: tuple[Cut, ...]) -> tuple[KeptEntry, ...]:
    """Return kept indices as plain values.

    >>> kept_entries((Cut("w", 0, 3, np.array([0, 2])),))
    (KeptEntry(dim=0, size=3, groups=1, kept='oA=='),)
    """
    entries = []
    for cut in cuts:
        bits = np.zeros(cut.size, np.bool_)
        bits[cut.index] = True
        packed = b64encode(np.packbits(bits).tobytes()).decode()
        entries.append(KeptEntry(dim=cut.dim, size=cut.size, groups=cut.groups, kept=packed))
    return tuple(entries)


def _cut(name: str, entry: KeptEntry) -> Cut:
    try:
        packed = np.frombuffer(b64decode(entry.kept, validate=True), np.uint8)
    except (NotBase64, ValueError):
        raise ValueError(f"the kept indices of {name} are not base64") from None
    if len(packed) != (entry.size + 7) // 8 or entry.size % entry.groups:
        raise ValueError(f"{len(packed)} bytes cannot hold the {entry.size} indices of {name}")
    bits = np.unpackbits(packed, count=entry.size).astype(np.bool_)
    counts = bits.reshape(entry.groups, -1).sum(axis=1)
    if not bits.any() or len(np.unique(counts[counts > 0])) > 1:
        raise ValueError(f"the kept indices of {name} leave nothing or unequal groups")
    return Cut(name, entry.dim, entry.size, np.flatnonzero(bits), entry.groups)


def input_entries(inputs: tuple[Input, ...]) -> tuple[TensorEntry | FixedEntry, ...]:
    """Return a description of inputs as plain values.

    Raises:
        ValueError: An argument is neither a tensor nor a plain value.
    """
    entries: list[TensorEntry | FixedEntry] = []
    for item in inputs:
        if isinstance(item, TensorInput):
            entries.append(TensorEntry.model_validate(vars(item)))
        elif item.value is None or isinstance(item.value, bool | int | float | str):
            entries.append(FixedEntry(name=item.name, value=item.value))
        else:
            raise ValueError(
                f"an argument of forward is a {type(item.value).__name__}, which cannot be "
                f"described in a file: compact with a forward that takes tensors and plain values"
            )
    return tuple(entries)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with its own checksum."""
    told = json.loads(to_json(manifest.model_dump(mode="json")))
    told["sha256"] = checksum_of(told)
    write_json(folder / NAME, told)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of a folder, and the checksums of all of its files.

    Raises:
        FileNotFoundError: The folder is not a saved compact model, or a file is missing.
        ValueError: A file is damaged, was changed, is a link, or is of a newer format.
    """
    folder = Path(folder)
    path = folder / NAME
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} is not a saved compact model: {kind_of(folder, NAME)}; name a folder that "
            f"save_compact or `dessilbi compact` has written"
        )
    _check_plain(path)
    if path.stat().st_size > LARGEST:
        raise DamagedFileError(f"{path} is larger than {LARGEST >> 20} MiB: it is not ours")
    manifest = _parse(path, path.read_bytes())
    for name in FILES:
        file = folder / name
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: restore it from a copy or compact again")
        _check_plain(file)
        if sha256_of(file) != manifest.files.get(name):
            raise DamagedFileError(
                f"{file} does not match its checksum in {NAME}: it is damaged or was changed; "
                f"restore it from a copy or compact again"
            )
    return manifest


def _check_plain(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise DamagedFileError(
            f"{path} is a link or not a plain file: a saved compact model holds plain files only"
        )


def _parse(path: Path, content: bytes) -> Manifest:
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise DamagedFileError(f"{path} is not a manifest of ours: it is damaged or foreign")
    version = told.get("version")
    if isinstance(version, int) and version > VERSION:
        raise DamagedFileError(
            f"{path} has format version {told_by(version, 40)} and this release reads {VERSION}: "
            f"upgrade dessilbi"
        )
    claimed = told.pop("sha256", None)
    try:
        sound = claimed == checksum_of(told) and as_json({**told, "sha256": claimed}) == content
    except (ValueError, RecursionError):  # half a surrogate pair has no bytes
        sound = False
    if not sound:
        raise DamagedFileError(
            f"{path} does not match its checksum: it is damaged or was changed; restore it from a "
            f"copy or compact again"
        )
    try:
        return Manifest.model_validate_json(to_json(told))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise DamagedFileError(f"{path}: {field} is not allowed: {message}") from None
