# SPDX-License-Identifier: Apache-2.0
"""One ranking of all blocks, and the tickets of every density it gives."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cut_shapes

from dessilbi.blocks.ticket import TensorSpec
from dessilbi.choosing.selection import LAYER_FLOOR, rank

DENSITIES = st.floats(0.0, 1.0, exclude_min=True)
NO_UNITS: dict[str, str | None] = {}


@st.composite
def scored(draw):
    """Up to four tensors with scores (with ties) per block; some share a unit."""
    specs, scores, units = {}, {}, {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for i in range(draw(st.integers(1, 3))):
        spec = TensorSpec(*draw(cut_shapes(max_rank=3)))
        specs[f"t{i}"], units[f"t{i}"] = spec, None
        scores[f"t{i}"] = torch.randint(0, 6, spec.grid, generator=generator) / 3
    if draw(st.booleans()):
        count = draw(st.integers(1, 8))
        joint = torch.randint(0, 6, (count,), generator=generator) / 3
        for i, width in enumerate((3, 7)):
            specs[f"u{i}"], units[f"u{i}"] = TensorSpec((count, width), (1, None)), "u"
            scores[f"u{i}"] = joint.reshape(count, 1)
    return specs, scores, units


def ranked(case, **options):
    specs, scores, units = case
    return rank([scores], specs, units, **options)


def total_of(specs):
    return sum(prod(spec.shape) for spec in specs.values())


def items_of(specs, units):
    """What lives together: (tensor names, block index) by brute force, in the specs' order."""
    seen, items = {}, []
    for name, spec in specs.items():
        key = units.get(name) or ("alone", name)
        seen.setdefault(key, []).append(name)
        if seen[key] == [name]:
            items += [(seen[key], block) for block in range(spec.num_blocks)]
    return items


def kept(ticket):
    return {(n, int(i)) for n in ticket for i in ticket[n].reshape(-1).nonzero()}


@given(case=scored(), first=DENSITIES, second=DENSITIES)
def test_tickets_of_one_ranking_are_nested(case, first, second):
    ranking = ranked(case)
    small, large = sorted((max(first, 1e-9), max(second, 1e-9)))
    try:
        inner = ranking.ticket(small, {})
    except ValueError:
        return  # less than one block
    assert kept(inner) <= kept(ranking.ticket(large, {}))


@given(case=scored(), density=DENSITIES)
def test_a_density_is_met_from_below_to_within_one_block(case, density):
    ranking, specs = ranked(case), case[0]
    total = total_of(specs)
    sizes = [sum(specs[n].block_size for n in names) for names, _ in items_of(specs, case[2])]
    try:
        ticket = ranking.ticket(density, {})
    except ValueError:
        assert density * total < max(sizes)
        return
    assert ticket.density <= density * (1 + 1e-9)
    assert ticket.density == 1 or ticket.density * total + max(sizes) > density * total


@given(case=scored(), density=DENSITIES)
def test_blocks_of_a_unit_are_taken_together(case, density):
    specs, _, units = case
    try:
        ticket = ranked(case).ticket(density, {})
    except ValueError:
        return
    for names, block in items_of(specs, units):
        assert len({bool(ticket[name].reshape(-1)[block]) for name in names}) == 1


@given(case=scored())
def test_density_one_keeps_everything(case):
    assert ranked(case).ticket(1.0, {}).density == 1


@given(case=scored(), density=DENSITIES)
def test_with_one_layer_the_order_is_by_score_alone(case, density):
    specs, scores, _ = case
    spec, score = specs["t0"], scores["t0"].reshape(-1)
    best = sorted(range(spec.num_blocks), key=lambda i: -score[i])  # stable, as is the ranking
    count = int(density * spec.num_blocks * (1 + 1e-12))
    ranking = rank([scores], {"t0": spec}, NO_UNITS)
    if count == 0:
        with pytest.raises(ValueError, match="less than one block"):
            ranking.ticket(density, {})
        return
    assert kept(ranking.ticket(density, {})) == {("t0", i) for i in best[:count]}


def test_a_ranking_without_a_floor_takes_the_best_blocks_of_all_layers():
    specs = {"a": TensorSpec((6,), (1,)), "b": TensorSpec((6,), (1,))}
    scores = {"a": torch.tensor([9.0, 8, 7, 3, 2, 1]), "b": torch.tensor([6.0, 5, 4, 0, 0, 0])}
    ticket = rank([scores], specs, NO_UNITS, floor=0).ticket(5 / 12, {})
    assert kept(ticket) == {("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)}


def lopsided(size=1000):
    """Two layers of single elements; every score of ``best`` is above every one of ``worst``."""
    specs = {name: TensorSpec((size,), (1,)) for name in ("best", "worst")}
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(size, generator=generator) for name in specs}
    scores["best"] += 10
    return specs, scores


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.45])
def test_no_layer_dies_and_each_keeps_about_its_floor(density):
    specs, scores = lopsided()
    ticket = rank([scores], specs, NO_UNITS).ticket(density, {})
    share = ticket.densities()["worst"]
    assert 0 < share < density
    # Up to a twentieth less: what the floor raises is not in the density it is counted against.
    assert share >= LAYER_FLOOR * density / (1 + LAYER_FLOOR) - 1 / 1000


def test_each_layer_keeps_its_floor_of_the_density_to_within_one_block():
    specs, scores = lopsided(20_000)
    ticket = rank([scores], specs, NO_UNITS).ticket(0.45, {})
    assert int(ticket["worst"].sum()) >= int(LAYER_FLOOR * ticket.density * 20_000)


@given(case=scored())
def test_every_layer_has_its_best_block_as_soon_as_there_is_room_for_one_each(case):
    specs, scores, units = case
    names = [names for names, block in items_of(specs, units) if block == 0]
    room = sum(sum(specs[n].block_size for n in group) for group in names)
    ticket = ranked(case).ticket(room / total_of(specs), {})
    for group in names:
        score = scores[group[0]].reshape(-1)
        assert ticket[group[0]].reshape(-1)[int(score.argmax())]


def test_a_density_below_one_block_names_the_smallest_ticket():
    specs = {"w": TensorSpec((8, 5), (1, None))}
    ranking = rank([{"w": torch.arange(8.0).reshape(8, 1)}], specs, NO_UNITS)
    with pytest.raises(ValueError, match=r"density=0\.1 is less than .* has density 0\.125$"):
        ranking.ticket(0.1, {})
    assert kept(ranking.ticket(0.125, {})) == {("w", 7)}


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_density_outside_0_to_1_is_refused(density):
    ranking = rank([{"w": torch.ones(4)}], {"w": TensorSpec((4,), (1,))}, NO_UNITS)
    with pytest.raises(ValueError, match=r"density=.* is not allowed: it must be in \(0, 1\]"):
        ranking.ticket(density, {})


def test_equal_blocks_stay_in_the_order_of_the_tensors():
    specs = {"b": TensorSpec((3,), (1,)), "a": TensorSpec((3,), (1,))}
    same = {name: torch.ones(3) for name in specs}
    order = rank([same], specs, NO_UNITS, floor=0)
    # The best block of each layer comes first, then all others as they stand.
    assert list(zip(order.tensor_of, order.block_of, strict=True)) == [
        (0, 0),
        (1, 0),
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]


def test_later_keys_break_ties_of_earlier_ones():
    specs = {"w": TensorSpec((4,), (1,))}
    first, second = torch.tensor([1.0, 2, 1, 2]), torch.tensor([0.0, 1, 5, 3])
    ranking = rank([{"w": first}, {"w": second}], specs, NO_UNITS)
    assert ranking.block_of.tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("count", [1, 3, 7, 10])
def test_a_density_that_is_a_whole_number_of_blocks_is_met_exactly(count):
    ranking = rank([{"w": torch.arange(10.0)}], {"w": TensorSpec((10,), (1,))}, NO_UNITS)
    assert ranking.ticket(0.1 * count, {}).kept_elements == count


def test_a_tensor_without_elements_takes_part_in_no_ranking():
    specs = {"none": TensorSpec((0, 3), (1, None)), "w": TensorSpec((4,), (1,))}
    scores = {"none": torch.ones(0, 1), "w": torch.arange(4.0)}
    ticket = rank([scores], specs, NO_UNITS).ticket(0.5, {"kind": "test"})
    assert kept(ticket) == {("w", 2), ("w", 3)}
    assert ticket.origin == {"kind": "test"}


def in_order(ranking):
    """Which leader each item is of, best item first."""
    return ranking.tensor_of.tolist()


def test_relative_scores_compare_layers_of_different_scales():
    specs = {"small": TensorSpec((4, 3), (1, None)), "large": TensorSpec((4, 3), (1, None))}
    scores = {"small": torch.tensor([0.4, 0.1, 0.2, 0.1]), "large": torch.tensor([5.0, 6, 5, 4])}
    # Over their means small has 2, .5, 1, .5 and large 1, 1.2, 1, .8.
    plain = rank([scores], specs, NO_UNITS)
    assert in_order(plain) == [1, 0, 1, 1, 1, 0, 0, 0]  # the best of each layer come first
    relative = rank([scores], specs, NO_UNITS, relative=True)
    assert in_order(relative) == [0, 1, 0, 1, 1, 1, 0, 0]
    assert relative.block_of.tolist() == [0, 1, 2, 0, 2, 3, 1, 3]


@given(case=scored(), factor=st.sampled_from([0.125, 64.0]))
def test_a_relative_ranking_does_not_know_the_scale_of_a_layer(case, factor):
    specs, scores, units = case
    name = next(iter(specs))
    scaled = {n: s * factor if n == name else s for n, s in scores.items()}
    a, b = (rank([s], specs, units, relative=True) for s in (scores, scaled))
    assert (a.tensor_of.tolist(), a.block_of.tolist()) == (
        b.tensor_of.tolist(),
        b.block_of.tolist(),
    )


def test_a_layer_of_zeros_is_ranked_last_by_relative_scores():
    specs = {"dead": TensorSpec((2, 3), (1, None)), "alive": TensorSpec((2, 3), (1, None))}
    scores = {"dead": torch.zeros(2), "alive": torch.tensor([1.0, 2.0])}
    relative = rank([scores], specs, NO_UNITS, floor=0, relative=True)
    assert in_order(relative) == [1, 0, 1, 0]


def test_tensors_without_elements_are_no_ranking():
    spec = TensorSpec((0, 4), (1, None))
    with pytest.raises(ValueError, match="no structured tensor has elements"):
        rank([{"empty": torch.zeros(spec.grid)}], {"empty": spec}, NO_UNITS)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_by_name(value, relative):
    specs = {name: TensorSpec((4, 3), (1, None)) for name in ("first", "second")}
    scores = {name: torch.ones(4, 1) for name in specs}
    scores["second"][2] = value
    with pytest.raises(ValueError, match=r"blocks of second cannot be ranked.* not finite"):
        rank([scores], specs, dict.fromkeys(specs), relative=relative)
