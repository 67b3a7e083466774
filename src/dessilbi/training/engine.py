# SPDX-License-Identifier: Apache-2.0
"""Engine: where a run computes. Device, precision, processes: a thin layer over Lightning Fabric.

One process works alone; several, started by torchrun, each hold a copy of the model ("ddp") or a
part of it ("fsdp2"). docs/adr/0004-the-engine.md says why Fabric.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dessilbi.blocks.sharding import local

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
Strategy = Literal["ddp", "fsdp2"]
STRATEGIES = ("ddp", "fsdp2")
DEVICES = ("auto", "cpu", "cuda", "mps")
PIECE = 100_000  # parameters from which on FSDP2 gathers a layer by itself


class Engine:
    """What a run computes with; made by :func:`engine_for`.

    Args:
        fabric: Set up and launched.
        strategy: How several processes share the work; None: there is only one.
        precision: As recipes name it.
    """

    def __init__(self, fabric: "Fabric", strategy: Strategy | None, precision: str):
        self.fabric, self.strategy, self.precision = fabric, strategy, precision
        self.rank: int = fabric.global_rank
        self.world_size: int = fabric.world_size
        self.device: torch.device = fabric.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the model."""
        return self.strategy == "fsdp2"

    def place(self, model: nn.Module, *, compiled: bool = False) -> nn.Module:
        """Bring a model to the device, share it among the processes, and return what to call.

        Parameters may be replaced: make the optimizer afterwards.
        """
        module: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
        if self._plain:  # Fabric's wrapper would do nothing, and take 2 % of a small net's step
            return module.to(self.device)
        return self.fabric.setup_module(module)

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer to step: it steps where the scaler of fp16 allows."""
        adopted: Optimizer = self.fabric.setup_optimizers(optimizer)  # type: ignore[assignment]
        return adopted

    @property
    def _plain(self) -> bool:
        """Whether neither processes nor precision ask anything of forward and backward."""
        return self.strategy is None and self.precision == "float32"

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss (scaled under fp16)."""
        if self._plain:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.fabric.backward(loss)

    def unsynchronised(self, module: nn.Module, *, when: bool) -> AbstractContextManager[None]:
        """Leave the gradients of a piece on their process until the last piece of a step."""
        if self.strategy is None:
            return nullcontext()
        return self.fabric.no_backward_sync(module, enabled=when)  # type: ignore[arg-type]

    def clip(self, module: nn.Module, optimizer: Optimizer, max_norm: float) -> None:
        """Scale the gradients down to a norm of at most ``max_norm``, over all processes."""
        self.fabric.clip_gradients(module, optimizer, max_norm=max_norm, error_if_nonfinite=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass, for a model that is called directly."""
        return self.fabric.autocast()

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16, or None."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all processes."""
        if self.world_size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def totals(self, values: list[float]) -> list[float]:
        """Return the sums of plain numbers over all processes."""
        return [sum(parts) for parts in zip(*self.gather(values), strict=True)]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether it is set in any process."""
        if self.world_size == 1:
            return flags
        told = torch.tensor(flags, dtype=torch.int32, device=self.device)
        return tuple(bool(count) for count in self.total(told).tolist())

    def gather(self, value: T) -> list[T]:
        """Return the plain value of every process, in order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Let the first process work, and return its result in all; it is sent as a plain value.

        Where it fails, its error is raised there, and the others end without a word.
        """
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, True]
        try:
            if self.first:
                outcome = [work(), False]
        finally:
            torch.distributed.broadcast_object_list(outcome)
        if outcome[1]:
            raise SystemExit(1)
        result: T = outcome[0]
        return result

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's buffers, as its weights already are."""
        if self.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(local(buffer), 0)

    def facts(self) -> dict[str, Any]:
        """Return what decides the last digits of a run, as plain values."""
        return {
            "device": self.device.type,
            "strategy": self.strategy,
            "world_size": self.world_size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


@contextmanager
def engine_for(
    precision: str = "float32", *, device: str = "auto", strategy: Strategy | None = None
) -> Iterator[Engine]:
    """Set up the engine of this process, and take it down again.

    Args:
        precision: "float32", "bf16" or "fp16"; weights are float32 in each.
        device: One of ``DEVICES``; "auto" takes an accelerator where there is one.
        strategy: How the processes that torchrun started share the work, "ddp" by default.

    Raises:
        ValueError: The device is not there, or the parts do not go together.
    """
    world = num_processes()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1
    device = _device(device, here)
    chosen = _strategy(strategy, world)
    if precision == "fp16" and chosen == "fsdp2":
        raise ValueError("precision=fp16 does not go with --strategy fsdp2: use bf16 or ddp")
    from lightning_fabric import Fabric  # here, because it takes its time

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    plugins = [_precision(precision, device), _environment(world)]
    fabric = Fabric(
        accelerator=device,
        devices=here if chosen else 1,
        num_nodes=world // here if chosen else 1,
        strategy=_fabric_strategy(chosen, world),
        plugins=plugins,
    )
    if chosen and num_restarts():
        _meet_again("nccl" if device == "cuda" else "gloo")
    fabric.launch()
    try:
        yield Engine(fabric, chosen, precision)
    finally:
        if chosen and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def num_processes() -> int:
    """Return how many processes torchrun started in all; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def num_restarts() -> int:
    """Return how often torchrun has started this group of processes again; 0 without it."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if "RANK" in os.environ else 0


def _meet_again(backend: str) -> None:
    """Connect the processes of a later attempt; Fabric then finds them connected.

    torchrun's store still holds the addresses of the attempt before, so they meet under a prefix.
    """
    from torch.distributed import distributed_c10d
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    own = distributed_c10d.PrefixStore(f"attempt-{num_restarts()}", store)
    torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=world)


def _device(asked: str, here: int) -> str:
    if asked not in DEVICES:
        raise ValueError(f"device={asked!r} is not known: use one of {', '.join(DEVICES)}")
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if asked == "auto":
        asked = next(device for device, found in there.items() if found)
    if not there[asked]:
        raise ValueError(f"device={asked!r} is not there: use cpu, or auto for what there is")
    if asked != "cpu" and here > (count := torch.accelerator.device_count()):
        raise ValueError(
            f"torchrun started {here} processes for {count} {asked} devices: "
            f"start one for each with --nproc-per-node {count}"
        )
    return asked


def _strategy(asked: Strategy | None, world: int) -> Strategy | None:
    if asked is not None and asked not in STRATEGIES:
        raise ValueError(f"strategy={asked!r} is not known: use one of {', '.join(STRATEGIES)}")
    if world > 1:
        return asked or "ddp"
    if asked is not None:
        raise ValueError(
            f"--strategy {asked} shares the work among processes, and this is the only one: start "
            f"several with torchrun --nproc-per-node N -m dessilbi train ..."
        )
    return None


def _precision(name: str, device: str) -> Any:
    from lightning_fabric.plugins import MixedPrecision, Precision

    if name == "float32":
        return Precision()
    return MixedPrecision("bf16-mixed" if name == "bf16" else "16-mixed", device=device)


def _environment(world: int) -> Any:
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    # Named, because Fabric would otherwise look for SLURM and others and follow them.
    return TorchElasticEnvironment() if world > 1 else LightningEnvironment()


def _fabric_strategy(chosen: Strategy | None, world: int) -> Any:
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    if chosen is None:
        return "auto"
    if chosen == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1)


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Cut a model over the processes: large layers of a stack one by one, all else together."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"]
    stacks = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    for stack in reversed(stacks):  # inner ones first
        for layer in stack:
            if sum(p.numel() for p in layer.parameters()) >= PIECE:
                fully_shard(layer, mesh=mesh)
    # The rest as well is freed after each forward pass: judging changes weights between them.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model
