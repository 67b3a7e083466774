# SPDX-License-Identifier: Apache-2.0
"""What a fused step carries holds whatever a program does to model, state and groups meanwhile."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.testing import assert_close

from dessilbi import DessiLBI, wrap

pytestmark = pytest.mark.usefixtures("built_kernel")
STEPS = 3


def net():
    """A small net in channels-last order: its filters lie otherwise than files keep them."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def groups_of(model):
    named = list(model.named_parameters())
    return [
        {"params": [x for x in named if x[1].dim() == 4], "structure": "filter", "lam": 0.3},
        {"params": [x for x in named if x[1].dim() == 2], "structure": "element", "lam": 0.02},
        {"params": [x for x in named if x[1].dim() < 2], "structure": None},
    ]


def dessilbi(model, fused):
    return DessiLBI(groups_of(model), lr=0.05, nu=0.2, momentum=0.9, fused=fused)


def wrapped(model, fused):
    # A large eps, so that AdamW does not blow up the rounding of gradients near zero.
    base = torch.optim.AdamW(groups_of(model), lr=0.03, eps=1e-3)
    return wrap(base, nu=0.1, lam=1.0, fused=fused)


def train(run, steps, seed):
    model, optimizer = run
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
        y = torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def first(run):
    """The first weight."""
    return run[0][0].weight


def v_of(run):
    return run[1].state[first(run)]["v"]


def deep_copied(run, make):
    return copy.deepcopy(run)


def pickled(run, make):
    return pickle.loads(pickle.dumps(run))


def without_gradient(run, make):
    first(run).requires_grad_(False).grad = None
    return run


def without_gradient_for_a_while(run, make):
    train(without_gradient(run, make), 2, seed=9)
    first(run).requires_grad_(True)
    return run


def in_other_dtypes_meanwhile(run, make):
    run[0].half().bfloat16().float()
    return run


def in_another_memory_order(run, make):
    run[0].to(memory_format=torch.contiguous_format)
    return run


def written_to_through_a_view(run, make):
    v_of(run)[2:4].zero_()
    return run


def written_to_through_detach(run, make):
    v_of(run).detach().mul_(0.3)
    return run


def written_to_by_foreach(run, make):
    torch._foreach_mul_([state["v"] for state in run[1].state.values() if "v" in state], 0.3)
    return run


def written_to_as_out(run, make):
    torch.mul(v_of(run), 0.3, out=v_of(run))
    return run


def written_to_in_inference_mode(run, make):
    with torch.inference_mode():
        v_of(run).mul_(0.3)
    return run


def another_memory_under_v(run, make):
    v_of(run).set_(v_of(run) * 0.3)
    return run


def another_state(run, make):
    state = dict(run[1].state[first(run)])
    run[1].state[first(run)] = state | {"v": state["v"] * 0.3}
    return run


def no_state(run, make):
    run[1].state.clear()
    return run


def loaded_from_contiguous_files(run, make):
    given = copy.deepcopy(run[1].state_dict())
    for state in given["state"].values():
        state |= {key: value.contiguous() for key, value in state.items()}
    run[1].load_state_dict(given)
    return run


def loaded_into_new_ones(run, make):
    kept = io.BytesIO()
    torch.save([part.state_dict() for part in run], kept)
    kept.seek(0)
    model = net()
    new = model, make(model, "fused-cpu" in run[1].kernel)
    for part, given in zip(new, torch.load(kept), strict=True):
        part.load_state_dict(given)
    return new


def another_parameter(run, make):
    old = first(run)
    run[0][0].weight = new = nn.Parameter(old.detach().clone())
    for group in run[1].param_groups:  # in place, as accelerate does
        group["params"][:] = [new if p is old else p for p in group["params"]]
    run[1].state[new] = run[1].state.pop(old)
    return run


def other_groups(run, make):
    run[1].param_groups.reverse()
    run[1].param_groups[-1].update(block_scale="sqrt", lam=0.1)
    return run


def a_step_in_inference_mode(run, make):
    with torch.inference_mode():
        run[1].step()
    return run


def a_step_with_a_closure(run, make):
    model, optimizer = run
    gradients = {p: p.grad for p in model.parameters()}

    def closure():
        for p, grad in gradients.items():
            p.grad = grad
        return 0.0

    optimizer.zero_grad()
    optimizer.step(closure)
    return run


NEUTRAL = [deep_copied, pickled, loaded_from_contiguous_files, loaded_into_new_ones]
EVENTS = [
    *(*NEUTRAL, another_parameter, another_state, another_memory_under_v, no_state, other_groups),
    *(without_gradient, without_gradient_for_a_while, a_step_with_a_closure),
    *(in_other_dtypes_meanwhile, in_another_memory_order, a_step_in_inference_mode),
    *(written_to_through_a_view, written_to_through_detach, written_to_by_foreach),
    *(written_to_as_out, written_to_in_inference_mode),
]


def run_with(make, event, fused):
    model = net()
    run = model, make(model, fused)
    train(run, STEPS, seed=0)
    assert ("fused-cpu" in run[1].kernel) is fused
    run = event(run, make)
    train(run, STEPS, seed=1)
    return run


def largest_difference(run, other):
    pairs = zip(run[0].parameters(), other[0].parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("make", [dessilbi, wrapped])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_the_fused_run_goes_on_as_the_reference_does(make, event):
    fused, reference = (run_with(make, event, asked) for asked in (True, False))
    assert "fused-cpu" in fused[1].kernel
    assert fused[1].kernel == "fused-cpu" or event is in_another_memory_order
    assert largest_difference(fused, reference) < 2e-6
    assert 0.05 < fused[1].support().density < 0.95
    for p, q in zip(fused[0].parameters(), reference[0].parameters(), strict=True):
        if "v" in fused[1].state[p]:
            assert_close(fused[1].state[p]["v"], reference[1].state[q]["v"])
    if event not in NEUTRAL:
        undisturbed = run_with(make, lambda run, make: run, fused=True)
        changed = largest_difference(fused, undisturbed)
        assert changed > 1e-5 or event in (another_parameter, in_another_memory_order), "vacuous"


@pytest.mark.parametrize("make", [dessilbi, wrapped])
@pytest.mark.parametrize("event", NEUTRAL, ids=lambda event: event.__name__)
def test_the_fused_run_goes_on_to_the_bit(make, event):
    run = run_with(make, event, fused=True)
    undisturbed = run_with(make, lambda run, make: run, fused=True)
    assert largest_difference(run, undisturbed) == 0


@pytest.mark.parametrize("make", [dessilbi, wrapped])
def test_writes_to_v_that_torch_does_not_see_have_to_be_told(make):
    def silent(run, make):
        v_of(run).permute(0, 2, 3, 1).numpy()[:] *= 0.1
        return run

    def told(run, make):
        silent(run, make)
        increment_version(v_of(run))
        return run

    reference = run_with(make, silent, fused=False)
    assert largest_difference(run_with(make, silent, fused=True), reference) > 1e-5
    assert largest_difference(run_with(make, told, fused=True), reference) < 2e-6


def test_tensors_without_elements_and_without_dimensions_step_along():
    runs = []
    for fused in (True, False):
        params = [nn.Parameter(torch.ones(shape)) for shape in [(), (0, 3), (4, 0), (1,), (2, 3)]]
        groups = [{"params": [p], "structure": "layer"} for p in params]
        optimizer = DessiLBI(groups, lr=0.1, nu=0.5, lam=0.3, momentum=0.5, fused=fused)
        for _ in range(4):
            for p in params:
                p.grad = 0.1 * p.detach()
            optimizer.step()
        runs.append((params, optimizer))
    assert runs[0][1].kernel == "fused-cpu+reference"
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        assert_close(p, q)
        if p.numel():
            assert_close(runs[0][1].state[p]["v"], runs[1][1].state[q]["v"])
            assert runs[0][1].state[p]["v"].norm() > 0.3


def _give(weight, grad, *_):
    weight.grad = grad


def test_a_wrapped_base_may_give_a_gradient_that_was_not_there_before_its_step():
    runs = []
    for fused in (True, False):
        model = net()
        optimizer = wrapped(model, fused)
        run = model, optimizer
        train(run, 2, seed=0)
        weight, late = first(run), first(run).grad
        weight.grad = None
        optimizer.base.register_step_pre_hook(partial(_give, weight, late))
        optimizer.step()
        runs.append(run)
    # Nobody could keep W from before the step, so the base moves it and the coupling does not.
    assert largest_difference(*runs) < 2e-6


def test_a_wrapped_model_that_is_moved_to_a_narrower_type_goes_on_as_the_reference_does():
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(6, 5, bias=False)
        base = torch.optim.SGD(layer.named_parameters(), lr=0.1)
        optimizer = wrap(base, nu=1.0, lam=0.3, structure="filter", fused=fused)
        for step in range(6):
            if step == 3:
                layer.bfloat16()
            noise = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            layer.weight.grad = noise.to(layer.weight.dtype)
            optimizer.step()
        assert optimizer.kernel == ("fused-cpu" if fused else "reference")
        assert 0 < optimizer.support().density < 1
        weights.append(layer.weight.detach().float())
    assert_close(*weights, rtol=0.02, atol=0.01)
