# SPDX-License-Identifier: Apache-2.0
"""Members of a family chosen by measured latency and accuracy."""

from unittest.mock import patch

import pytest
import torch
from test_choosing import X, family, trained

from dessilbi.outcomes import measuring
from dessilbi.outcomes.measuring import choose_by_drop, choose_by_latency


def density_of(ticket):
    """An accuracy that grows with the ticket: 0.5 at nothing, 0.9 at everything."""
    return 0.5 + 0.4 * ticket.density


def test_drop_finds_the_smallest_ticket_that_holds():
    found = family("resnet8")

    choice = choose_by_drop(found, density_of, 8.0, dense=0.9)

    assert density_of(choice.ticket) >= 0.82
    assert density_of(found.member(choice.count - 1)[0]) < 0.82
    assert "within 8 points" in choice.reason


@pytest.mark.parametrize("name", ["resnet8", "grouped"])
def test_drop_lets_no_layer_die_that_nobody_asked_to_die(name):
    found = family(name)
    assert found.smallest > 1
    assert choose_by_drop(found, lambda ticket: 0.9, 5.0, dense=0.9).count == found.smallest


def test_drop_of_nothing_keeps_what_is_needed_for_it():
    choice = choose_by_drop(family("resnet8"), density_of, 0.0, dense=0.9)
    assert choice.ticket.density == 1.0


def test_drop_that_no_ticket_holds_says_what_would():
    with pytest.raises(ValueError, match=r"the best reaches 0\.9000; allow at least 5\.00 points"):
        choose_by_drop(family("resnet8"), density_of, 1.0, dense=0.95)


@pytest.mark.parametrize("drop", [-1.0, float("nan")])
def test_drop_out_of_range_is_refused(drop):
    with pytest.raises(ValueError, match="max_drop="):
        choose_by_drop(family("resnet8"), density_of, drop, dense=0.9)


def clock(per_parameter, spread=0.0):
    """A latency that is exactly proportional to the number of parameters."""

    def measure(model, arguments, repeats):
        assert not model.training
        assert repeats == 30
        return per_parameter * sum(p.numel() for p in model.parameters()), spread

    return patch.object(measuring, "measure_latency", measure)


def test_latency_is_met_from_below():
    model, _ = trained("grouped")
    found = family("grouped")
    with clock(1e-3):
        choice = choose_by_latency(found, model, 1.0, example_inputs=X)
    assert choice.cost.params <= 1_000
    assert found.member(choice.count + 1)[1].params > 1_000
    assert "within 1 ms" in choice.reason


def test_latency_steps_down_until_a_second_measurement_agrees():
    model, _ = trained("grouped")
    found = family("grouped")
    with clock(1e-3):
        asked = choose_by_latency(found, model, 1.0, example_inputs=X)
    seen = []

    def drifting(candidate, arguments, repeats):
        """The machine gets slower once the search is over."""
        seen.append(sum(p.numel() for p in candidate.parameters()))
        slower = 1.2 if len(seen) > searches else 1.0
        return 1e-3 * slower * seen[-1], 0.0

    searches = len(bin(len(found))) - 1
    with patch.object(measuring, "measure_latency", drifting):
        choice = choose_by_latency(found, model, 1.0, example_inputs=X)
    assert choice.count < asked.count
    assert 1.2e-3 * choice.cost.params <= 1.0


def test_real_latency_is_measured_and_within_its_spread():
    model, _ = trained("lenet")
    whole = measuring.choose_by_latency(family("lenet"), model, 1e3, example_inputs=X)
    assert whole.ticket.density == 1.0
    assert "the whole model" in whole.reason


def test_latency_out_of_reach_names_the_smallest():
    model, _ = trained("grouped")
    with clock(1.0), pytest.raises(ValueError, match="cannot be met: the smallest"):
        choose_by_latency(family("grouped"), model, 0.01, example_inputs=X)
    with pytest.raises(ValueError, match="latency_ms=0 is not allowed"):
        choose_by_latency(family("grouped"), model, 0, example_inputs=X)


def test_choosing_leaves_the_model_as_it_is():
    model, _ = trained("grouped")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with clock(1e-3):
        choose_by_latency(family("grouped"), model, 1.0, example_inputs=X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
