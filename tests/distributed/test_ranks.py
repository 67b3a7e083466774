# SPDX-License-Identifier: Apache-2.0
"""DDP and FSDP2 over several gloo ranks equal one process on the same global batch."""

import math
import os
import socket
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

from dessilbi import DensityControl, DessiLBI, wrap
from dessilbi.optimizers import dual

STEPS = 12
# Blocks that straddle the shards, odd sizes that leave shards uneven or empty, and a unit.
STRUCTURES = ["element", "filter", "channel", "layer", (2, None), (4, 2), ((1, 1), None), "unit"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()


@cache
def lam_of(structure, kind):
    """A threshold that some blocks pass and others do not, from a run without selection."""
    model = net()
    optimizer = build(model, structure, kind, lam=float("inf"))
    train(model, optimizer)
    units = dual.units_of(dual.members(optimizer))
    norms = torch.cat([n.reshape(-1) for n in dual.norms_of(optimizer, units)]).sort().values
    middle = len(norms) // 2
    return float(norms[middle - 1] + norms[middle]) / 2


def build(model, structure, kind="dessilbi", lam=None):
    lam = lam_of(structure, kind) if lam is None else lam
    named = dict(model.named_parameters())
    weights = [(n, p) for n, p in named.items() if n.endswith(("0.weight", "2.weight"))]
    others = [(n, p) for n, p in named.items() if not n.endswith(("0.weight", "2.weight"))]
    options = {"structure": structure}
    if structure == "unit":
        options = {"structure": "filter", "unit": "u"}
    groups = [{"params": weights, **options}, {"params": others}]
    if kind == "wrap":
        base = torch.optim.AdamW(groups, lr=0.02, foreach=False)
        return wrap(base, nu=0.5, lam=lam)
    return DessiLBI(
        groups, lr=0.1, kappa=1.5, nu=2.0, lam=lam, momentum=0.9, foreach=kind == "foreach"
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 6, generator=generator, dtype=torch.float64)


def train(model, optimizer, *, rank=0, size=1, start=0, steps=STEPS):
    for step in range(start, start + steps):
        inputs = batch(step).chunk(size)[rank]
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :2].sin()).square().mean().backward()
        optimizer.step()


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def outcome(model, optimizer):
    weights = {
        n.removeprefix("module."): whole(p).detach().clone() for n, p in model.named_parameters()
    }
    return weights, {n: whole(g) for n, g in optimizer.gamma().items()}, optimizer.support()


def assert_same(left, right):
    for a, b in zip(left[:2], right[:2], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-9)
    assert left[2] == right[2]


def distributed(model, engine):
    if engine == "ddp":
        return DistributedDataParallel(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def on_rank(rank, size, port, job, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        job(rank, size, folder)
    finally:
        dist.destroy_process_group()


def spawn(job, size, folder=""):
    mp.start_processes(
        on_rank, (size, free_port(), job, str(folder)), nprocs=size, start_method="fork"
    )


def compare_all(rank, size, folder):
    densities = []
    for engine in ("ddp", "fsdp2"):
        for structure in STRUCTURES:
            for kind in ("dessilbi", "foreach", "wrap"):
                alone, together = net(), distributed(net(), engine)
                one, many = build(alone, structure, kind), build(together, structure, kind)
                train(alone, one)
                train(together, many, rank=rank, size=size)
                result = outcome(together, many)
                assert_same(outcome(alone, one), result)
                supports = [None] * size
                dist.all_gather_object(supports, result[2].digest())
                assert len(set(supports)) == 1
                densities.append(result[2].density)
    assert sum(0 < d < 1 for d in densities) > 0.7 * len(densities)  # not vacuous


def control_density(rank, size, folder):
    densities = []
    for engine in ("ddp", "fsdp2"):
        for mode in ("track", "late"):
            alone, together = net(), distributed(net(), engine)
            one = build(alone, (2, None), lam=1.0)
            many = build(together, (2, None), lam=1.0)
            controls = [
                DensityControl(o, density=0.5, total_steps=40, mode=mode, floor=0.5)
                for o in (one, many)
            ]
            train(alone, one, steps=40)
            train(together, many, rank=rank, size=size, steps=40)
            assert_same(outcome(alone, one), outcome(together, many))
            assert math.isclose(controls[0].lam, controls[1].lam, rel_tol=1e-9)
            densities.append(many.support().density)
    assert sum(0 < d < 1 for d in densities) >= 2, densities  # not vacuous


def save_there(rank, size, folder):
    model = distributed(net(), "fsdp2")
    optimizer = build(model, "filter")
    train(model, optimizer, rank=rank, size=size)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load_here(rank, size, folder):
    alone = net()
    one = build(alone, "filter")
    train(alone, one, steps=2 * STEPS)
    torch.manual_seed(1)
    model = distributed(net(), "fsdp2")
    optimizer = build(model, "filter")
    weights, state = get_state_dict(model, optimizer)
    told = {"model": weights, "optimizer": state}
    dcp.load(told, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=told["model"], optim_state_dict=told["optimizer"]
    )
    train(model, optimizer, rank=rank, size=size, start=STEPS)
    assert_same(outcome(alone, one), outcome(model, optimizer))


def refuse_partial(rank, size, folder):
    mesh = init_device_mesh("cpu", (size,))
    weight = nn.Parameter(DTensor.from_local(torch.ones(4, 2), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"w is placed as .*replicated or sharded"):
        DessiLBI([("w", weight)], structure="filter")
    DessiLBI([("w", weight)])  # without a structure it is plain SGD


def test_a_placement_that_is_neither_replicated_nor_sharded_is_refused():
    spawn(refuse_partial, 2)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_equal_one_process(size):
    spawn(compare_all, size)


def test_density_control_on_ranks_equals_one_process():
    spawn(control_density, 2)


def test_a_checkpoint_of_two_ranks_continues_on_one_and_on_three():
    with tempfile.TemporaryDirectory() as folder:
        spawn(save_there, 2, folder)
        assert any(Path(folder).iterdir())
        for size in (1, 3):
            spawn(load_here, size, folder)
