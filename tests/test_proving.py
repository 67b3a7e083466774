# SPDX-License-Identifier: Apache-2.0
"""The numbers of a proof: exact counts, plain values, sparse storage, the witness."""

import json
from dataclasses import fields, replace

import pytest
import torch
from test_compaction import make
from torch import nn

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.compaction.certifying import probes_of
from dessilbi.compaction.compaction import close, compact
from dessilbi.compaction.proving import Proof, measure_latency, sparse_bytes
from dessilbi.compaction.witness import tolerance
from dessilbi.testing import random_ticket


def element_ticket(name, mask):
    return Ticket({name: mask}, {name: TensorSpec(tuple(mask.shape), (1,) * mask.dim())})


@pytest.fixture(scope="module")
def proven():
    model, x, _ = make("plain")
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    return compact(model, ticket, example_inputs=x, latency_repeats=2)


def test_a_proof_is_plain_json_with_all_of_its_numbers(proven):
    told = json.loads(json.dumps(proven.proof.to_json()))
    names = {field.name for field in fields(Proof)}
    assert set(told) == names | {"latency_spread_ms_before", "latency_spread_ms_after"}
    assert told["latency_ms_before"] == proven.proof.latency_ms_before[0]
    assert told["latency_spread_ms_after"] == proven.proof.latency_ms_after[1]


def test_without_measurement_the_latency_is_null(proven):
    told = replace(proven.proof, latency_ms_before=None, latency_ms_after=None).to_json()
    assert told["latency_ms_before"] is told["latency_spread_ms_before"] is None


# sizes by hand: 10 x 64 float32 are 2,560 bytes dense, 80 bytes of bits
@pytest.mark.parametrize(
    ("living", "expected"),
    [
        (0, 44),  # CSR: 11 row starts of 4 bytes
        (3, 44 + 3 * 8),  # CSR: 4 bytes of column and 4 of value
        (9, 44 + 9 * 8),  # 116, where bits would take 80 + 36 = 116
        (10, 80 + 10 * 4),  # bits, where CSR would take 124
        (300, 80 + 300 * 4),
        (619, 80 + 619 * 4),
        (620, 2560),  # 80 + 2480: no smaller than dense
        (640, 2560),
    ],
)
def test_sparse_bytes_are_those_of_the_smallest_form(living, expected):
    mask = torch.zeros(640, dtype=torch.bool)
    mask[:living] = True
    mask = mask.reshape(10, 64)
    assert sparse_bytes({"w": torch.ones(10, 64) * mask}, {"w": mask}) == expected


def test_sparse_bytes_follow_the_type_and_count_what_has_no_mask_as_dense():
    mask = torch.zeros(10, 64, dtype=torch.bool)
    mask[0, 0] = True
    tensors = {"w": (torch.ones(10, 64) * mask).half(), "b": torch.zeros(10)}
    assert sparse_bytes(tensors, {"w": mask}) == (44 + 4 + 2) + 40


def test_what_is_not_zero_counts_as_living():
    nothing = torch.zeros(10, 64, dtype=torch.bool)
    assert sparse_bytes({"w": torch.ones(10, 64)}, {"w": nothing}) == 2560


def test_an_element_ticket_reports_sparse_storage_and_that_nothing_gets_smaller():
    model, x, _ = make("layer norm mlp")
    mask = torch.eye(12, 10, dtype=torch.bool)
    mask[10:, 0] = True  # every row and every column lives
    closed = close(element_ticket("1.weight", mask), model, example_inputs=x)
    proof = compact(model, closed, example_inputs=x).proof
    assert proof.params_after == proof.params_before
    dense, bits, csr = 480, 15 + 12 * 4, 13 * 4 + 12 * 8
    assert proof.sparse_bytes == proof.bytes_after - dense + min(bits, csr)
    assert any("no tensor gets smaller" in note for note in proof.notes)
    assert "sparse bytes" in str(proof)


def test_whole_filters_need_no_sparse_storage(proven):
    assert proven.proof.sparse_bytes == proven.proof.bytes_after
    assert "sparse bytes" not in str(proven.proof)
    assert proven.proof.notes == ()


def test_a_dead_row_and_living_single_weights_give_both():
    model, x, _ = make("layer norm mlp")
    mask = torch.eye(12, 10, dtype=torch.bool)
    closed = close(element_ticket("1.weight", mask), model, example_inputs=x)
    proof = compact(model, closed, example_inputs=x).proof
    assert proof.removed == 2
    dense, bits = 400, 13 + 10 * 4
    assert proof.sparse_bytes == proof.bytes_after - dense + bits
    assert not any("no tensor gets smaller" in note for note in proof.notes)


# the witness


def test_a_witness_tells_the_same_model_from_another(proven):
    verdict = proven.witness.judge(proven.model)
    assert verdict.relative_diff < 1e-12
    model, _, _ = make("plain")
    with torch.no_grad():
        model[9].bias += 1e-6
    assert proven.witness.judge(model).relative_diff > 1e-9
    assert proven.witness.answered_by(model).judge(model).max_abs_diff == 0


def test_a_witness_does_not_hold_the_example_inputs(proven):
    _, x, _ = make("plain")
    held = [probe[0][0] for probe in proven.witness.probes()]
    assert len(held) == 2
    assert all(not torch.allclose(x.double(), other) for other in held)


def test_a_model_that_does_not_take_the_inputs_is_refused(proven):
    with pytest.raises(ValueError, match="does not run on the inputs"):
        proven.witness.judge(nn.Linear(3, 4))


def test_a_cut_must_be_exact_and_a_fold_may_round():
    model = nn.Linear(3, 4)
    assert tolerance(model, exact=1e-9, folded=False) == 1e-9
    assert 1e-5 < tolerance(model, exact=1e-9, folded=True) < 1e-3
    assert tolerance(model.double(), exact=1e-9, folded=True) == 1e-9


def test_probes_are_the_example_and_others_of_its_kind():
    x, ids = torch.randn(3, 50), torch.randint(4, (3, 50))
    probes = probes_of({"x": x, "ids": ids, "k": 3})
    assert probes[0] == ((), {"x": x, "ids": ids, "k": 3})
    for _, other in probes[1:]:
        assert other["x"].shape == x.shape
        assert not torch.equal(other["x"], x)
        assert 0 <= other["ids"].min() <= other["ids"].max() <= 3
        assert other["k"] == 3


@pytest.mark.parametrize(("device", "waits"), [("meta", True), ("cpu", False)])
def test_an_accelerator_is_waited_for_before_the_clock_is_read(monkeypatch, device, waits):
    seen = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: seen.append("wait"))
    monkeypatch.setattr("time.perf_counter", lambda: float(len(seen) + bool(seen.append("clock"))))

    measure_latency(lambda x: seen.append("call"), ((torch.empty(1, device=device),), {}), 1)

    once = ["wait", "clock", "call", "wait", "clock"] if waits else ["clock", "call", "clock"]
    assert seen == 3 * once
