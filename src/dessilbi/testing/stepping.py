# SPDX-License-Identifier: Apache-2.0
"""Checks of one step as torch.optim means it: gradients, closures, memory, dtypes, groups."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dessilbi.testing.problem import (
    SHAPES,
    Factory,
    Named,
    NotApplicable,
    assert_partial,
    assert_same_run,
    assert_same_weights,
    fill_gradients,
    has_dual,
    loss_of,
    loss_value,
    make,
    parameters,
    train,
    weights_of,
)


def refuses(action: object, *args: object) -> str:
    """Return the message of the ValueError that the call must raise."""
    assert callable(action)
    try:
        action(*args)
    except ValueError as error:
        return str(error)
    raise AssertionError("no ValueError was raised")


def check_no_parameters_are_refused(factory: Factory) -> None:
    """An empty list of parameters is a ValueError."""
    assert "empty" in refuses(factory, [])


def check_duplicate_parameters_are_refused(factory: Factory) -> None:
    """A parameter cannot join twice."""
    named, optimizer = make(factory)
    again = {"params": [("again", named[0][1])]}
    assert refuses(optimizer.add_param_group, again)


def check_repr_names_the_optimizer_and_its_options(factory: Factory) -> None:
    """``repr`` shows what one is looking at."""
    _, optimizer = make(factory)
    text = repr(optimizer)
    assert "lr: " in text
    assert "object at 0x" not in text


def check_the_loss_falls(factory: Factory) -> None:
    """Training trains."""
    named, optimizer = make(factory)
    before = loss_value(named)
    train(named, optimizer)
    assert loss_value(named) < before
    assert_partial(optimizer)


def check_a_closure_is_called_once_with_gradients_and_its_loss_returned(factory: Factory) -> None:
    """``step(closure)`` is the step that the closure's gradients give."""
    a, b = make(factory), make(factory)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        b[1].zero_grad()
        loss = loss_of(b[0])
        loss.backward()  # type: ignore[no-untyped-call]
        calls.append(loss)
        return loss

    for count in range(1, 21):
        a[1].zero_grad()
        loss_of(a[0]).backward()  # type: ignore[no-untyped-call]
        a[1].step()
        with torch.no_grad():
            returned: Any = b[1].step(closure)  # type: ignore[arg-type]
        assert returned is calls[-1]
        assert len(calls) == count
    assert_same_run(a, b)


def check_a_step_without_closure_returns_none(factory: Factory) -> None:
    """Nothing is returned where there is no loss."""
    named, optimizer = make(factory)
    fill_gradients(named, 0)
    assert optimizer.step() is None


def check_parameters_without_gradient_stay_and_get_no_state(factory: Factory) -> None:
    """A frozen or unused parameter is left alone."""
    named, optimizer = make(factory)
    (_, used), (_, unused) = named
    before = weights_of(named)
    for step in range(5):
        fill_gradients(named, step)
        unused.grad = None
        optimizer.step()
    assert not torch.equal(used, before[0])
    assert torch.equal(unused, before[1])
    assert not optimizer.state.get(unused)


def check_gradients_are_not_written_to(factory: Factory) -> None:
    """``p.grad`` is the same tensor with the same values after a step."""
    named, optimizer = make(factory)
    for step in range(5):
        fill_gradients(named, step)
        grads = [p.grad for _, p in named if p.grad is not None]
        before = [g.clone() for g in grads]
        optimizer.step()
        for (_, p), grad, old in zip(named, grads, before, strict=True):
            assert p.grad is grad
            assert torch.equal(old, grad)


def check_weights_stay_in_their_memory(factory: Factory) -> None:
    """A step works in place: storage, type and graph position of the parameters are kept."""
    named, optimizer = make(factory)
    places = [p.data_ptr() for _, p in named]
    before = weights_of(named)
    train(named, optimizer, 3)
    for (_, p), place, old in zip(named, places, before, strict=True):
        assert p.data_ptr() == place
        assert isinstance(p, nn.Parameter)
        assert p.is_leaf
        assert p.requires_grad
        assert not torch.equal(p, old)


def _train_beside_contiguous(factory: Factory, a: Named) -> None:
    """Train parameters and contiguous copies of them; they must agree."""
    b = [(name, nn.Parameter(p.detach().clone().contiguous())) for name, p in a]
    optimizers = factory(list(a)), factory(list(b))
    strides = [p.stride() for _, p in a]
    places = [p.data_ptr() for _, p in a]
    for named, optimizer in zip((a, b), optimizers, strict=True):
        if has_dual(optimizer):
            for group in optimizer.param_groups:
                group["lam"] = make(factory)[1].param_groups[0]["lam"]
        train(named, optimizer)
    for (_, p), (_, q), stride, place in zip(a, b, strides, places, strict=True):
        assert p.stride() == stride
        assert p.data_ptr() == place
        assert_close(p, q)
    assert_partial(optimizers[0])


def check_non_contiguous_parameters_train_as_contiguous_ones(factory: Factory) -> None:
    """A transposed parameter keeps its strides and gives the same numbers."""
    named = [(name, nn.Parameter(p.detach().t().contiguous().t())) for name, p in parameters()]
    assert not any(p.is_contiguous() for _, p in named)
    _train_beside_contiguous(factory, named)


def check_channels_last_parameters_train_as_contiguous_ones(factory: Factory) -> None:
    """The memory format of images' filters is kept and does not change numbers."""
    shapes = {"first.image": (4, 2, 2, 2), "second.image": (4, 2, 2, 2)}
    named = [
        (n, nn.Parameter(p.detach().to(memory_format=torch.channels_last)))
        for n, p in parameters(shapes)
    ]
    assert not any(p.is_contiguous() for _, p in named)
    _train_beside_contiguous(factory, named)
    for _, p in named:
        assert p.is_contiguous(memory_format=torch.channels_last)


def check_vectors_and_scalars_train(factory: Factory) -> None:
    """Biases and scales are parameters too."""
    named, optimizer = make(factory, {"vector": (6,), "scalar": ()})
    before = loss_value(named)
    train(named, optimizer)
    assert loss_value(named) < before


def check_parameters_of_zero_size_do_no_harm(factory: Factory) -> None:
    """An empty tensor changes nothing for the others."""
    named, optimizer = make(factory, {"empty": (0, 4), **SHAPES})
    alone, its = make(factory)
    train(named, optimizer)
    train(alone, its)
    assert_same_weights(named[1:], alone)
    assert_partial(optimizer)


def _check_dtype(factory: Factory, dtype: torch.dtype) -> None:
    named, optimizer = make(factory, dtype=dtype)
    before = loss_value(named)
    train(named, optimizer)
    assert loss_value(named) < before
    assert all(p.dtype == dtype for _, p in named)
    assert_partial(optimizer)


def check_float64_weights_train(factory: Factory) -> None:
    """Double precision weights keep their dtype."""
    _check_dtype(factory, torch.float64)


def check_bfloat16_weights_train(factory: Factory) -> None:
    """bfloat16 weights keep their dtype."""
    _check_dtype(factory, torch.bfloat16)


def check_float16_weights_train(factory: Factory) -> None:
    """float16 weights keep their dtype."""
    _check_dtype(factory, torch.float16)


def check_mixed_dtypes_train_in_one_optimizer(factory: Factory) -> None:
    """Each parameter trains as it does beside others of its own dtype."""
    mixed, optimizer = make(factory)
    mixed[0] = (mixed[0][0], nn.Parameter(mixed[0][1].detach().double()))
    optimizer = factory(list(mixed))
    train(mixed, optimizer, 5)
    assert [p.dtype for _, p in mixed] == [torch.float64, torch.float32]
    assert all(torch.isfinite(p).all() for _, p in mixed)


def check_zero_grad_clears_gradients(factory: Factory) -> None:
    """``zero_grad`` drops gradients, or fills them with zeros on request."""
    named, optimizer = make(factory)
    fill_gradients(named, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for _, p in named)
    optimizer.zero_grad()
    assert all(p.grad is None for _, p in named)


def check_lr_may_be_a_tensor(factory: Factory) -> None:
    """A tensor lr gives the run of the number, and is followed when it changes in place."""
    a, b = make(factory), make(factory)
    rates = [torch.tensor(group["lr"]) for group in b[1].param_groups]
    for group, lr in zip(b[1].param_groups, rates, strict=True):
        group["lr"] = lr
    train(*a)
    train(*b)
    for (_, p), (_, q) in zip(a[0], b[0], strict=True):
        assert_close(p, q)
    assert_partial(a[1])
    before = weights_of(b[0])
    for lr in rates:
        lr.mul_(0.0)
    train(*b, steps=1)
    for old, (_, p) in zip(before, b[0], strict=True):
        assert torch.equal(old, p)


def check_maximize_descends_the_negative(factory: Factory) -> None:
    """``maximize`` with -g is the run with g."""
    a, b = make(factory), make(factory)
    if not all("maximize" in group for group in b[1].param_groups):
        raise NotApplicable("the optimizer has no option maximize")
    for group in b[1].param_groups:
        group["maximize"] = True
    for step in range(20):
        for named, optimizer, sign in ((*a, 1), (*b, -1)):
            fill_gradients(named, step)
            for _, p in named:
                assert p.grad is not None
                p.grad.mul_(sign)
            optimizer.step()
    assert_same_run(a, b)


def check_foreach_agrees_with_the_loop(factory: Factory) -> None:
    """Multi-tensor operators are a matter of speed."""
    a, b = make(factory), make(factory)
    for group in (*a[1].param_groups, *b[1].param_groups):
        if "foreach" not in group or group.get("fused"):
            raise NotApplicable("the optimizer has no choice of foreach")
    for (named, optimizer), foreach in ((a, False), (b, True)):
        for group in optimizer.param_groups:
            group["foreach"] = foreach
        train(named, optimizer)
    for (_, p), (_, q) in zip(a[0], b[0], strict=True):
        assert_close(p, q)
    assert_partial(a[1])


STEPPING = [
    check_no_parameters_are_refused,
    check_duplicate_parameters_are_refused,
    check_repr_names_the_optimizer_and_its_options,
    check_the_loss_falls,
    check_a_closure_is_called_once_with_gradients_and_its_loss_returned,
    check_a_step_without_closure_returns_none,
    check_parameters_without_gradient_stay_and_get_no_state,
    check_gradients_are_not_written_to,
    check_weights_stay_in_their_memory,
    check_non_contiguous_parameters_train_as_contiguous_ones,
    check_channels_last_parameters_train_as_contiguous_ones,
    check_vectors_and_scalars_train,
    check_parameters_of_zero_size_do_no_harm,
    check_float64_weights_train,
    check_bfloat16_weights_train,
    check_float16_weights_train,
    check_mixed_dtypes_train_in_one_optimizer,
    check_zero_grad_clears_gradients,
    check_lr_may_be_a_tensor,
    check_maximize_descends_the_negative,
    check_foreach_agrees_with_the_loop,
]
