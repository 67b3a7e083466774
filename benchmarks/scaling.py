# SPDX-License-Identifier: Apache-2.0
"""Count bytes on two gloo ranks, and write docs/results/measured/scaling.json.

python benchmarks/scaling.py

For DDP and FSDP2 and for SGD, AdamW, DessiLBI and wrap(AdamW): what a rank holds after a step, and
what one step hands to collectives (the payload: the size of the whole tensor that is reduced or
gathered). Beside each stands what docs/scaling.md predicts. And the size of a recorded point.
"""

import itertools
import json
import os
import socket
import tempfile
from collections import Counter
from pathlib import Path as FilePath
from typing import Self

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from dessilbi import DessiLBI, Path, param_groups, wrap
from dessilbi.blocks.sharding import local
from dessilbi.files.storage import read_json, write_json
from dessilbi.training.engine import engine_for
from dessilbi.training.environment import environment

FILE = FilePath(__file__).parents[1] / "docs" / "results" / "measured" / "scaling.json"
RANKS, WIDTH = 2, 1024
OPTIMIZERS = ("sgd", "adamw", "dessilbi filter", "dessilbi element", "wrap(adamw) filter")
# Bytes per parameter beside its weight and gradient, 4 each: momentum, moments, V.
STATE = {
    "sgd": 4,
    "adamw": 8,
    "dessilbi filter": 8,
    "dessilbi element": 8,
    "wrap(adamw) filter": 12,
}


def net() -> nn.Module:
    torch.manual_seed(0)
    widths = (WIDTH, 2 * WIDTH, WIDTH)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def optimizer_for(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    groups = param_groups(model, {"*weight": kind.split()[-1]})
    if kind.startswith("wrap"):
        return wrap(torch.optim.AdamW(groups, lr=1e-3), nu=1.0, lam=0.1)
    return DessiLBI(groups, lr=0.1, nu=1.0, lam=0.1, momentum=0.9)


COLLECTIVES = {
    "all_reduce": ("all_reduce",),
    "all_gather": ("all_gather_into_tensor", "all_gather_single"),
    "reduce_scatter": ("reduce_scatter_tensor", "reduce_scatter_single"),
}


class Counted:
    """Counts the payload of every collective while it is active."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._kept: dict[str, object] = {}

    def __enter__(self) -> Self:
        for kind, names in COLLECTIVES.items():
            for name in names:
                if hasattr(dist, name):  # torch has renamed some of them
                    self._kept[name] = getattr(dist, name)
                    setattr(dist, name, self._counting(kind, getattr(dist, name)))
        return self

    def _counting(self, kind, original):
        def call(*args, **kwargs):
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            self.bytes[kind] += max(tensor.nbytes for tensor in given)
            return original(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, original in self._kept.items():
            setattr(dist, name, original)


def count(strategy: str, kind: str) -> dict:
    """Bytes per parameter that this rank holds, and that a step communicates."""
    with engine_for(device="cpu", strategy=strategy) as engine:
        model = net()
        module = engine.place(model)
        optimizer = engine.adopt(optimizer_for(kind, model))
        size = sum(p.numel() for p in model.parameters())
        counted = Counted()
        if strategy == "ddp":
            # Its own reducer is C++ and calls nothing of Python; this one does the same.
            module._forward_module.register_comm_hook(None, allreduce_hook)
        inputs = torch.randn(8, WIDTH)
        for number in range(2):
            with counted:
                optimizer.zero_grad()
                engine.backward(module(inputs).square().mean())
                optimizer.step()
            if number == 0:
                counted.bytes.clear()  # the first step also makes the state
        point = Counted()
        if hasattr(optimizer, "support"):
            with point:
                optimizer.support()
        held = [local(p) for p in model.parameters()]
        held += [local(p.grad) for p in model.parameters()]
        states = (value for state in optimizer.state.values() for value in state.values())
        held += [local(value) for value in states if value.dim() > 0]
    return {
        "held": sum(t.nbytes for t in held) / size,
        "a_step_communicates": shared(counted.bytes, size),
        "a_point_communicates": shared(point.bytes, size),
    }


def shared(counts: Counter[str], size: int) -> dict[str, float]:
    return {name: told / size for name, told in sorted(counts.items())}


def predicted(strategy: str, kind: str) -> dict:
    weights = list(net().parameters())
    size = sum(p.numel() for p in weights)
    if strategy == "ddp":
        step, point, held = {"all_reduce": 4.0}, {}, 8.0 + STATE[kind]
    else:
        step, point = {"all_gather": 8.0, "reduce_scatter": 4.0}, {}
        held = (8.0 + STATE[kind]) / RANKS
        if "filter" in kind:  # a norm per block
            point = {"all_reduce": 4 * sum(p.shape[0] for p in weights) / size}
            step = point | step
        elif "element" in kind:  # its threshold needs no norm, but its support is recorded
            point = {"all_reduce": 4.0}
    return {"held": held, "a_step_communicates": step, "a_point_communicates": point}


def on_rank(rank: int, port: int, strategy: str, kind: str, file: str) -> None:
    os.environ.update(
        {name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(RANKS)),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GROUP_RANK="0",
    )
    torch.set_num_threads(1)
    told = count(strategy, kind)
    if rank == 0:
        write_json(file, told)


def measured(strategy: str, kind: str) -> dict:
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        file = str(FilePath(folder) / "told.json")
        mp.start_processes(on_rank, (port, strategy, kind, file), nprocs=RANKS, start_method="fork")
        return read_json(file)


def points() -> list[dict]:
    """Bytes of the path's file per recorded point, over 50 points in which blocks enter."""
    found = []
    for structure in ("filter", "element"):
        model = net()
        optimizer = DessiLBI(param_groups(model, {"*weight": structure}), lr=0.1, nu=1.0, lam=1.0)
        generator = torch.Generator().manual_seed(0)
        spread = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        if structure == "filter":
            spread = [s.norm(dim=1, keepdim=True) * s[:, :1] for s in spread]
            spread = [
                (s / s.std()).expand_as(p) for s, p in zip(spread, model.parameters(), strict=True)
            ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(optimizer, every=1, file=FilePath(folder) / "path.jsonl")
            scale = 1.0 if structure == "element" else WIDTH**-0.5
            for _ in range(50):
                for weight, goal in zip(model.parameters(), spread, strict=True):
                    weight.grad = weight.detach() - 0.25 * scale * goal
                optimizer.step()
            size = (FilePath(folder) / "path.jsonl").stat().st_size
            blocks = sum(mask.numel() for mask in path.support(step=50).values())
            found.append(
                {
                    "structure": structure,
                    "blocks": blocks,
                    "points": len(path.points),
                    "density_at_the_end": path.points[-1].density,
                    "bytes_per_point": size / len(path.points),
                    "bytes_per_point_and_block": size / len(path.points) / blocks,
                }
            )
    return found


def main() -> None:
    rows = [
        {
            "strategy": strategy,
            "optimizer": kind,
            "measured": measured(strategy, kind),
            "predicted": predicted(strategy, kind),
        }
        for strategy in ("ddp", "fsdp2")
        for kind in OPTIMIZERS
    ]
    told = environment()
    machine = {key: told[key] for key in ("python", "machine", "cpus", "threads", "packages")}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    parts = {"ranks": RANKS, "bytes_per_parameter": rows, "path": points()}
    write_json(
        FILE, {"command": "python benchmarks/scaling.py", "environment": machine, "measured": parts}
    )
    print(json.dumps(parts, indent=2))


if __name__ == "__main__":
    main()
