# SPDX-License-Identifier: Apache-2.0
"""The path: what it records of a run, the tickets it gives out, what comes back from files."""

import copy
import errno
import itertools
import json
import math
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close

from dessilbi import DessiLBI, Path, Schedules, piecewise
from dessilbi.files.runs import Run
from dessilbi.path.hints import EntryHint
from dessilbi.path.history import NEVER
from dessilbi.path.scores import ORDERS

FILTERS = torch.linspace(0.3, 2.0, 6).unsqueeze(1) * torch.randn(
    6, 4, generator=torch.Generator().manual_seed(1)
)
ELEMENTS = torch.randn(5, 5, generator=torch.Generator().manual_seed(2))


class Toy:
    """A filter-wise and an element-wise tensor and a plain one, each pulled towards a target."""

    def __init__(self, *, units=False, **options):
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(0.1 * torch.randn(6, 4, generator=generator))
        self.e = nn.Parameter(0.1 * torch.randn(5, 5, generator=generator))
        self.u = nn.Parameter(0.1 * torch.randn(6, 3, generator=generator))
        self.b = nn.Parameter(torch.zeros(3))
        unit = {"unit": "both"} if units else {}
        groups = [
            {"params": [("w", self.w)], "structure": "filter", **unit},
            {"params": [("e", self.e)], "structure": "element", "lam": 0.6},
            {"params": [("b", self.b)]},
        ]
        if units:
            groups.append({"params": [("u", self.u)], "structure": "filter", **unit})
        if "lam" in options:
            groups[1]["lam"] = options["lam"]
        self.optimizer = DessiLBI(groups, **{"lr": 0.1, "nu": 2.0, "lam": 1.0, **options})
        self.steps = 0

    def step(self, count=1, *, pull=1.0):
        for _ in range(count):
            self.w.grad = self.w.detach() - pull * FILTERS
            self.e.grad = self.e.detach() - pull * ELEMENTS
            self.u.grad = self.u.detach() - pull
            self.b.grad = torch.ones(3)
            self.optimizer.step()
            self.steps += 1
        return self


def watched(**options):
    """A toy that was trained for 60 steps, and its path with a point at every step."""
    toy = Toy(**options)
    path = Path(toy.optimizer, every=1)
    toy.step(60)
    assert 0 < path.points[-1].density < 1
    return toy, path


def steps_of(path):
    return [point.step for point in path.points]


# Which steps are recorded


@pytest.mark.parametrize("total", [1, 50, 100, 1000, 1234])
def test_a_known_number_of_steps_gives_about_100_points(total):
    toy = Toy(lam=1e-3)
    path = Path(toy.optimizer, total_steps=total)
    toy.step(total)
    assert min(total, 100) <= len(path.points) < 200
    assert steps_of(path) == list(range(total // len(path.points), total + 1))[:: steps_of(path)[0]]


@pytest.mark.parametrize("total", [150, 399, 1000, 1700])
def test_an_unknown_number_of_steps_gives_about_100_evenly_spaced_points(total):
    toy = Toy()
    path = Path(toy.optimizer)
    toy.step(total)
    assert 100 <= len(path.points) < 200
    assert len({b - a for a, b in zip(steps_of(path), steps_of(path)[1:], strict=False)}) == 1


def test_thinning_keeps_first_entries_as_precise_as_they_were_recorded():
    toy, other = Toy(), Toy()
    thinned, dense = Path(toy.optimizer), Path(other.optimizer, every=1)
    toy.step(500)
    other.step(500)
    early = {n: (e != NEVER) & (e < 200) for n, e in dense.entry().items()}
    assert any(mask.any() for mask in early.values())
    assert {p.step % 4 for p in thinned.points} == {0}
    assert any((e[early[n]] % 4 != 0).any() for n, e in thinned.entry().items())
    for name, entry in thinned.entry().items():
        assert torch.equal(entry[early[name]], dense.entry()[name][early[name]])


def test_every_says_which_steps_are_recorded():
    toy = Toy()
    path = Path(toy.optimizer, every=7)
    toy.step(30)
    assert steps_of(path) == [7, 14, 21, 28]


def test_record_adds_a_point_now():
    toy = Toy()
    path = Path(toy.optimizer, every=10)
    toy.step(13)
    point = path.record()
    assert steps_of(path) == [10, 13]
    assert (point.step, point.by_hand) == (13, True)
    assert point.density == toy.optimizer.support().density


def test_record_before_the_first_step_gives_the_empty_support():
    path = Path(Toy().optimizer, every=10)
    assert path.record().step == 0
    assert path.support(step=0).density == 0


def test_recording_twice_at_one_step_gives_one_point():
    toy = Toy()
    path = Path(toy.optimizer, every=5)
    toy.step(5)
    assert path.record() is path.record()
    assert steps_of(path) == [5]


def test_points_recorded_by_hand_are_never_thinned_away():
    toy = Toy()
    path = Path(toy.optimizer)
    toy.step(300)  # from 200 on only every second step is recorded
    toy.step(1)
    path.record()
    path.log(mine=1)
    toy.step(700)
    assert 301 in steps_of(path)
    assert path.points[steps_of(path).index(301)].metrics == {"mine": 1}


def test_a_recorded_point_that_is_recorded_by_hand_is_never_thinned_away():
    toy = Toy()
    path = Path(toy.optimizer)
    toy.step(5)
    path.record()
    path.log(mine=1)
    toy.step(300)
    assert 5 in steps_of(path)


def test_many_points_by_hand_do_not_starve_the_others():
    toy = Toy()
    path = Path(toy.optimizer)
    toy.step(200)
    for _ in range(300):
        toy.step()
        path.record()
    assert path.points[-1].step == 500
    before = len([p for p in path.points if not p.by_hand])
    toy.step(500)
    assert len([p for p in path.points if not p.by_hand]) >= before


def test_a_closed_path_records_nothing_more_and_still_answers():
    toy, path = watched()
    live = path.ticket(density=0.3)
    path.close()
    path.close()
    toy.step(20)
    assert path.step == 60
    assert path.ticket(density=0.3) == live


def test_metrics_are_logged_to_the_latest_point():
    toy = Toy()
    path = Path(toy.optimizer, every=2)
    toy.step(3)
    path.log(accuracy=0.5, loss=1.0)
    path.log(loss=0.9)
    assert path.points[-1].metrics == {"accuracy": 0.5, "loss": 0.9}


def test_a_metric_that_is_a_tensor_is_logged_as_its_number(tmp_path):
    toy = Toy()
    path = Path(toy.optimizer, every=1, file=tmp_path / "path.jsonl")
    toy.step()
    path.log(accuracy=torch.tensor(0.5))
    assert path.points[-1].metrics == {"accuracy": 0.5}


# Steps and path time


def test_path_time_is_the_sum_of_the_learning_rates_that_were_used():
    toy = Toy()
    path = Path(toy.optimizer, every=1)
    scheduler = LambdaLR(toy.optimizer, lambda k: 1 / (1 + k))
    used = []
    for _ in range(20):
        used.append(toy.optimizer.param_groups[0]["lr"])
        toy.step()
        scheduler.step()
    assert len(set(used)) == 20
    assert_close([p.time for p in path.points], [sum(used[: k + 1]) for k in range(20)])


def test_path_time_takes_a_tensor_lr():
    toy = Toy(lr=torch.tensor(0.25))
    path = Path(toy.optimizer)
    toy.step(4)
    assert type(path.time) is float
    assert path.time == 1.0


def test_the_clock_is_that_of_the_first_structured_group():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    groups = [
        {"params": [("a", a)], "lr": 5.0},
        {"params": [("b", b)], "structure": "filter", "lr": 0.5},
    ]
    optimizer = DessiLBI(groups)
    path = Path(optimizer)
    a.grad, b.grad = torch.ones(2), torch.ones(2, 2)
    optimizer.step()
    assert path.time == 0.5


def test_a_phantom_step_is_not_recorded():
    toy = Toy()
    path = Path(toy.optimizer, every=1)
    toy.step(3)
    for group in toy.optimizer.param_groups:
        group["lr"] = 0.0
    for param in (toy.w, toy.e, toy.b):
        param.grad = torch.zeros_like(param)
    toy.optimizer.step()
    assert (path.step, steps_of(path)) == (3, [1, 2, 3])


def test_a_real_step_with_lr_0_is_a_step_that_takes_no_time():
    toy = Toy()
    path = Path(toy.optimizer, every=1)
    toy.step(3)
    for group in toy.optimizer.param_groups:
        group["lr"] = 0.0
    time = path.time
    toy.step()
    assert (path.step, steps_of(path)) == (4, [1, 2, 3, 4])
    assert path.time == time


def test_a_step_with_zero_gradients_at_a_real_lr_is_a_step():
    toy = Toy()
    path = Path(toy.optimizer, every=1)
    for param in (toy.w, toy.e, toy.b):
        param.grad = torch.zeros_like(param)
    toy.optimizer.step()
    assert path.step == 1


def test_a_step_that_the_grad_scaler_skips_is_no_step():
    toy = Toy()
    path = Path(toy.optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    done = []
    for factor in (1.0, math.inf, 1.0):
        toy.optimizer.zero_grad()
        scaler.scale(factor * (toy.w.square().sum() + toy.e.square().sum())).backward()
        scaler.step(toy.optimizer)
        scaler.update()
        done.append(path.step)
    assert done == [1, 1, 2]


# Entries and supports


def brute_force(pulls, **options):
    """A path, and by hand the support after every step."""
    toy = Toy(**options)
    path = Path(toy.optimizer, every=1)
    supports = []
    for pull in pulls:
        toy.step(pull=pull)
        supports.append(toy.optimizer.support())
    return toy, path, supports


BACK_AND_FORTH = [1.0] * 40 + [-1.0] * 60


@pytest.mark.parametrize("units", [False, True], ids=["alone", "units"])
def test_the_first_entry_is_the_first_step_whose_support_holds_the_block(units):
    _, path, supports = brute_force(BACK_AND_FORTH, units=units)
    found = 0
    for name, entry in path.entry().items():
        for place in range(entry.numel()):
            held = [bool(s[name].reshape(-1)[place]) for s in supports]
            expected = held.index(True) + 1 if True in held else NEVER
            assert entry.reshape(-1)[place] == expected
            found += expected > 1
    assert found > 10


def test_the_support_at_every_step_is_the_one_that_was_there():
    _, path, supports = brute_force(BACK_AND_FORTH)
    assert len({s.density for s in supports}) > 5
    for k, support in enumerate(supports, start=1):
        assert path.support(step=k) == support
        assert path.points[k - 1].density == support.density


def subset(left, right):
    return all(not (left[name] & ~right[name]).any() for name in left)


def test_what_has_entered_is_nested_although_the_support_is_not():
    _, path, supports = brute_force(BACK_AND_FORTH)
    assert not all(subset(a, b) for a, b in itertools.pairwise(supports))
    entered = [path.ticket(step=k) for k in range(1, len(supports) + 1)]
    assert len({ticket.density for ticket in entered}) > 5
    assert all(subset(a, b) for a, b in itertools.pairwise(entered))
    assert all(subset(s, t) for s, t in zip(supports, entered, strict=True))


def test_a_ticket_by_step_is_all_that_was_ever_in_gamma_by_then():
    _, path, supports = brute_force(BACK_AND_FORTH)
    for step in (1, 25, 60, 100):
        ever = {n: torch.stack([s[n] for s in supports[:step]]).any(0) for n in supports[0]}
        assert {n: m.tolist() for n, m in path.ticket(step=step).items()} == {
            n: m.tolist() for n, m in ever.items()
        }


def test_between_points_the_support_is_that_of_the_last_point():
    toy = Toy()
    path = Path(toy.optimizer, every=20)
    toy.step(40)
    assert path.support(step=39) == path.support(step=20)
    assert path.support(step=40) != path.support(step=20)
    assert path.support(step=39).origin == {"kind": "support", "step": 20}


def test_entries_are_copies():
    _, path = watched()
    path.entry()["w"].fill_(0)
    assert path.entry()["w"].any()


# Tickets of a wanted density


@pytest.fixture(scope="module")
def family():
    return {units: watched(units=units)[1] for units in (False, True)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("units", [False, True], ids=["alone", "units"])
def test_tickets_of_one_order_are_nested_at_any_density(family, order, units):
    path = family[units]
    tickets = [path.ticket(density=k / 100, order=order) for k in range(11, 101)]
    densities = [ticket.density for ticket in tickets]
    assert len(set(densities)) > 20
    assert all(subset(a, b) for a, b in itertools.pairwise(tickets))
    blocks = 7 if units else 4
    total = tickets[0].total_elements
    for k, density in zip(range(11, 101), densities, strict=True):
        assert k / 100 - blocks / total < density <= k / 100 + 1e-9
    assert densities[-1] == 1


@given(density=st.floats(0.11, 1.0), order=st.sampled_from(ORDERS))
def test_the_density_of_a_ticket_is_its_share_of_elements_by_brute_force(family, density, order):
    ticket = family[True].ticket(density=density, order=order)
    sizes = {"w": (6, 4), "e": (5, 5), "u": (6, 3)}
    kept = sum(int(ticket.mask_of(n).sum()) for n in sizes)
    assert ticket.density == kept / sum(a * b for a, b in sizes.values())
    assert torch.equal(ticket["w"], ticket["u"])


def test_the_orders_differ_and_say_so():
    _, path, _ = brute_force(BACK_AND_FORTH)
    tickets = {o: [path.ticket(density=k / 10, order=o) for k in range(2, 10)] for o in ORDERS}
    assert tickets["dual"] != tickets["weight"]
    assert tickets["dual"] != tickets["entry"]
    assert tickets["entry"] != tickets["weight"]
    expected = {"kind": "density", "order": "weight", "density": 0.4, "step": 100}
    assert tickets["weight"][2].origin == expected


@pytest.mark.parametrize(
    ("structures", "order"),
    [(("element",), "weight"), (("filter",), "relative"), (("filter", "element"), "dual")],
)
def test_the_default_order_compares_only_what_can_be_compared(structures, order):
    torch.manual_seed(0)
    groups = [
        {"params": [(f"w{i}", torch.nn.Parameter(torch.randn(6, 4)))], "structure": structure}
        for i, structure in enumerate(structures)
    ]
    path = Path(DessiLBI(groups, lr=0.1, nu=1.0))
    assert path.ticket(density=0.4).origin["order"] == order
    assert path.ticket(density=0.4) == path.ticket(density=0.4, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_a_ticket_holds_the_best_blocks_of_its_order(order):
    _, path, _ = brute_force(BACK_AND_FORTH)
    share = path.scores()["dual"]["e"]
    weight = path.scores()["weight"]["e"]
    key = {"dual": share, "weight": weight, "relative": weight, "entry": None}[order]
    if key is None:
        entry = path.entry()["e"].double()
        key = -entry.masked_fill(entry == NEVER, 1e9) + share / 1e6  # ties by ||V||/lam
    kept = path.ticket(density=0.5, order=order)["e"]
    assert 0 < kept.sum() < kept.numel()
    assert key[kept].min() >= key[~kept].max()


def test_any_density_can_be_had_also_beyond_what_has_entered():
    _, path = watched()
    entered = path.ticket(step=60).density
    for density in (entered / 2, (1 + entered) / 2):
        assert abs(path.ticket(density=density, order="entry").density - density) < 5 / 49


def test_tickets_can_be_had_before_the_first_step():
    path = Path(Toy().optimizer)
    assert 0.4 < path.ticket(density=0.5).density <= 0.5


# Scores


def norms_by_hand(x):
    return x.double().square().sum(1, keepdim=True).sqrt().float()


def test_scores_of_single_tensors_are_their_norms_over_lam():
    toy, path = watched()
    state, scores = toy.optimizer.state, path.scores()
    assert_close(scores["dual"]["w"], norms_by_hand(state[toy.w]["v"]))
    assert_close(scores["dual"]["e"], state[toy.e]["v"].abs() / 0.6)
    assert_close(scores["weight"]["w"], norms_by_hand(toy.w.detach()))
    assert_close(scores["weight"]["e"], toy.e.detach().abs())
    assert ((scores["dual"]["w"] > 1) == toy.optimizer.support()["w"]).all()


@pytest.mark.parametrize("scale", ["unit", "sqrt"])
def test_scores_of_a_unit_are_joint(scale):
    lam = 1.0 if scale == "unit" else 0.3
    toy, path = watched(units=True, block_scale=scale, lam=lam)
    state, scores = toy.optimizer.state, path.scores()
    joint = norms_by_hand(torch.cat([state[toy.w]["v"], state[toy.u]["v"]], dim=1))
    expected = joint / (lam * (math.sqrt(7) if scale == "sqrt" else 1))
    assert_close(scores["dual"]["w"], expected)
    assert_close(scores["dual"]["u"], expected)
    assert_close(scores["weight"]["u"], norms_by_hand(torch.cat([toy.w, toy.u], 1).detach()))


def test_scores_under_sqrt_are_over_lam_times_the_root_of_the_block_size():
    toy, path = watched(block_scale="sqrt", lam=0.5)
    expected = norms_by_hand(toy.optimizer.state[toy.w]["v"]) / (0.5 * 2)
    assert_close(path.scores()["dual"]["w"], expected)


@pytest.mark.parametrize("scale", ["unit", "sqrt"])
def test_where_all_lam_are_infinite_the_score_is_the_norm_itself(scale):
    toy = Toy(lam=math.inf, block_scale=scale)
    path = Path(toy.optimizer)
    toy.step(30)
    norms = norms_by_hand(toy.optimizer.state[toy.w]["v"]) / (2 if scale == "sqrt" else 1)
    assert norms.min() > 0
    assert_close(path.scores()["dual"]["w"], norms)
    assert 0.4 < path.ticket(density=0.5).density <= 0.5


def test_beside_a_finite_lam_an_infinite_one_scores_zero():
    toy = Toy()
    toy.optimizer.param_groups[0]["lam"] = math.inf
    path = Path(toy.optimizer)
    toy.step(30)
    assert not path.scores()["dual"]["w"].any()
    assert path.scores()["dual"]["e"].any()


def test_scores_are_those_of_this_moment():
    toy, path = watched()
    before = path.scores()["dual"]["w"]
    toy.step(10)
    assert (path.scores()["dual"]["w"] > before).any()


# Files


def saved(tmp_path, *, units=False, **options):
    toy = Toy(units=units)
    run = Run(tmp_path)
    path = Path(toy.optimizer, file=run.path, **options)
    for pull in BACK_AND_FORTH:
        toy.step(pull=pull)
        if path.step % 50 == 0:
            path.log(accuracy=path.step / 100)
    path.save_scores(run.scores)
    return toy, path, run


@pytest.mark.parametrize("options", [{"every": 10}, {}], ids=["every", "thinned"])
def test_a_loaded_path_is_the_live_one(tmp_path, options):
    toy, live, run = saved(tmp_path, **options)
    if not options:
        toy.step(200)
        assert len(live.points) < 200
        live.record()
        live.save_scores(run.scores)
    loaded = Path.load(tmp_path)
    assert loaded.points == live.points
    assert any(point.metrics for point in loaded.points)
    assert (loaded.step, loaded.time, loaded.names) == (live.step, live.time, live.names)
    assert repr(loaded) == repr(live)
    for name, entry in live.entry().items():
        assert torch.equal(loaded.entry()[name], entry)
        for kind in ("dual", "weight"):
            assert torch.equal(loaded.scores()[kind][name], live.scores()[kind][name])
    for step in steps_of(live):
        assert loaded.support(step=step) == live.support(step=step)
        assert loaded.ticket(step=step) == live.ticket(step=step)
    for order in ORDERS:
        for density in (0.12, 0.5, 0.9):
            mine, theirs = (p.ticket(density=density, order=order) for p in (loaded, live))
            assert mine == theirs
            assert mine.origin == theirs.origin


def test_the_scores_of_units_can_be_saved(tmp_path):
    _, live, _ = saved(tmp_path, units=True, every=10)
    loaded = Path.load(tmp_path)
    assert torch.equal(loaded.scores()["dual"]["u"], live.scores()["dual"]["u"])
    assert loaded.ticket(density=0.5) == live.ticket(density=0.5)


def test_a_crash_at_any_byte_leaves_the_path_up_to_then(tmp_path):
    _, live, run = saved(tmp_path, every=25)
    content = run.path.read_bytes()
    header = content.index(b"\n") + 1
    seen = set()
    for length in [*range(0, len(content), 7), len(content)]:
        run.path.write_bytes(content[:length])
        if length < header:
            with pytest.raises(ValueError, match=f"^{run.path} is not a readable path"):
                Path.load(tmp_path)
            continue
        loaded = Path.load(tmp_path)
        seen.add(len(loaded.points))
        for point in loaded.points:
            assert loaded.support(step=point.step) == live.support(step=point.step)
    assert seen == {0, 1, 2, 3, 4}


def test_an_unfinished_run_gives_tickets_by_step_but_not_by_density(tmp_path):
    _, live, run = saved(tmp_path, every=10)
    run.scores.unlink()
    loaded = Path.load(tmp_path)
    assert loaded.ticket(step=50) == live.ticket(step=50)
    for ask in (lambda: loaded.ticket(density=0.5), loaded.scores):
        with pytest.raises(
            ValueError, match=r"left no final scores.* let it finish, or take a tic"
        ):
            ask()


@pytest.mark.parametrize("content", [b"", b"foreign", b"\x08" + b"\0" * 20], ids=str)
def test_damaged_scores_are_refused_by_name(tmp_path, content):
    _, _, run = saved(tmp_path, every=10)
    run.scores.write_bytes(content)
    with pytest.raises(ValueError, match=f"{run.scores} cannot be read as safetensors"):
        Path.load(tmp_path)


def test_the_scores_of_another_run_are_refused(tmp_path):
    _, _, run = saved(tmp_path, every=10)
    toy = Toy()
    toy.optimizer.param_groups[0]["structure"] = (2, None)
    Path(toy.optimizer).save_scores(run.scores)
    with pytest.raises(ValueError, match="holds scores of another run: w does not fit"):
        Path.load(tmp_path)


def test_a_folder_without_a_path_is_not_a_run_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"with a path: it has no path\.jsonl"):
        Path.load(tmp_path)


def test_an_existing_file_is_refused_and_nothing_watches(tmp_path):
    file = tmp_path / "path.jsonl"
    file.write_text("mine")
    toy = Toy()
    with pytest.raises(FileExistsError, match="a path is never overwritten"):
        Path(toy.optimizer, file=file)
    toy.step(1)
    assert file.read_text() == "mine"


def test_a_full_disk_keeps_what_was_there_and_the_path_goes_on(tmp_path, monkeypatch):
    toy = Toy()
    path = Path(toy.optimizer, every=10, file=Run(tmp_path).path)
    toy.step(19)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            toy.step(1)
    assert steps_of(path) == steps_of(Path.load(tmp_path)) == [10]
    toy.step(20)
    assert steps_of(path) == steps_of(Path.load(tmp_path)) == [10, 30, 40]
    assert path.support(step=40) == toy.optimizer.support()


def test_a_full_disk_while_thinning_does_not_change_the_interval_twice(tmp_path, monkeypatch):
    toy = Toy()
    path = Path(toy.optimizer, file=Run(tmp_path).path)
    toy.step(199)
    thin = path._history.thin

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(path._history, "thin", full)
    with pytest.raises(OSError, match="No space left"):
        toy.step(1)
    monkeypatch.setattr(path._history, "thin", thin)
    toy.step(102)
    assert 302 in steps_of(path)


# The warning that nothing can enter


def warnings_of(toy, steps=100, **options):
    """What a run warned of, and the density it came to."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Path(toy.optimizer, every=1, **options)
        toy.step(steps)
    return [str(w.message) for w in caught], toy.optimizer.support().density


REMEDY = re.compile(r"no block can enter Gamma .* use lam <= (\S+)$")


@pytest.mark.parametrize("known", [{"total_steps": 100}, {"total_time": 10.0}], ids=str)
def test_a_run_in_which_nothing_can_enter_is_warned_about_once(known):
    messages, density = warnings_of(Toy(lam=1000.0), **known)
    assert density == 0
    assert len(messages) == 1
    assert REMEDY.match(messages[0])


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "lr": 0.02}, {"block_scale": "sqrt"}])
def test_the_lam_of_the_warning_selects_something(options):
    messages, _ = warnings_of(Toy(lam=1000.0, **options), total_steps=100)
    lam = float(REMEDY.match(messages[0])[1])
    again, density = warnings_of(Toy(lam=lam, **options), total_steps=100)
    assert again == []
    assert density > 0


def test_the_lam_of_the_warning_selects_something_where_v_levels_off():
    def still(lam):
        w = nn.Parameter(torch.ones(4, 4))
        optimizer = DessiLBI([{"params": [("w", w)], "structure": "filter"}], nu=1.0, lam=lam)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Path(optimizer, every=1, total_steps=200)
            for _ in range(200):
                w.grad = torch.zeros_like(w)
                optimizer.step()
        return caught, optimizer.support().density

    caught, density = still(1000.0)
    assert (len(caught), density) == (1, 0)
    assert still(float(REMEDY.match(str(caught[0].message))[1]))[1] > 0


@pytest.mark.parametrize("known", [{"total_steps": 100}, {"total_time": 10.0}, {}], ids=str)
def test_a_run_in_which_something_enters_is_not_warned_about(known):
    messages, density = warnings_of(Toy(), **known)
    assert messages == []
    assert density > 0


def test_a_slow_start_is_not_warned_about():
    messages, density = warnings_of(Toy(lam=2.5), total_steps=100)
    assert messages == []
    assert density > 0


def test_several_lams_are_to_be_multiplied_by_what_selects_something():
    def toy(factor):
        toy = Toy()
        for group, lam in zip(toy.optimizer.param_groups, (1000.0, 3000.0, 1.0), strict=False):
            group["lam"] = factor * lam
        return toy

    messages, _ = warnings_of(toy(1.0), total_steps=100)
    factor = float(re.search(r"multiply every lam by (\S+)$", messages[0])[1])
    again, density = warnings_of(toy(factor), total_steps=100)
    assert again == []
    assert density > 0


def test_an_infinite_lam_is_a_wish_and_not_warned_about():
    assert warnings_of(Toy(lam=math.inf), total_steps=100) == ([], 0.0)


def test_without_a_known_end_nothing_is_predicted():
    assert warnings_of(Toy(lam=1000.0)) == ([], 0.0)


def test_the_advice_is_never_zero():
    w = nn.Parameter(torch.zeros(2, 2))
    optimizer = DessiLBI([{"params": [("w", w)], "structure": "filter"}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Path(optimizer, every=1, total_steps=10)
        for _ in range(10):
            w.grad = torch.zeros_like(w)
            optimizer.step()
    assert not any(re.search(r"<= 0\b(?!\.)", str(w.message)) for w in caught)


# Errors


@pytest.mark.parametrize("name", ["every", "total_steps"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_1_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} is not allowed: .* whole number >= 1"):
        Path(Toy().optimizer, **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"every": 2.5},
        {"total_steps": 99.5},
        {"total_time": 0.0},
        {"total_time": -1.0},
        {"total_time": math.nan},
    ],
    ids=str,
)
def test_a_number_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match="is not allowed"):
        Path(Toy().optimizer, **options)


def test_an_optimizer_without_a_structure_is_refused():
    optimizer = DessiLBI(nn.Linear(2, 2).named_parameters())
    with pytest.raises(ValueError, match=r"has a structure, so .* dessilbi\.param_groups\(model\)"):
        Path(optimizer)


def test_an_optimizer_of_torch_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"SGD has no Gamma .* give it one with dessilbi\.wrap"):
        Path(optimizer)


def test_an_optimizer_without_structure_is_refused():
    optimizer = DessiLBI(nn.Linear(2, 2).named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"dessilbi\.param_groups\(model\)"):
        Path(optimizer)


def test_unnamed_parameters_are_refused():
    optimizer = DessiLBI(nn.Linear(2, 2, bias=False).parameters(), structure="filter")
    with pytest.raises(ValueError, match=r"no names: give it model\.named_parameters\(\)"):
        Path(optimizer)


@pytest.mark.parametrize("options", [{}, {"density": 0.5, "step": 3}], ids=str)
def test_a_ticket_needs_exactly_one_of_density_and_step(options):
    with pytest.raises(ValueError, match="give exactly one of density, step"):
        watched()[1].ticket(**options)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order='best' is not known: use one of relative, weight"):
        watched()[1].ticket(density=0.5, order="best")


@pytest.mark.parametrize("density", [0, 1.5, -1, math.nan])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        watched()[1].ticket(density=density)


def test_a_density_below_the_first_block_names_the_smallest():
    with pytest.raises(ValueError, match=r"smallest ticket of this order has density 0\.0"):
        watched()[1].ticket(density=1e-6)


def test_a_step_before_the_first_point_is_refused():
    toy = Toy()
    path = Path(toy.optimizer, every=10)
    for ask in (path.support, path.ticket):
        with pytest.raises(ValueError, match="step=5 cannot be answered: this path has recorded"):
            ask(step=5)
    toy.step(10)
    for ask in (path.support, path.ticket):
        with pytest.raises(ValueError, match=r"step=5 .* its first step is 10"):
            ask(step=5)


def test_logging_before_any_point_is_refused():
    with pytest.raises(ValueError, match=r"call record\(\) first"):
        Path(Toy().optimizer).log(loss=1.0)


def test_a_loaded_path_cannot_record(tmp_path):
    saved(tmp_path, every=50)
    with pytest.raises(ValueError, match=r"loaded from a run folder .* Path\(optimizer\)$"):
        Path.load(tmp_path).record()


def test_a_closed_path_that_cannot_record_says_why():
    _, path = watched()
    path.close()
    with pytest.raises(ValueError, match="closed"):
        path.record()


def test_repr_says_how_far_it_came():
    _, path = watched()
    assert re.fullmatch(
        r"Path\(60 points to step 60, path time 6, density 0\.\d+, 2 tensors\)", repr(path)
    )
    assert repr(Path(Toy().optimizer)) == "Path(0 points to step 0, path time 0, 2 tensors)"


# continuing


def state_of(toy):
    """Weights and optimizer, as a user's own checkpoint holds them."""
    weights = {name: getattr(toy, name).detach().clone() for name in "weub"}
    return weights, copy.deepcopy(toy.optimizer.state_dict())


def toy_from(saved):
    toy = Toy()
    weights, state = saved
    for name, value in weights.items():
        getattr(toy, name).data.copy_(value)
    toy.optimizer.load_state_dict(state)
    return toy


@pytest.mark.parametrize("options", [{"every": 3}, {"total_steps": 300}, {}], ids=str)
@pytest.mark.parametrize("at", [1, 100, 230])
def test_a_path_that_is_continued_is_the_one_that_never_stopped(tmp_path, options, at):
    toy = Toy()
    Path(toy.optimizer, file=tmp_path / "whole", **options)
    toy.step(300)
    toy = Toy()
    path = Path(toy.optimizer, file=tmp_path / "cut", **options)
    toy.step(at)
    saved, position = state_of(toy), json.loads(json.dumps(path.state_dict()))
    toy.step(20)  # recorded after the checkpoint, and lost with the process
    again = toy_from(saved)
    path = Path(again.optimizer, file=tmp_path / "cut", resume=position, **options)
    again.step(300 - at)
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert path.step == 300
    assert len(path.points) >= 99


def test_a_continued_path_knows_what_it_recorded_before(tmp_path):
    toy = Toy()
    path = Path(toy.optimizer, every=1, file=tmp_path / "path")
    toy.step(30)
    path.log(accuracy=0.5)
    path.record()
    entries, points = path.entry(), path.points
    again = Path(toy.optimizer, every=1, file=tmp_path / "path", resume=path.state_dict())
    assert again.points == points
    assert all(torch.equal(again.entry()[name], entry) for name, entry in entries.items())
    assert any((entry != NEVER).any() for entry in entries.values())


def test_without_a_file_only_the_clock_goes_on(tmp_path):
    toy = Toy().step(1)
    path = Path(toy.optimizer, every=2, file=tmp_path / "path")
    toy.step(5)
    other = Path(toy.optimizer, every=2, resume=path.state_dict())
    assert (other.step, other.time, other.points) == (5, path.time, [])
    toy.step(1)
    assert other.points[-1].step == path.points[-1].step == 6


def test_the_warning_about_entries_is_given_once_over_both_parts(tmp_path):
    def watched(toy, **options):
        return Path(toy.optimizer, every=1, total_time=10.0, file=tmp_path / "path", **options)

    toy = Toy(lam=1e6)
    path = watched(toy)
    toy.step(7)  # looked once
    saved, position = state_of(toy), path.state_dict()
    again = toy_from(saved)
    path = watched(again, resume=position)
    with pytest.warns(UserWarning, match="no block can enter") as told:
        again.step(20)
    assert len(told) == 1


def test_a_path_in_memory_cannot_be_continued():
    path = Path(Toy().step().optimizer)
    with pytest.raises(ValueError, match=r"in memory only .* give Path a file=\.\.\."):
        path.state_dict()


def test_a_file_of_another_path_is_refused_and_left_alone(tmp_path):
    toy = Toy()
    path = Path(toy.optimizer, every=1, file=tmp_path / "path")
    other = Path(Toy(units=True).optimizer, every=1, file=tmp_path / "other")
    toy.step(3)
    wrong = {**path.state_dict(), "file": other.state_dict()["file"]}
    with pytest.raises(ValueError, match="of other tensors"):
        Path(toy.optimizer, file=tmp_path / "other", resume=wrong)
    longer = {**path.state_dict(), "file": {"bytes": 10**9, "crc": 0}}
    with pytest.raises(ValueError, match="no longer holds the 1000000000 bytes"):
        Path(toy.optimizer, file=tmp_path / "path", resume=longer)
    odd = {**path.state_dict(), "file": {**path.state_dict()["file"], "crc": 0}}
    before = (tmp_path / "path").read_bytes()
    with pytest.raises(ValueError, match="is of another run"):
        Path(toy.optimizer, file=tmp_path / "path", resume=odd)
    assert (tmp_path / "path").read_bytes() == before


@pytest.mark.parametrize("ask", ["support", "ticket"])
def test_a_step_behind_the_end_is_refused(ask):
    _, path = watched()
    with pytest.raises(ValueError, match="step=61 comes behind the path: its last step is 60"):
        getattr(path, ask)(step=61)


def ramped(lam, **options):
    """A row that nothing but the coupling moves, slowly at first, and what was warned of it."""
    w = nn.Parameter(torch.ones(4, 4))
    optimizer = DessiLBI([{"params": [("w", w)], "structure": "filter"}], nu=1.0, lam=lam)
    Schedules(optimizer, total_time=20.0, coupling=piecewise([(0.0, 0.0), (0.3, 1.0)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Path(optimizer, every=1, total_steps=200, **options)
        for _ in range(200):
            w.grad = 5 * (w.detach() - 1)
            optimizer.step()
    return [str(w.message) for w in caught], optimizer.support().density


def test_while_the_coupling_is_ramped_up_nothing_is_foreseen():
    assert ramped(lam=20.0) == ([], 1.0)


def test_once_the_coupling_stands_a_lam_out_of_reach_is_warned_about():
    (message,), density = ramped(lam=1000.0)
    assert density == 0
    assert REMEDY.match(message)


def joined(toy):
    """A group joins the optimizer."""
    late = nn.Parameter(torch.ones(3, 3))
    toy.optimizer.add_param_group({"params": [("late", late)], "structure": "filter"})


def test_tensors_that_join_later_are_warned_about_and_no_part_of_the_path():
    toy = Toy()
    path = Path(toy.optimizer, every=1)
    toy.step(5)
    joined(toy)
    with pytest.warns(UserWarning, match="late joined the optimizer after this path had begun"):
        toy.step(1)
    assert path.names == ["w", "e"]
    after = Path(toy.optimizer, every=1, after=path)
    path.close()
    toy.step(1)
    assert (after.names, after.step) == (["w", "e", "late"], 7)


def test_a_path_is_resumed_beside_tensors_that_joined_later(tmp_path):
    toy = Toy()
    path = Path(toy.optimizer, every=1, file=tmp_path / "path")
    toy.step(5)
    joined(toy)
    state = path.state_dict()
    assert state["joined"] == ["late"]
    path.close()
    again = Path(toy.optimizer, file=tmp_path / "path", resume=state)
    assert (again.names, again.step, len(again.points)) == (["w", "e"], 5, 5)


def test_tensors_that_joined_are_remembered_when_the_path_is_closed(tmp_path):
    toy = Toy()
    path = Path(toy.optimizer, every=10, file=tmp_path / "path")
    toy.step(5)
    joined(toy)
    path.close()
    again = Path(toy.optimizer, file=tmp_path / "path", resume=path.state_dict())
    assert again.names == ["w", "e"]


def test_what_an_older_state_knew_of_the_warning_counts_for_nothing():
    toy, hint = Toy(lam=1000.0), EntryHint()
    hint.load_state_dict({"pending": True, "before": [0.6, 0.2]})
    for time in (1.0, 2.0):
        hint.look(toy.step().optimizer, time, 10.0, entered=True)
    assert hint.state_dict()["pending"] is False
