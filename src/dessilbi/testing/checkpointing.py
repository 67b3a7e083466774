# SPDX-License-Identifier: Apache-2.0
"""Checks of state: what it may hold, and that saving, copying and loading it change no run."""

import copy
import io
import pickle
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.optim import Optimizer

from dessilbi.testing.problem import (
    STEPS,
    Factory,
    Named,
    assert_partial,
    assert_same_run,
    assert_same_weights,
    copy_weights,
    make,
    train,
    weights_of,
)
from dessilbi.testing.surroundings import Holder, ignoring

State = dict[str, Any]
ALONE = "torch.distributed is disabled, unavailable or uninitialized"


def through_file(state: Any) -> Any:
    """Return what torch.save and torch.load with their defaults (weights only) make of it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def check_state_holds_only_tensors_shaped_as_parameters(factory: Factory) -> None:
    """Sharding and distributed checkpoints take tensors like the parameter, or scalars."""
    named, optimizer = make(factory)
    train(named, optimizer, 3)
    for param, state in optimizer.state.items():
        for key, value in state.items():
            assert isinstance(key, str)
            assert isinstance(value, Tensor), f"{key} is {type(value)}"
            assert value.dim() == 0 or value.shape == param.shape, f"{key}: {value.shape}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return type(value) in (int, float, str, bool, type(None))


def check_groups_hold_only_plain_values(factory: Factory) -> None:
    """A checkpoint's groups are numbers, words and tuples of them."""
    _, optimizer = make(factory)
    for group in optimizer.state_dict()["param_groups"]:
        for key, value in group.items():
            assert _is_plain(value), f"{key} is {value!r}"


def _reloaded(factory: Factory, a: tuple[Named, Optimizer]) -> tuple[Named, Optimizer]:
    """Return a fresh optimizer with the weights and the loaded state of ``a``."""
    named, optimizer = make(factory)
    optimizer.load_state_dict(through_file(a[1].state_dict()))
    copy_weights(a[0], named)
    return named, optimizer


def _check_resume(factory: Factory, dtype: torch.dtype) -> None:
    a = make(factory, dtype=dtype)
    train(*a, steps=STEPS // 2)
    b = make(factory, dtype=dtype)
    for group in b[1].param_groups:
        group["lr"] *= 3  # must come from the checkpoint
    b[1].load_state_dict(through_file(a[1].state_dict()))
    copy_weights(a[0], b[0])
    assert_same_run(a, b)
    train(*a, steps=STEPS // 2, first=STEPS // 2)
    train(*b, steps=STEPS // 2, first=STEPS // 2)
    assert_same_run(a, b)


def check_a_resumed_run_is_the_uninterrupted_one(factory: Factory) -> None:
    """Saved with torch.save, loaded with torch.load's defaults, continued: equal to the bit."""
    _check_resume(factory, torch.float32)


def check_a_resumed_bfloat16_run_is_the_uninterrupted_one(factory: Factory) -> None:
    """State that is finer than the weights survives loading."""
    _check_resume(factory, torch.bfloat16)


def check_a_checkpoint_from_before_the_first_step_loads(factory: Factory) -> None:
    """Also over a run that has begun, which it sets back."""
    a, b = make(factory), make(factory)
    fresh = through_file(a[1].state_dict())
    weights = [(n, p.detach().clone()) for n, p in b[0]]
    train(*b, steps=5)
    b[1].load_state_dict(fresh)
    with torch.no_grad():
        for (_, p), (_, old) in zip(b[0], weights, strict=True):
            p.copy_(old)
    train(*a)
    train(*b)
    assert_same_run(a, b)


def check_loading_the_own_state_at_construction_changes_nothing(factory: Factory) -> None:
    """As accelerate does, and by the keyword ``state_dict``."""
    a, b = make(factory), make(factory)
    b[1].load_state_dict(state_dict=b[1].state_dict())
    train(*a)
    train(*b, steps=STEPS // 2)
    b[1].load_state_dict(state_dict=b[1].state_dict())
    train(*b, steps=STEPS // 2, first=STEPS // 2)
    assert_same_run(a, b)


def check_loading_leaves_the_given_state_dict_alone(factory: Factory) -> None:
    """Loaded tensors are copies: training on does not write into the caller's."""
    a = make(factory)
    train(*a, steps=5)
    given = a[1].state_dict()
    before = copy.deepcopy(given)
    named, optimizer = make(factory)
    optimizer.load_state_dict(given)
    train(named, optimizer, 3)
    assert any(state for state in before["state"].values())
    for i, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(given["state"][i][key], value), f"{key} was written to"


def check_foreign_keys_in_the_state_do_no_harm(factory: Factory) -> None:
    """Other tools may keep tensors of their own beside the optimizer's."""
    a, b = make(factory), make(factory)
    train(*a, steps=5)
    train(*b, steps=5)
    theirs = torch.arange(3.0)
    b[1].state[b[0][0][1]]["theirs"] = theirs
    c = _reloaded(factory, b)
    assert torch.equal(c[1].state[c[0][0][1]]["theirs"], theirs)
    for named, optimizer in (a, b, c):
        train(named, optimizer, STEPS - 5, first=5)
    assert_same_weights(a[0], b[0])
    assert_same_weights(a[0], c[0])
    assert_partial(a[1])


def check_a_deepcopy_continues_as_the_original(factory: Factory) -> None:
    """A copy shares nothing and forgets nothing."""
    a = make(factory)
    train(*a, steps=5)
    b = copy.deepcopy(a)
    train(*a, steps=STEPS - 5, first=5)
    train(*b, steps=STEPS - 5, first=5)
    assert_same_run(a, b)


def check_a_deepcopy_has_the_options_of_the_original(factory: Factory) -> None:
    """Groups of a copy hold the same options, no more and no fewer."""
    _, a = make(factory)
    b = copy.deepcopy(a)
    for mine, theirs in zip(a.param_groups, b.param_groups, strict=True):
        assert set(mine) == set(theirs), f"differing options: {set(mine) ^ set(theirs)}"
        assert all(mine[key] == theirs[key] for key in mine if key != "params")


def check_a_pickled_optimizer_continues_as_the_original(factory: Factory) -> None:
    """As deepcopy, through bytes."""
    a = make(factory)
    train(*a, steps=5)
    b: tuple[Named, Optimizer] = pickle.loads(pickle.dumps(a))  # noqa: S301  # our own bytes
    train(*a, steps=STEPS - 5, first=5)
    train(*b, steps=STEPS - 5, first=5)
    assert_same_run(a, b)


def check_a_fresh_copy_trains_as_the_original(factory: Factory) -> None:
    """Copies made before the first step work too."""
    a = make(factory)
    b = copy.deepcopy(a)
    train(*a)
    train(*b)
    assert_same_run(a, b)


def check_the_phantom_step_leaves_weights_and_state_as_they_start(factory: Factory) -> None:
    """Distributed checkpoints ask for state by a step with lr 0 and zero gradients."""
    named, optimizer = make(factory)
    before = weights_of(named)
    rates = [group["lr"] for group in optimizer.param_groups]
    get_optimizer_state_dict(Holder(named), optimizer)
    for (_, p), old in zip(named, before, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None
        for key, value in optimizer.state.get(p, {}).items():
            assert key == "step" or not value.any(), f"{key} is not zero"
    assert [group["lr"] for group in optimizer.param_groups] == rates


def check_a_distributed_checkpoint_resumes_the_run(factory: Factory) -> None:
    """torch.distributed.checkpoint, in one process: saved, loaded, continued as if nothing."""
    a = make(factory)
    train(*a, steps=STEPS // 2)
    b = make(factory)
    models = Holder(a[0]), Holder(b[0])
    for _, p in a[0]:
        p.grad = None
    with tempfile.TemporaryDirectory() as folder, ignoring(ALONE):
        saved: State = {
            "model": get_model_state_dict(models[0]),
            "optimizer": get_optimizer_state_dict(models[0], a[1]),
        }
        save_distributed(saved, checkpoint_id=folder)
        loaded: State = {
            "model": get_model_state_dict(models[1]),
            "optimizer": get_optimizer_state_dict(models[1], b[1]),
        }
        load_distributed(loaded, checkpoint_id=folder)
        set_model_state_dict(models[1], loaded["model"])
        set_optimizer_state_dict(models[1], b[1], loaded["optimizer"])
    train(*a, steps=STEPS // 2, first=STEPS // 2)
    train(*b, steps=STEPS // 2, first=STEPS // 2)
    assert_same_run(a, b)


CHECKPOINTING = [
    check_state_holds_only_tensors_shaped_as_parameters,
    check_groups_hold_only_plain_values,
    check_a_resumed_run_is_the_uninterrupted_one,
    check_a_resumed_bfloat16_run_is_the_uninterrupted_one,
    check_a_checkpoint_from_before_the_first_step_loads,
    check_loading_the_own_state_at_construction_changes_nothing,
    check_loading_leaves_the_given_state_dict_alone,
    check_foreign_keys_in_the_state_do_no_harm,
    check_a_deepcopy_continues_as_the_original,
    check_a_deepcopy_has_the_options_of_the_original,
    check_a_pickled_optimizer_continues_as_the_original,
    check_a_fresh_copy_trains_as_the_original,
    check_the_phantom_step_leaves_weights_and_state_as_they_start,
    check_a_distributed_checkpoint_resumes_the_run,
]
