# SPDX-License-Identifier: Apache-2.0
"""Time one optimizer step: DessiLBI's kernels beside torch's SGD and AdamW, in one interleaved run.

python benchmarks/step.py                              # all models, 1 and 2 threads
python benchmarks/step.py resnet50 lenet --rounds 200  # some
python benchmarks/speed_page.py                        # then writes docs/speed.md

Every contender steps once per round, in turn, on weights shaped like the model's; contenders
share weights and gradients and have a state each. Ratios are taken within a round and told by their
median and quartiles, so that what the machine does meanwhile falls on all contenders alike.
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

from dessilbi import DessiLBI, wrap
from dessilbi.files.storage import write_json
from dessilbi.kernels import building

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


def grouped(params: list[nn.Parameter], structure: str) -> list[dict[str, object]]:
    """Structured weights; vectors without a structure."""
    return [
        {"params": [p for p in params if p.dim() > 1], "structure": structure},
        {"params": [p for p in params if p.dim() <= 1], "structure": None},
    ]


def dessilbi(params: list[nn.Parameter], structure: str, **options: object) -> DessiLBI:
    """DessiLBI as it would be trained with."""
    return DessiLBI(grouped(params, structure), nu=1000.0, lam=0.1, **SGD, **options)


def contenders(params: list[nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """All optimizers on the same parameters."""
    small = sum(p.numel() for p in params) < LARGE
    found: dict[str, torch.optim.Optimizer] = {
        "AdamW fused": torch.optim.AdamW(params, lr=1e-5, fused=True),
        "DessiLBI filter fused": dessilbi(params, "filter", fused=True),
        "DessiLBI element fused": dessilbi(params, "element", fused=True),
        "SGD fused": torch.optim.SGD(params, **SGD, fused=True),
    }
    if small:
        base = torch.optim.AdamW(grouped(params, "filter"), lr=1e-5, fused=True)
        found |= {
            "AdamW fused, wrapped by filter": wrap(base, nu=1000.0, lam=0.1, fused=True),
            "DessiLBI filter reference": dessilbi(params, "filter", foreach=False),
            "AdamW foreach": torch.optim.AdamW(params, lr=1e-5, foreach=True),
            "SGD foreach": torch.optim.SGD(params, **SGD, foreach=True),
        }
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state, of the carried norms, and of wrap's copy of W."""
    own = sum(
        x.nbytes
        for state in optimizer.state.values()
        for x in state.values()
        if isinstance(x, Tensor)
    )
    carried = getattr(getattr(optimizer, "_fusion", None), "_carried", [])
    olds = getattr(optimizer, "_olds", {}).values()
    return own + sum(c._plan.nbytes for c in carried) + sum(old.nbytes for old in olds)


def traffic(name: str, params: list[nn.Parameter]) -> int:
    """Bytes that a one-pass step has to read and write."""
    # SGD: the gradient; W and momentum, read and written. One more state, and the copy of W.
    plain = 7 if name.startswith("AdamW") else 5
    words = 14 if "wrapped" in name else 5 if name.startswith("SGD") else 7
    return sum((words if p.dim() > 1 else plain) * 4 * p.numel() for p in params)


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
    copied = 2 * source.nbytes / statistics.median(times["copy"])
    rows = {
        name: summary(times[name], times["AdamW fused"])
        | {
            "state_bytes": state_bytes(optimizers[name]),
            "gb_per_s": traffic(name, params) / statistics.median(times[name]) / 1e9,
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
    """Milliseconds, and ratios to the base within rounds."""
    low, middle, high = statistics.quantiles(
        [mine / theirs for mine, theirs in zip(times, base, strict=True)], n=4
    )
    return {
        "ms_min": 1e3 * min(times),
        "ms_median": 1e3 * statistics.median(times),
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
            f"  {name:30} {row['ms_median']:9.3f} ms (fastest {row['ms_min']:9.3f})  "
            f"{row['gb_per_s']:5.1f} GB/s  x {row['ratio_median']:.2f} ({low:.2f}-{high:.2f})"
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
        rounds = arguments.rounds or min(1000, max(21, 3_000_000_000 // count))
        results = [measure(model, threads, rounds) for threads in arguments.threads]
        for result in results:
            print(table(result), flush=True)
        write_json(folder / f"step-{model}.json", {"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
