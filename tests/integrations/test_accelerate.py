# SPDX-License-Identifier: Apache-2.0
"""accelerate: nothing of ours is needed; a run that was saved and resumed is the whole one."""

import warnings

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI, Path, param_groups

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say of each other at import
    accelerate = pytest.importorskip("accelerate")

BATCHES, ACCUMULATED, CLIP = 24, 2, 0.5
OPTIONS = {"lr": 0.1, "nu": 1.0, "lam": 0.3, "momentum": 0.9}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(number):
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
    return inputs, inputs.argmax(1) % 3


def made(model):
    optimizer = DessiLBI(param_groups(model, {"0.weight": "neuron", "*": None}), **OPTIONS)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)


def run(folder, batches, *, resume=None, mixed_precision="no"):
    """Train under accelerate through some batches, from the start or from the state of a folder."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=ACCUMULATED, mixed_precision=mixed_precision
    )
    model = network()
    optimizer, scheduler = made(model)
    file = folder / "path.jsonl"
    path = None if resume else Path(optimizer, every=1, file=file)
    model, wrapped, schedule = accelerator.prepare(model, optimizer, scheduler)
    if resume:
        accelerator.load_state(folder / "state")
        path = Path(optimizer, file=file, resume=resume)
    norms = []
    for number in batches:
        inputs, targets = batch(number)
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), CLIP)))
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
    accelerator.save_state(folder / "state")
    assert max(norms) > CLIP  # some were clipped
    return accelerator.unwrap_model(model), optimizer, path


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(precision, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model, optimizer, path = run(whole, range(BATCHES), mixed_precision=precision)
    _, _, half = run(parts, range(10), mixed_precision=precision)
    other, resumed, again = run(
        parts, range(10, BATCHES), resume=half.state_dict(), mixed_precision=precision
    )
    assert same(model.state_dict(), other.state_dict())
    for state, theirs in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert same(state, theirs)
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert (parts / "path.jsonl").read_bytes() == (whole / "path.jsonl").read_bytes()
    assert again.points == path.points
    assert (path.step, resumed.param_groups[0]["lr"]) == (12, optimizer.param_groups[0]["lr"])
    assert 0 < path.points[-1].density < 1


def test_a_step_is_one_of_the_optimizer_and_not_one_of_a_batch(tmp_path):
    model, _, path = run(tmp_path, range(BATCHES))
    own = network()
    optimizer, scheduler = made(own)
    mine = Path(optimizer, every=1)
    for number in range(BATCHES):
        inputs, targets = batch(number)
        (nn.functional.cross_entropy(own(inputs), targets) / ACCUMULATED).backward()
        if (number + 1) % ACCUMULATED == 0:
            nn.utils.clip_grad_norm_(own.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert mine.points == path.points
    assert same(own.state_dict(), model.state_dict())


def test_in_bf16_the_numbers_are_others(tmp_path):
    weights = [
        run(tmp_path / precision, range(4), mixed_precision=precision)[0].state_dict()
        for precision in ("no", "bf16")
    ]
    assert not same(*weights)
