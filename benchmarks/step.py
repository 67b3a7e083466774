# SPDX-License-Identifier: Apache-2.0
"""Time one optimizer step: DessiLBI's kernels beside torch's SGD and AdamW, in one interleaved run.

python benchmarks/step.py                              # all models, 1 and 2 threads
python benchmarks/step.py resnet50 lenet --rounds 200  # some
python benchmarks/speed_page.py                        # then writes docs/speed.md

Every contender steps once per round, in turn, on weights shaped like the model's; contenders
share weights and gradients and have a state each. On a machine that others use, the fastest of many
rounds says most about a contender, and quartiles of the ratio within a round say how sure it is.
"""

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from dessilbi import DessiLBI
from dessilbi.kernels import building
from dessilbi.storage import write_json

RESULTS = Path(__file__).parent / "results"
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
Shapes = list[tuple[int, ...]]


def lenet() -> Shapes:
    """LeNet-5 with 120 filters in its third layer."""
    weights = [(6, 1, 5, 5), (16, 6, 5, 5), (120, 16, 5, 5), (84, 120), (10, 84)]
    return [shape for w in weights for shape in (w, w[:1])]


def resnet20() -> Shapes:
    """The CIFAR net of 3 stages of 3 blocks."""
    weights: Shapes = [(16, 3, 3, 3)]
    for before, width in ((16, 16), (16, 32), (32, 64)):
        weights += [(width, before, 3, 3)] + [(width, width, 3, 3)] * 5
    return [shape for w in weights for shape in (w, w[:1], w[:1])] + [(10, 64), (10,)]


def resnet50() -> Shapes:
    """The ImageNet net of bottlenecks."""
    weights: Shapes = [(64, 3, 7, 7)]
    before = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(depth):
            weights += [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if i == 0:
                weights.append((4 * width, before, 1, 1))
            before = 4 * width
    return [shape for w in weights for shape in (w, w[:1], w[:1])] + [(1000, 2048), (1000,)]


def transformer(width: int, depth: int, *others: tuple[int, ...]) -> Shapes:
    """Blocks of attention and an MLP of four times the width, with biases and norms."""
    block: Shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes = [shape for w in block * depth for shape in (w, w[:1], w[-1:])]
    return [*others, *shapes]


MODELS: dict[str, Callable[[], Shapes]] = {
    "lenet": lenet,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "vit-b": lambda: transformer(768, 12, (768, 3, 16, 16), (197, 768), (1000, 768)),
    "gpt-350m": lambda: transformer(1024, 24, (50304, 1024), (1024, 1024)),
}
LARGE = 200_000_000  # elements; above it only fused contenders fit into memory side by side


def dessilbi(params: list[nn.Parameter], structure: str, **options: object) -> DessiLBI:
    """Structured weights; vectors without a structure."""
    groups = [
        {"params": [p for p in params if p.dim() > 1], "structure": structure},
        {"params": [p for p in params if p.dim() <= 1]},
    ]
    return DessiLBI(groups, nu=1000.0, lam=0.1, **SGD, **options)


def contenders(params: list[nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """All optimizers on the same parameters."""
    small = sum(p.numel() for p in params) < LARGE
    found: dict[str, torch.optim.Optimizer] = {
        "AdamW fused": torch.optim.AdamW(params, lr=1e-5, fused=True),
        "DessiLBI filter fused": dessilbi(params, "filter", fused=True),
        "SGD fused": torch.optim.SGD(params, **SGD, fused=True),
    }
    if small:
        found |= {
            "DessiLBI element fused": dessilbi(params, "element", fused=True),
            "DessiLBI filter reference": dessilbi(params, "filter", foreach=False),
            "AdamW foreach": torch.optim.AdamW(params, lr=1e-5, foreach=True),
            "SGD foreach": torch.optim.SGD(params, **SGD, foreach=True),
        }
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state, and of the carried norms."""
    own = sum(
        x.nbytes
        for state in optimizer.state.values()
        for x in state.values()
        if isinstance(x, Tensor)
    )
    carried = getattr(getattr(optimizer, "_fusion", None), "_carried", [])
    return own + sum(c._plan.nbytes for c in carried)


def traffic(name: str, params: list[nn.Parameter]) -> int:
    """Bytes that a one-pass step has to read and write."""
    words = 5 if name.startswith("SGD") else 7  # W, momentum read and written, gradient; and V
    if not name.startswith("DessiLBI"):
        return words * 4 * sum(p.numel() for p in params)
    return sum((7 if p.dim() > 1 else 5) * 4 * p.numel() for p in params)


def measure(model: str, threads: int, rounds: int) -> dict[str, object]:
    """Times of all contenders on one model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape) * 0.05) for shape in MODELS[model]()]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    count = sum(p.numel() for p in params)
    source = torch.randn(min(count, 2**26))
    target = torch.empty_like(source)
    optimizers = contenders(params)
    calls: dict[str, Callable[[], object]] = {n: o.step for n, o in optimizers.items()}
    calls["copy"] = lambda: target.copy_(source)
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    copied = 2 * source.nbytes / min(times["copy"])
    rows = {
        name: summary(times[name], times["AdamW fused"])
        | {
            "state_bytes": state_bytes(optimizers[name]),
            "gb_per_s": traffic(name, params) / min(times[name]) / 1e9,
            "kernel": getattr(optimizers[name], "kernel", None),
        }
        for name in optimizers
    }
    return {
        "model": model,
        "parameters": count,
        "tensors": len(params),
        "threads": threads,
        "rounds": rounds,
        "copy_gb_per_s": copied / 1e9,
        "load": os.getloadavg()[0],
        "rows": rows,
    }


def summary(times: list[float], base: list[float]) -> dict[str, float]:
    """Milliseconds, and ratios to the base: of the fastest rounds, and within rounds."""
    low, middle, high = statistics.quantiles(
        [mine / theirs for mine, theirs in zip(times, base, strict=True)], n=4
    )
    return {
        "ms_min": 1e3 * min(times),
        "ms_median": 1e3 * statistics.median(times),
        "ratio_min": min(times) / min(base),
        "ratio_median": middle,
        "ratio_quartiles": [low, high],
    }


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), name)
    return {
        "processor": name,
        "cpus": os.cpu_count(),
        "system": platform.system(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": Path(building.compiler()[0]).name,
    }


def table(result: dict) -> str:
    """One model's figures as text."""
    size = f"{result['parameters']:,} parameters, {result['threads']} thread(s)"
    speed = f"copy {result['copy_gb_per_s']:.0f} GB/s, load {result['load']:.1f}"
    lines = [f"{result['model']}: {size}, {speed}"]
    for name, row in result["rows"].items():
        low, high = row["ratio_quartiles"]
        lines.append(
            f"  {name:26} {row['ms_min']:9.3f} ms ({row['ms_median']:9.3f})  "
            f"{row['gb_per_s']:5.1f} GB/s  x {row['ratio_min']:.2f} "
            f"(median {row['ratio_median']:.2f}, quartiles {low:.2f}-{high:.2f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], default=list(MODELS))
    parser.add_argument("--rounds", type=int, help="default: about a billion elements' worth")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-MACHINE")
    arguments = parser.parse_args()
    building.build()
    folder = arguments.out or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{platform.machine()}"
    folder.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        count = sum(math.prod(shape) for shape in MODELS[model]())
        rounds = arguments.rounds or min(600, max(15, 1_500_000_000 // count))
        results = [measure(model, threads, rounds) for threads in arguments.threads]
        for result in results:
            print(table(result), flush=True)
        write_json(folder / f"step-{model}.json", {"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
