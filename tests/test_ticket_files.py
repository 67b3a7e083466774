# SPDX-License-Identifier: Apache-2.0
"""Ticket files: what comes back, and that damage is refused with one clear error."""

import errno
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from test_ticket import ticket_of, tickets

from dessilbi import Ticket
from dessilbi.blocks.ticket import TensorSpec


@pytest.fixture
def ticket():
    return Ticket(
        {"w": torch.tensor([[True], [False], [True]])},
        {"w": TensorSpec((3, 2), (1, None))},
        {"order": "dual", "step": 30, "epochs": [1, 2.5], "run": {"seed": None}},
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ticket.safetensors"


@given(ticket=tickets())
def test_saving_and_loading_is_the_identity(tmp_path_factory, ticket):
    path = tmp_path_factory.mktemp("ticket") / "t"
    ticket.save(path)
    loaded = Ticket.load(path)
    assert loaded == ticket
    assert list(loaded) == list(ticket) or set(loaded) == set(ticket)
    assert loaded.origin == ticket.origin
    assert loaded.specs == ticket.specs


def test_the_file_is_a_safetensors_file_of_one_bit_per_block(ticket, path):
    ticket.save(path)
    tensors = safetensors.torch.load_file(path)
    assert {name: t.tolist() for name, t in tensors.items()} == {"w": [0b10100000]}


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"no ticket file {path}"):
        Ticket.load(path)


def test_a_truncated_file_is_refused_at_every_length(ticket, path):
    ticket.save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a readable ticket"):
            Ticket.load(path)


def flipped(whole):
    for i in range(len(whole)):
        for bit in range(8):
            yield whole[:i] + bytes([whole[i] ^ (1 << bit)]) + whole[i + 1 :]


def test_a_flipped_bit_gives_a_ticket_or_a_value_error(ticket, path):
    ticket.save(path)
    refused = 0
    for damaged in flipped(path.read_bytes()):
        path.write_bytes(damaged)
        try:
            assert isinstance(Ticket.load(path), Ticket)
        except ValueError:
            refused += 1
    assert refused > 1000


def test_a_flipped_bit_never_gives_another_ticket(ticket, path):
    ticket.save(path)
    for damaged in flipped(path.read_bytes()):
        path.write_bytes(damaged)
        try:
            loaded = Ticket.load(path)
        except ValueError:
            continue
        assert loaded == ticket


MASK = torch.tensor([[True], [False], [True]])


def write(path, header, tensor=None):
    tensors = {"w": torch.tensor([0b10100000], dtype=torch.uint8) if tensor is None else tensor}
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"ticket": text}))


def header_of(**changes):
    tensors = {"w": {"shape": [3, 2], "block": [1, None]}}
    digest = Ticket({"w": MASK}, {"w": TensorSpec((3, 2), (1, None))}).digest()
    header = {"format": "dessilbi.ticket", "version": 1, "tensors": tensors, "sha256": digest}
    return header | changes


def test_the_header_built_by_these_tests_is_a_good_one(ticket, path):
    write(path, header_of())
    assert Ticket.load(path) == ticket


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "{}",
        '"ticket"x',
        header_of(format="other"),
        header_of(tensors={"w": []}),
        header_of(tensors={"w": {"shape": 3, "block": [1, None]}}),
        header_of(tensors={"w": {"shape": "32", "block": [1, None]}}),
        header_of(tensors={"w": {"shape": [-3, 2], "block": [1, None]}}),
        header_of(tensors={"w": {"shape": [True, 2], "block": [1, None]}}),
        header_of(tensors={"w": {"shape": [3, 2], "block": [2, None]}}),
        header_of(tensors={"w": {"shape": [3, 2], "block": [[], None]}}),
        header_of(tensors={"w": {"shape": [3, 2], "block": [[1, "a"], None]}}),
        header_of(tensors={"w": {"shape": [3, 2], "block": [[[1], 2], None]}}),
        header_of(tensors={"w": {"shape": [3, 2], "block": [[1, 1], None]}}),
        header_of(tensors={"w": {"shape": [30, 2], "block": [1, None]}}),
        header_of(tensors={"x": {"shape": [3, 2], "block": [1, None]}}),
        header_of(tensors={"w": {"shape": [3, 2]}}),
        header_of(origin=[1]),
        pytest.param("[1]", id="a list"),
        pytest.param("null", id="null"),
        pytest.param("[" * 100_000, id="nested too deep"),
        pytest.param(header_of(tensors=[]), id="tensors is a list"),
    ],
    ids=lambda value: str(value)[-70:],
)
def test_a_header_of_garbage_is_refused(header, path):
    write(path, header)
    with pytest.raises(ValueError, match=r"is not a readable ticket \(.*give a file written by"):
        Ticket.load(path)


def test_sizes_beyond_what_a_tensor_can_have_are_refused(path):
    tensors = {"w": {"shape": [2**62, 2**62, 0], "block": [1, 1, 1]}}
    write(path, header_of(tensors=tensors), torch.zeros(0, dtype=torch.uint8))
    with pytest.raises(ValueError, match="is not a readable ticket"):
        Ticket.load(path)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.bool, pytest.param(torch.float8_e4m3fn)],
)
def test_masks_of_another_dtype_are_refused(dtype, path):
    write(path, header_of(), torch.zeros(1, dtype=dtype))
    with pytest.raises(ValueError, match="is not a readable ticket"):
        Ticket.load(path)


def test_a_newer_format_is_refused_with_both_versions(path):
    write(path, header_of(version=2))
    with pytest.raises(ValueError, match="format version 2, this release reads 1"):
        Ticket.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\xff" * 64, b"not a ticket\n" * 20], ids=str
)
def test_a_foreign_file_is_refused(content, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not a readable ticket"):
        Ticket.load(path)


def test_foreign_safetensors_are_refused(path):
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="no ticket header"):
        Ticket.load(path)


def test_a_save_that_fails_leaves_the_old_file_as_it_was(ticket, path, monkeypatch):
    ticket.save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ticket_of().save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
