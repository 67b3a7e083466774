# SPDX-License-Identifier: Apache-2.0
"""The optimizer as a citizen of torch.optim: arguments, state, gradients, memory, names."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dessilbi import DessiLBI
from dessilbi.blocks.structure import block_norms, resolve

both_kernels = pytest.mark.parametrize("foreach", [False, True], ids=["reference", "foreach"])


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def groups_of(model):
    """Weights by filter, biases without a structure."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "structure": "filter"},
        {"params": [(n, p) for n, p in named if p.dim() <= 1]},
    ]


def optimizer_of(model, **options):
    defaults = {"lr": 0.05, "nu": 2.0, "lam": 1.3, "momentum": 0.9}
    return DessiLBI(groups_of(model), **{**defaults, **options})


def loss_of(model, k=0):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(16, 6, generator=generator)
    return (model(x) - x[:, :3].sin()).square().mean()


def train(model, optimizer, steps, first=0):
    for k in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, k).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@both_kernels
def test_the_loss_falls_and_some_filters_are_selected(foreach):
    model = small_net()
    optimizer = optimizer_of(model, foreach=foreach)
    before = loss_of(model).item()
    train(model, optimizer, 100)
    assert loss_of(model).item() < 0.5 * before
    assert 0 < optimizer.support().density < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr=-0\.1 is not allowed: it must be >= 0 and finite"),
        ({"lr": math.nan}, "lr=nan is not allowed"),
        ({"lr": math.inf}, "lr=inf is not allowed"),
        ({"lr": torch.tensor(-1.0)}, r"lr=tensor\(-1\.\) is not allowed"),
        ({"lr": torch.ones(2)}, r"lr has shape \(2,\): a tensor lr must have one element"),
        ({"lr": None}, "lr=None is not allowed: it must be a number"),
        ({"kappa": 0.0}, r"kappa=0\.0 is not allowed: it must be > 0 and finite"),
        ({"kappa": math.inf}, "kappa=inf is not allowed"),
        ({"kappa": torch.ones(2)}, r"kappa=tensor\(\[1\., 1\.\]\) is not allowed"),
        ({"nu": 0}, "nu=0 is not allowed: it must be > 0 and finite"),
        ({"nu": -1.0}, r"nu=-1\.0 is not allowed"),
        ({"nu": math.nan}, "nu=nan is not allowed"),
        ({"lam": 0.0}, r"lam=0\.0 is not allowed: it must be > 0 \(inf is allowed\)"),
        ({"lam": -1.0}, r"lam=-1\.0 is not allowed"),
        ({"lam": math.nan}, "lam=nan is not allowed"),
        ({"momentum": -0.9}, r"momentum=-0\.9 is not allowed: it must be >= 0 and finite"),
        ({"momentum": "a lot"}, "momentum='a lot' is not allowed: it must be a number"),
        ({"dampening": math.inf}, "dampening=inf is not allowed: it must be finite"),
        ({"weight_decay": -1e-4}, "weight_decay=-0.0001 is not allowed: it must be >= 0"),
        ({"block_scale": "mean"}, "block_scale='mean' is not allowed: it must be 'unit' or 'sqrt'"),
        ({"unit": 3, "structure": "element"}, "unit=3 is not allowed: it must be a name or None"),
        ({"unit": "", "structure": "element"}, "unit='' is not allowed: it must be a name or None"),
        ({"unit": "u"}, "unit='u' is not allowed on a group without a structure: say which blocks"),
        ({"nesterov": True}, r"nesterov=True with momentum=0\.0 and .* needs momentum > 0"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            r"nesterov=True with momentum=0\.9 and dampening=0\.1 is not allowed",
        ),
        ({"structure": (4, None)}, r"does not divide fc of shape \(6, 3\): .* choose a divisor"),
        ({"structure": "kernel"}, "'kernel' needs a tensor with 3 or more dimensions but fc"),
        ({"structure": 1}, "structure 1 of fc is not allowed: use one of element"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_out_of_range_is_refused_with_name_value_and_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        DessiLBI([("fc", nn.Parameter(torch.ones(6, 3)))], **options)


@pytest.mark.parametrize("value", ["2", 10**400], ids=["a string", "beyond float"])
def test_what_cannot_be_computed_with_is_refused_at_once(value):
    with pytest.raises(ValueError, match="nu="):
        DessiLBI([nn.Parameter(torch.ones(2))], nu=value)


def test_complex_weights_cannot_have_a_structure_and_train_without():
    param = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"fc is torch\.complex64 and cannot have structure='fil"):
        DessiLBI([("fc", param)], structure="filter")
    optimizer = DessiLBI([("fc", param)], lr=0.5)
    param.grad = torch.full_like(param, 1j)
    optimizer.step()
    assert_close(param.detach(), torch.full_like(param, 1 - 0.5j).detach())


def sparse_embedding():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    return embedding


@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_sparse_gradients_are_refused_with_the_remedy(lr):
    embedding = sparse_embedding()
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"shape \(4, 2\) is sparse: .*SparseAdam"):
        DessiLBI(embedding.parameters(), lr=lr).step()
    assert torch.equal(embedding.weight, before)


def test_a_refused_step_moves_no_group():
    embedding, first = sparse_embedding(), nn.Parameter(torch.ones(2))
    first.grad = torch.ones(2)
    optimizer = DessiLBI([{"params": [first]}, {"params": [embedding.weight]}])
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2))


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    model = small_net()
    optimizer, calls = optimizer_of(model), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    before = model[0].weight.detach().clone()
    loss = optimizer.step(closure)
    assert calls == [True]
    assert torch.is_tensor(loss)
    assert loss.requires_grad
    assert not torch.equal(model[0].weight, before)
    assert optimizer.step() is None


@both_kernels
def test_parameters_without_a_gradient_are_untouched_and_get_no_state(foreach):
    model = small_net()
    optimizer = optimizer_of(model, foreach=foreach)
    loss_of(model).backward()
    idle = [model[2].weight, model[0].bias]
    before = [p.detach().clone() for p in idle]
    for p in idle:
        p.grad = None
    optimizer.step()
    for p, old in zip(idle, before, strict=True):
        assert torch.equal(p, old)
        assert p not in optimizer.state
    assert set(optimizer.state[model[0].weight]) == {"v", "momentum_buffer"}


@both_kernels
@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"nesterov": True}, {"maximize": True}])
def test_gradients_and_storage_are_left_as_they_are(options, foreach):
    model = small_net()
    optimizer = optimizer_of(model, foreach=foreach, weight_decay=0.1, **options)
    for k in range(3):
        optimizer.zero_grad()
        loss_of(model, k).backward()
        params = list(model.parameters())
        before = [(p.data_ptr(), p.grad.data_ptr(), p.grad.clone()) for p in params]
        optimizer.step()
        for p, (data, grad, value) in zip(params, before, strict=True):
            assert (p.data_ptr(), p.grad.data_ptr()) == (data, grad)
            assert torch.equal(p.grad, value)
        assert {v.data_ptr() for s in optimizer.state.values() for v in s.values()}.isdisjoint(
            grad for _, grad, _ in before
        )


@both_kernels
@pytest.mark.parametrize("structure", ["filter", "element", "kernel", (2, None, 1, 3)])
def test_memory_format_is_kept_and_does_not_change_results(structure, foreach):
    start = torch.randn(4, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    # Without much of a gradient V goes to W_0: half of the blocks get over this threshold.
    lam = 0.9 * float(block_norms(start, resolve(structure, start.shape)).quantile(0.5))
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = nn.Parameter(start.clone(memory_format=layout))
        optimizer = DessiLBI(
            [("w", param)],
            structure=structure,
            lr=0.2,
            nu=1.0,
            lam=lam,
            foreach=foreach,
            momentum=0.5,
        )
        strides = param.stride()
        for _ in range(40):
            param.grad = param.detach() * 0.1
            optimizer.step()
        assert param.stride() == strides
        assert optimizer.state[param]["v"].stride() == strides
        assert 0 < optimizer.support().density < 1
        results.append(param.detach().contiguous())
    assert_close(*results)


@both_kernels
@pytest.mark.parametrize("structure", ["filter", "element"])
def test_a_non_contiguous_parameter_trains_like_a_contiguous_one(structure, foreach):
    base = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    lam = 0.9 * float(block_norms(base[::2, ::3], resolve(structure, (4, 4))).quantile(0.5))
    results = []
    for view in (base.clone()[::2, ::3], base[::2, ::3].contiguous()):
        param = nn.Parameter(view)
        optimizer = DessiLBI(
            [("w", param)], structure=structure, lr=0.2, nu=1.0, lam=lam, foreach=foreach
        )
        for _ in range(40):
            param.grad = param.detach() * 0.1
            optimizer.step()
        assert 0 < optimizer.support().density < 1
        results.append(param.detach().clone())
    assert not nn.Parameter(base[::2, ::3]).is_contiguous()
    assert_close(*results)


@both_kernels
@pytest.mark.parametrize("structure", ["filter", "element", "layer", None])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), ()])
def test_parameters_of_zero_size_or_no_dimension_train(shape, structure, foreach):
    if structure == "filter" and not shape:
        structure = "element"
    param = nn.Parameter(torch.ones(shape))
    optimizer = DessiLBI(
        [("w", param)], structure=structure, momentum=0.9, foreach=foreach, block_scale="sqrt"
    )
    for _ in range(2):
        param.grad = torch.ones(shape)
        optimizer.step()
    assert param.shape == shape
    assert (param < 1).all()
    if structure is not None:
        assert optimizer.gamma()["w"].shape == shape
        assert optimizer.support().density == 0


@both_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["filter", "element"])
def test_every_floating_dtype_trains_and_keeps_v_at_least_float32(dtype, structure, foreach):
    param = nn.Parameter(torch.linspace(0.1, 1, 12).reshape(4, 3).to(dtype))
    optimizer = DessiLBI(
        [("w", param)], structure=structure, lr=0.5, nu=1.0, lam=0.8, momentum=0.5, foreach=foreach
    )
    for _ in range(4):
        param.grad = param.detach() * 0.1
        optimizer.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert param.dtype == dtype
    assert optimizer.state[param]["v"].dtype == wide
    assert optimizer.gamma()["w"].dtype == wide
    assert 0 < optimizer.support().density < 1


@pytest.mark.parametrize(("shape", "foreach"), [((2, 2), True), ((), False)])
def test_lr_may_be_any_tensor_with_one_element(shape, foreach):
    param = nn.Parameter(torch.ones(shape))
    optimizer = DessiLBI([param], lr=torch.tensor([0.5]), foreach=foreach)
    param.grad = torch.ones(shape)
    optimizer.step()
    assert_close(param.detach(), torch.full(shape, 0.5))


def test_a_learning_rate_schedule_is_followed():
    model = small_net()
    optimizer = optimizer_of(model, momentum=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.0)
    train(model, optimizer, 1)
    schedule.step()
    moved = train(model, optimizer, 1)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0
    v = optimizer.state[model[0].weight]["v"].clone()
    assert all(map(torch.equal, train(model, optimizer, 1), moved))
    assert torch.equal(optimizer.state[model[0].weight]["v"], v)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_continues_exactly_as_the_original(copier):
    model = small_net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 60)
    model2, optimizer2 = copier((model, optimizer))
    first = train(model, optimizer, 20, first=60)
    second = train(model2, optimizer2, 20, first=60)
    assert 0 < optimizer.support().density < 1
    assert all(map(torch.equal, first, second))
    assert optimizer.support() == optimizer2.support()
    assert model2[0].weight is not model[0].weight


def test_a_group_added_during_the_run_joins_it():
    model = small_net()
    optimizer = DessiLBI(groups_of(model[0]), lr=0.05, nu=2.0, lam=0.5)
    train(model, optimizer, 5)
    optimizer.add_param_group(
        {"params": [("2.weight", model[2].weight)], "structure": "element", "lam": 0.1}
    )
    before = model[2].weight.detach().clone()
    train(model, optimizer, 5)
    assert not torch.equal(model[2].weight, before)
    assert list(optimizer.gamma()) == ["weight", "2.weight"]


@pytest.mark.parametrize("bad", [{"nu": -1.0}, {"structure": "kernel"}, {"unit": "u"}])
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(bad):
    model = small_net()
    groups = groups_of(model[0])
    groups[0]["unit"] = "u"
    optimizer = DessiLBI(groups, lr=0.05)
    state = copy.deepcopy(optimizer.state_dict())
    group = {"params": [("2.weight", model[2].weight)], "structure": "filter", **bad}
    with pytest.raises(ValueError, match=r"nu=-1|kernel|unit 'u' joins"):
        optimizer.add_param_group(group)
    assert optimizer.state_dict() == state
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": [("2.weight", model[2].weight)], "structure": "filter"})
    assert len(optimizer.param_groups) == 3


def test_the_options_stand_in_its_repr():
    text = repr(optimizer_of(small_net()))
    assert text.startswith("DessiLBI (")
    for option in ("structure: filter", "nu: 2.0", "lam: 1.3", "kappa: 1.0"):
        assert option in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("differentiable", "differentiable=True is not supported: leave it False"),
        ("capturable", "capturable=True needs fused=True"),
    ],
)
def test_what_is_not_supported_is_refused_clearly(name, message):
    with pytest.raises(ValueError, match=message):
        DessiLBI([nn.Parameter(torch.ones(2))], **{name: True})
