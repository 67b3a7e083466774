# SPDX-License-Identifier: Apache-2.0
"""The fused CPU step computes what the reference computes, whatever happens between two steps."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from dessilbi import DessiLBI
from dessilbi.blocks.structure import extent
from dessilbi.kernels import cpu, layout
from dessilbi.optimizers import dual

pytestmark = pytest.mark.usefixtures("built_kernel")

# Name -> shape, structure, memory format. Some blocks are longer than a tile, some grids exotic.
CASES = {
    "none": ((40, 24, 3, 3), None, torch.contiguous_format),
    "element": ((64, 600), "element", torch.contiguous_format),
    "filter": ((40, 24, 3, 3), "filter", torch.contiguous_format),
    "filter-channels-last": ((40, 24, 3, 3), "filter", torch.channels_last),
    "long-filter": ((3, 20000), "filter", torch.contiguous_format),
    "channel": ((40, 24, 3, 3), "channel", torch.contiguous_format),
    "channel-channels-last": ((40, 24, 3, 3), "channel", torch.channels_last),
    "column": ((700, 60), "channel", torch.contiguous_format),
    "wide-column": ((50, 1100), "channel", torch.contiguous_format),
    "kernel": ((40, 24, 3, 3), "kernel", torch.contiguous_format),
    "kernel-channels-last": ((40, 24, 3, 3), "kernel", torch.channels_last),
    "head": ((96, 70), "head:32", torch.contiguous_format),
    "4x4": ((64, 600), (4, 4), torch.contiguous_format),
    "49": ((10, 588), (None, 49), torch.contiguous_format),
    "packed": ((96, 700), "head:8+8+8", torch.contiguous_format),
    "packed-columns": ((700, 96), (None, (8, 8, 8)), torch.contiguous_format),
    "layer": ((64, 600), "layer", torch.contiguous_format),
    "five-levels": ((8, 6, 5, 7), (2, 2, 1, 1), torch.contiguous_format),
    "in-out-in-out": ((8, 6, 5, 7), (None, 1, None, 1), torch.contiguous_format),
}
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "maximize": True, "kappa": 2.0},
    "decay": {"weight_decay": 0.1, "maximize": True, "block_scale": "sqrt"},
}


def values(shape, seed):
    """Values whose blocks differ in size along every dimension."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for dim, size in enumerate(shape):
        x *= torch.linspace(0.3, 1.5, size).reshape([-1 if d == dim else 1 for d in range(x.dim())])
    return x


def start(case, dtype=torch.float32):
    shape, structure, memory = CASES[case]
    p = values(shape, 0).to(dtype)
    p = p.to(memory_format=memory) if p.dim() == 4 else p
    return nn.Parameter(p), structure


def median_lam(p, structure, steps=3, lr=0.05, nu=0.5):
    """A threshold that some blocks pass on the way, and others do not."""
    if structure is None:
        return 1.0
    optimizer = DessiLBI(
        [("w", p.detach().clone().double().requires_grad_())],
        lr=lr,
        nu=nu,
        lam=1e9,
        structure=structure,
        fused=False,
    )
    (q,) = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        q.grad = torch.zeros_like(q)
        optimizer.step()
    (norms,) = dual.norms_of(optimizer, dual.units_of(dual.members(optimizer)))
    return float(norms.quantile(0.5)) if norms.numel() < 2**20 else float(norms.median())


def optimizer_of(p, structure, fused, **options):
    options = {"lr": 0.05, "nu": 0.5, **options}
    return DessiLBI([("w", p)], structure=structure, fused=fused, **options)


def steps(pair, count, first=0):
    """Step both of a pair of (parameter, optimizer) with the same gradients."""
    for k in range(first, first + count):
        grad = values(tuple(pair[0][0].shape), k + 1) * 0.1
        for p, optimizer in pair:
            p.grad = torch.empty_like(p).copy_(grad)
            optimizer.step()


def pair_of(case, dtype=torch.float32, **options):
    """A fused optimizer and a reference on equal weights; about half of the blocks get in."""
    p, structure = start(case, dtype)
    lam = median_lam(p, structure)
    if options.get("block_scale") == "sqrt" and structure is not None:
        lam /= (p.numel() / max(1, _num_blocks(p, structure))) ** 0.5
    a, b = p, nn.Parameter(p.detach().clone())
    told = {"lam": lam, **options}
    pair = (
        (a, optimizer_of(a, structure, True, **told)),
        (b, optimizer_of(b, structure, False, **told)),
    )
    assert [optimizer.kernel for _, optimizer in pair] == ["fused-cpu", "reference"]
    return pair


def _num_blocks(p, structure):
    return dual.members(optimizer_of(p, structure, False))[0].spec.num_blocks


def assert_agree(pair, *, exact=False, partial=True):
    """Weights and state agree: to the bit, or to the rounding of the norms or of the weights."""
    (p, a), (q, b) = pair
    assert torch.isfinite(p).all()
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    if p.dtype in (torch.bfloat16, torch.float16) and not exact:
        tolerance = {"rtol": 4 * torch.finfo(p.dtype).eps, "atol": torch.finfo(p.dtype).eps}
    assert_close(p, q, **tolerance)
    assert a.state[p].keys() == b.state[q].keys()
    for key, value in a.state[p].items():
        assert value.dtype == b.state[q][key].dtype
        assert_close(value, b.state[q][key], **tolerance)
    if partial and a.param_groups[0]["structure"] not in (None, "layer"):
        assert 0 < a.support().density < 1


def resumed(pair):
    """The same weights under new optimizers that have loaded the state of the old ones."""
    new = []
    for p, old in pair:
        (group,) = old.param_groups
        other = optimizer_of(p, group["structure"], group["fused"], lr=1.0)
        other.load_state_dict(copy.deepcopy(old.state_dict()))
        new.append((p, other))
    return tuple(new)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_the_fused_step_is_the_reference_step(case, options):
    pair = pair_of(case, **options)
    steps(pair, 3)
    assert_agree(pair, exact=CASES[case][1] in (None, "element"), partial=False)
    for _, optimizer in pair:
        optimizer.param_groups[0]["lam"] *= 1.1
    steps(pair, 3, first=3)
    pair = resumed(pair)
    steps(pair, 1, first=6)
    # Blocks of packed parts are of much the same size: by now all of them are selected.
    assert_agree(pair, exact=CASES[case][1] in (None, "element"), partial="packed" not in case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["none", "element", "filter", "channel", "kernel"])
def test_every_dtype_is_stepped(case, dtype):
    pair = pair_of(case, dtype, **OPTIONS["nesterov"])
    steps(pair, 4)
    # In low precision torch rounds factors such as lr as well; the fused step does not.
    assert_agree(pair, exact=dtype == torch.float64 and CASES[case][1] in (None, "element"))
    if CASES[case][1] is not None:
        assert pair[0][1].state[pair[0][0]]["v"].dtype == torch.promote_types(dtype, torch.float32)


def test_a_layer_enters_as_a_whole():
    pair = pair_of("layer")
    steps(pair, 2)
    assert pair[0][1].support().density == 0
    steps(pair, 6, first=2)
    assert_agree(pair)
    assert pair[0][1].support().density == 1


@st.composite
def tensors(draw):
    """A shape, a block that divides it, and an order of the dimensions in memory."""
    block, shape = [], []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.sampled_from([None, 1, 1, 2, 3, (1, 1), (2, 2, 2)]))
        block.append(length)
        shape.append(extent(length, 1) * draw(st.integers(1, 5)))
    return tuple(shape), tuple(block), draw(st.permutations(range(len(shape))))


@settings(max_examples=60)
@given(tensors(), st.sampled_from([7, 64, 16384]))
def test_any_block_in_any_memory_order_is_summed_and_scaled_right(tensor, tile):
    shape, block, order = tensor
    inverse = [order.index(d) for d in range(len(order))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "TILE", tile)
        x = values([shape[d] for d in order], 0).permute(inverse)
        pairs = []
        for fused in (True, False):
            p = nn.Parameter(torch.empty_like(x).copy_(x))
            assert p.stride() == x.stride()
            pairs.append((p, optimizer_of(p, block, fused, lam=0.05, momentum=0.5)))
        assert pairs[0][1].kernel == "fused-cpu"
        steps(pairs, 4)
    assert_agree(pairs, partial=False)


@pytest.fixture
def many_tiles(monkeypatch):
    """Small tensors in many tiles, on as many threads as torch is told."""
    monkeypatch.setattr(layout, "TILE", 512)
    monkeypatch.setattr(cpu, "_PER_THREAD", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_one_thread_and_many_give_the_same_bits(case, options, many_tiles):
    runs = []
    for threads in (1, 2, 5):
        many_tiles(threads)
        p, structure = start(case)
        optimizer = optimizer_of(p, structure, True, lam=median_lam(p, structure), **options)
        steps([(p, optimizer)], 4)
        assert optimizer.kernel == "fused-cpu"
        runs.append((p, optimizer))
    for other in runs[1:]:
        assert_agree((runs[0], other), exact=True, partial=False)


@pytest.mark.parametrize("case", ["filter", "long-filter", "wide-column", "kernel", "layer", "4x4"])
def test_norms_computed_again_are_those_that_were_carried(case):
    (p, optimizer), other = pair_of(case, momentum=0.9)
    steps(((p, optimizer), other), 4)
    carried = optimizer._fusion._carried[0]
    before = carried._plan.sums.clone()
    assert before.count_nonzero() == before.numel() > 0
    for i, _ in carried._squared:
        carried._plan.rebuild(i)
    assert torch.equal(before, carried._plan.sums)
    total = optimizer.state[p]["v"].double().square().sum()
    assert_close(before.sum(), total, rtol=1e-7, atol=0)


def test_denormals_are_flushed_on_all_threads_or_on_none(many_tiles):
    runs = []
    for threads in (1, 2):
        many_tiles(threads)
        p = nn.Parameter(torch.full((64, 600), 1e-38))
        optimizer = optimizer_of(p, None, True, lr=0.999)
        p.grad = p.detach().clone()
        torch.set_flush_denormal(True)
        try:
            optimizer.step()
        finally:
            torch.set_flush_denormal(False)
        runs.append(p.detach())
    assert not runs[0].any()
    assert torch.equal(*runs)


def other_lam(optimizer):
    optimizer.param_groups[0]["lam"] *= 1.2


def other_numbers(optimizer):
    optimizer.param_groups[0].update(kappa=0.5, nu=1.0, lr=0.01, momentum=0.3, weight_decay=0.1)


def other_structure(optimizer):
    optimizer.param_groups[0]["structure"] = "kernel"


def no_momentum(optimizer):
    optimizer.param_groups[0]["momentum"] = 0.0


def written_v(optimizer):
    for state in optimizer.state.values():
        state["v"].mul_(0.5)


def exchanged_v(optimizer):
    for state in optimizer.state.values():
        state["v"] = state["v"] * 0.5


def exchanged_memory_of_v(optimizer):
    for state in optimizer.state.values():
        state["v"].data = state["v"].detach() * 0.5


def reordered_v(optimizer):
    for state in optimizer.state.values():
        state["v"] = state["v"].contiguous(memory_format=torch.channels_last)


def exchanged_weights(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.data = p.detach() * 0.9


def reordered_weights(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.data = p.detach().contiguous(memory_format=torch.channels_last)


def loaded(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def loaded_from_elsewhere(optimizer):
    (p,) = optimizer.param_groups[0]["params"]
    other = optimizer_of(nn.Parameter(p.detach() * 0.5), "filter", False, momentum=0.9)
    other.param_groups[0].update({**optimizer.param_groups[0], "params": [p], "fused": None})
    given = optimizer.state_dict()
    given["state"][0] = {key: 0.7 * value for key, value in given["state"][0].items()}
    optimizer.load_state_dict(given)


def added_group(optimizer):
    late = nn.Parameter(torch.ones(4, 5))
    optimizer.add_param_group({"params": [("late", late)], "structure": "filter"})


def enforced(optimizer):
    for state in optimizer.state.values():
        state["v"][:7] = 0
        state["momentum_buffer"][:7] = 0


EVENTS = [other_lam, other_numbers, other_structure, no_momentum, written_v, exchanged_v]
EVENTS += [exchanged_memory_of_v, reordered_v, exchanged_weights, reordered_weights, loaded]
EVENTS += [loaded_from_elsewhere, added_group, enforced]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_what_happens_between_steps_is_noticed(event):
    pair = pair_of("filter", momentum=0.9)
    steps(pair, 3)
    undisturbed = copy.deepcopy(pair)
    for _, optimizer in pair:
        fused = optimizer.param_groups[0]["fused"]
        event(optimizer)
        optimizer.param_groups[0]["fused"] = fused
    steps(pair, 4, first=3)
    assert_agree(pair)
    steps(undisturbed, 4, first=3)
    if event not in (loaded, added_group, reordered_v, reordered_weights):
        assert not torch.equal(undisturbed[0][0], pair[0][0]), "vacuous: the event changed nothing"
    if event not in (reordered_v, reordered_weights):  # V lies otherwise than W: not fused
        assert "fused-cpu" in pair[0][1].kernel


def test_a_step_without_carried_norms_gives_the_same_bits():
    a, b = pair_of("filter", momentum=0.9)[0], pair_of("filter", momentum=0.9)[0]
    for k in range(6):
        steps((a, b), 1, first=k)
        b[1].__setstate__(b[1].__getstate__())  # forgets all that is not state
    assert_agree((a, b), exact=True)


def test_what_the_step_writes_to_is_known_to_autograd():
    p, structure = start("filter")
    optimizer = optimizer_of(p, structure, True, momentum=0.9)
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    before = p._version
    optimizer.step()
    assert p._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_that_lie_otherwise_are_read_right():
    pair = pair_of("filter-channels-last", momentum=0.9)
    for k in range(4):
        grad = values(CASES["filter-channels-last"][0], k + 1).float()
        for p, optimizer in pair:
            p.grad = grad if k % 2 else grad[:, :1].expand_as(p)
            optimizer.step()
    assert_agree(pair)


def test_tensors_with_gaps_step_beside_fused_ones():
    runs = []
    for fused in (True, False):
        whole = values((40, 30), 0).float()
        gaps = nn.Parameter(values((40, 60), 1).float()[:, ::2])
        groups = [("whole", nn.Parameter(whole)), ("gaps", gaps)]
        optimizer = DessiLBI(groups, lr=0.1, nu=0.5, lam=1.5, structure="filter", fused=fused)
        for _ in range(5):
            for _, p in groups:
                p.grad = p.detach() * 0.1
            optimizer.step()
        runs.append((groups, optimizer))
    assert [o.kernel for _, o in runs] == ["fused-cpu+reference", "reference"]
    for (_, p), (_, q) in zip(*[groups for groups, _ in runs], strict=True):
        assert_close(p, q)
    assert 0 < runs[0][1].support().density < 1


def unit_of_two(fused, lam=4.0):
    named = [("a", nn.Parameter(values((12, 30), 0).float()))]
    named += [("b", nn.Parameter(values((12, 8, 3, 3), 1).float()))]
    groups = [{"params": [pair]} for pair in named]
    options = {"lr": 0.1, "nu": 0.5, "lam": lam, "structure": "filter", "unit": "u"}
    return named, DessiLBI(groups, fused=fused, **options)


def test_a_member_without_gradient_lends_its_norms_to_its_unit():
    runs = [unit_of_two(fused) for fused in (True, False)]
    for k in range(8):
        for named, optimizer in runs:
            for name, p in named:
                p.grad = None if k > 3 and name == "b" else p.detach() * 0.1
            optimizer.step()
    for (_, p), (_, q) in zip(runs[0][0], runs[1][0], strict=True):
        assert_close(p, q)
    alone = runs[0][1].state[runs[0][0][0][1]]["v"].norm(dim=1)
    assert 0 < runs[0][1].support().density < 1
    assert (alone > 4.0).tolist() != runs[0][1].support()["a"].reshape(-1).tolist()


def test_a_unit_that_no_longer_agrees_is_refused_and_nothing_moves():
    named, optimizer = unit_of_two(fused=True)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for _, p in named]
    optimizer.param_groups[1]["lam"] = 3.0
    with pytest.raises(ValueError, match="members need the same lam"):
        optimizer.step()
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


def test_thresholds_may_differ_from_block_to_block(monkeypatch):
    pair = pair_of("kernel-channels-last", momentum=0.9)
    lam = pair[0][1].param_groups[0]["lam"]
    per_block = lam * torch.linspace(0.5, 1.5, 40 * 24).reshape(40, 24, 1, 1)
    monkeypatch.setattr(dual, "threshold", lambda unit: per_block)
    steps(pair, 6)
    assert_agree(pair)
    monkeypatch.setattr(dual, "threshold", lambda unit: lam)
    uniform = pair_of("kernel-channels-last", momentum=0.9)
    steps(uniform, 6)
    assert not torch.equal(uniform[0][0], pair[0][0])


def test_a_nan_stays_visible():
    pair = pair_of("filter")
    steps(pair, 2)
    for p, optimizer in pair:
        optimizer.state[p]["v"][3, 0, 0, 0] = torch.nan
        p.grad = torch.zeros_like(p)
        optimizer.step()
    (p, _), (q, _) = pair
    assert p[3].isnan().all()
    assert torch.equal(p.isnan(), q.isnan())


def test_an_infinite_lam_keeps_gamma_at_zero():
    for case in ("element", "filter"):
        pair = pair_of(case, lam=torch.inf)
        steps(pair, 4)
        assert_agree(pair, partial=False)
        assert pair[0][1].support().density == 0


def test_momentum_of_a_placeholder_is_not_damped_at_its_first_step():
    pair = pair_of("filter", momentum=0.9, dampening=0.5)
    for p, optimizer in pair:
        p.grad = torch.zeros_like(p)
        lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
        optimizer.step()  # as distributed checkpoints ask for state
        optimizer.param_groups[0]["lr"] = lr
    steps(pair, 4)
    assert_agree(pair)


def test_a_sparse_gradient_is_refused_before_anything_moves():
    weight = nn.Parameter(torch.ones(4, 3))
    table = nn.Embedding(5, 3, sparse=True).weight
    optimizer = DessiLBI([weight, table], fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    table.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0, 1.0]], (5, 3), check_invariants=True)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="is sparse"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_a_compiled_step_and_an_eager_one_can_take_turns():
    pair = pair_of("filter", momentum=0.9)
    torch._dynamo.reset()
    compiled = torch.compile(pair[0][1].step, backend="aot_eager")
    for k in range(6):
        for (p, optimizer), step in zip(pair, (compiled, pair[1][1].step), strict=True):
            p.grad = torch.empty_like(p).copy_(values(tuple(p.shape), k + 1) * 0.1)
            step() if k % 3 else optimizer.step()
    assert_agree(pair)
    assert pair[0][1]._fusion._carried


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "fused-cpu"),
        ({"fused": True}, "fused-cpu"),
        ({"fused": False}, "reference"),
        ({"foreach": True}, "foreach"),
        ({"foreach": False}, "reference"),
        ({"foreach": False, "fused": True}, "fused-cpu"),
    ],
    ids=str,
)
def test_the_kernel_is_the_one_asked_for_and_can_be_seen(options, kernel):
    optimizer = DessiLBI([nn.Parameter(torch.ones(3, 2))], **options)
    assert optimizer.kernel == kernel
    assert f"kernel: {kernel}" in repr(optimizer)


def test_fused_and_foreach_are_not_allowed_together():
    with pytest.raises(ValueError, match="fused=True and foreach=True are not allowed together"):
        DessiLBI([nn.Parameter(torch.ones(3, 2))], fused=True, foreach=True)


@pytest.mark.parametrize(
    "param",
    [torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")],
    ids=["complex", "elsewhere"],
)
def test_fused_is_refused_for_what_no_kernel_takes(param):
    with pytest.raises(ValueError, match="fused=True is not allowed for a parameter of shape"):
        DessiLBI([nn.Parameter(param)], fused=True)
    assert DessiLBI([nn.Parameter(param)]).kernel == "reference"
