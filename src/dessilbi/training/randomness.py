# SPDX-License-Identifier: Apache-2.0
"""Randomness: the random states of a process, set for a run, saved with it and given back after.

Batches need none of them (see feeding); dropout and users' own code may.
"""

import base64
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of torch, NumPy and Python as plain JSON values."""
    states: dict[str, Any] = {"cpu": _text(torch.get_rng_state())}
    if device.type != "cpu":
        states[device.type] = _text(torch.get_device_module(device).get_rng_state())
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - what users' code draws from
    states["numpy"] = [kind, keys.tolist(), *rest]  # type: ignore[union-attr]
    states["python"] = random.getstate()
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Set what :func:`random_states` returned; a device that has no state there keeps its own."""
    torch.set_rng_state(_tensor(states["cpu"]))
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(_tensor(states[device.type]))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))


@contextmanager
def seeded(seed: tuple[int, ...], device: torch.device) -> Iterator[None]:
    """Seed everything for the length of a block, and leave the states as they were."""
    kept = random_states(device)
    bits = np.random.SeedSequence(seed).generate_state(3)
    torch.manual_seed(int(bits[0]))
    np.random.seed(int(bits[1]))  # noqa: NPY002
    random.seed(int(bits[2]))
    try:
        yield
    finally:
        set_random_states(kept, device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
