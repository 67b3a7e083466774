# SPDX-License-Identifier: Apache-2.0
"""A path settles when neither its support nor the ticket's accuracy moves any more."""

from types import SimpleNamespace

import pytest
import torch

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.path.settling import distance, settled

SPEC = {"w": TensorSpec((10, 3), (1, None))}


def ticket(*alive):
    mask = torch.zeros(10, 1, dtype=torch.bool)
    mask[list(alive)] = True
    return Ticket({"w": mask}, SPEC)


class Told:
    """A path that answers what a test wants: one support and one accuracy per point."""

    def __init__(self, supports, accuracies, name="val_ticket_accuracy"):
        self._supports = [ticket(*alive) for alive in supports]
        self.points = [
            SimpleNamespace(step=10 * i, time=float(i), density=t.density, metrics={name: a})
            for i, (t, a) in enumerate(zip(self._supports, accuracies, strict=True))
        ]

    def support(self, *, step):
        return self._supports[step // 10]


def test_distance_is_that_of_jaccard():
    assert distance(ticket(0, 1, 2), ticket(2, 3)) == 3 / 4
    assert distance(ticket(1), ticket(1)) == 0.0
    assert distance(ticket(), ticket()) == 0.0
    assert distance(ticket(), ticket(4)) == 1.0


def test_a_path_settles_one_window_after_its_last_change():
    path = Told([(), (0,), (0, 1), (0, 1), (0, 1), (0, 1)], [0.1, 0.5, 0.9, 0.9, 0.9, 0.9])
    found = settled(path, window=2)
    assert (found.step, found.distance, found.gain, found.accuracy) == (40, 0.0, 0.0, 0.9)


def test_a_support_that_moves_has_not_settled():
    path = Told([(i,) for i in range(6)], [0.9] * 6)
    assert settled(path, window=2) is None
    assert settled(path, window=2, tolerance=1.0).step == 20


def test_an_accuracy_that_rises_has_not_settled():
    path = Told([(0,)] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert settled(path, window=2) is None
    assert settled(path, window=2, gain=0.25).step == 20


def test_an_accuracy_that_falls_back_is_no_gain():
    path = Told([(0,)] * 5, [0.9, 0.7, 0.8, 0.85, 0.8])
    assert settled(path, window=2).step == 20


def test_an_empty_support_never_settles():
    assert settled(Told([()] * 6, [0.1] * 6), window=2) is None


def test_a_path_shorter_than_the_window_has_not_settled():
    assert settled(Told([(0,)] * 3, [0.5] * 3), window=3) is None
    assert settled(Told([], []), window=1) is None


@pytest.mark.parametrize("bad", [{"window": 0}, {"tolerance": 1.5}, {"gain": -0.1}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="is not allowed"):
        settled(Told([(0,)], [0.5]), **bad)


def test_points_without_the_accuracy_say_how_to_log_it():
    with pytest.raises(ValueError, match=r"carry no 'val_ticket_accuracy': log it with path\.log"):
        settled(Told([(0,)] * 3, [0.5] * 3, name="loss"))
