# SPDX-License-Identifier: Apache-2.0
"""Walk through the product as a stranger does, with the installed wheel, and note the times.

pip install 'dist/dessilbi-VERSION-py3-none-any.whl[export,vision]'
cd an empty folder; python CLONE/benchmarks/walk.py [--out walk.json]

First a small model of one's own: train, ticket, compaction, ONNX, report. Then a ResNet-18 on a
folder of images (made here: 240 squares, discs, crosses and stripes of 32 pixels), by a script of
one's own and by the command line. Every step is a process of its own. Where other programs share
the machine, CPU time says more than the clock.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import dessilbi

KINDS, TRAINING, VALIDATION, SIDE = ("cross", "disc", "square", "stripes"), 60, 20, 32

SMALL = """
import torch
from dessilbi import DessiLBI, Path, compact, export, param_groups

model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, 10)
)
x = torch.randn(2, 1, 8, 8)
groups = param_groups(model, {"3.weight": None}, example_inputs=x)
optimizer = DessiLBI(groups, lr=0.05, nu=5.0, lam=0.3, momentum=0.9)
path = Path(optimizer, total_steps=200, file="runs/small/path.jsonl")
for step in range(200):
    inputs, targets = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
path.close()
ticket = path.ticket(density=0.5, model=model.eval(), example_inputs=x)
small = compact(model, ticket, example_inputs=x)
print(ticket, small.proof, export(small.model, "small.onnx", example_inputs=x), sep="\\n")
assert small.proof.params_after < small.proof.params_before
"""

IMAGES = """
import torch
from dessilbi import DensityControl, DessiLBI, Path, compact, export
from dessilbi import param_groups, set_coupling, total_time
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import ToTensor

torch.manual_seed(0)
train, val = (ImageFolder(f"images/{part}", ToTensor()) for part in ("train", "val"))
loader = torch.utils.data.DataLoader(train, batch_size=30, shuffle=True)
model = resnet18(num_classes=len(train.classes))
x, epochs = torch.randn(2, 3, 32, 32), 8

def fit(optimizer, epochs):
    model.train()
    for epoch in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

def accuracy(model):
    model.eval()
    inputs, targets = map(torch.stack, zip(*[(i, torch.tensor(t)) for i, t in val]))
    with torch.no_grad():
        return (model(inputs).argmax(1) == targets).float().mean().item()

steps = epochs * len(loader)
optimizer = DessiLBI(param_groups(model, {"fc.*": None}, example_inputs=x), lr=0.02, momentum=0.9)
set_coupling(optimizer, 5, total_time=total_time(optimizer, steps=steps))
control = DensityControl(optimizer, density=0.2, total_steps=steps)
path = Path(optimizer, total_steps=steps, file="runs/resnet/path.jsonl")
fit(optimizer, epochs)
path.close()
dense = accuracy(model)
ticket = path.ticket(macs=0.5, model=model, example_inputs=x)
tuner = torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9)
ticket.enforce(model, tuner)
fit(tuner, 2)
small = compact(model.eval(), ticket, example_inputs=x)
print(small.proof, export(small.model, "resnet.onnx", example_inputs=x), sep="\\n")
print(f"accuracy of W {dense:.3f}, of half its MACs {accuracy(small.model):.3f}")
assert small.proof.macs_after < 0.55 * small.proof.macs_before
"""

TRAIN = "dessilbi train folder-resnet18 --data images --out runs/cli"
SETTINGS = ("image_size=32", "epochs=4", "batch_size=20", "validation=40", "points=4", "workers=0")
STEPS = (
    ("help", "dessilbi --help"),
    ("own small model: train, ticket, compact, ONNX", ("python", "-c", SMALL)),
    ("its report", "dessilbi report runs/small --out small.html"),
    ("ResNet-18, own script: 8 epochs, ticket, 2 epochs, compact, ONNX", ("python", "-c", IMAGES)),
    ("its report", "dessilbi report runs/resnet --out resnet.html"),
    ("dessilbi train, 4 epochs", " --set ".join((TRAIN, *SETTINGS))),
    ("dessilbi ticket", "dessilbi ticket runs/cli --data images --macs 0.5 --out half.safetensors"),
    (
        "dessilbi compact",
        "dessilbi compact runs/cli --data images --ticket half.safetensors --out half",
    ),
    ("dessilbi export", "dessilbi export half --format onnx"),
    ("dessilbi report", "dessilbi report runs/cli --out cli.html"),
)


def draw(kind: str, generator: np.random.Generator) -> np.ndarray:
    """One picture: a shape of some colour, somewhere, on noise."""
    rows, columns = np.mgrid[:SIDE, :SIDE] - generator.integers(10, 22, (2, 1, 1))
    size = generator.integers(4, 9)
    near, far = np.minimum(abs(rows), abs(columns)), np.maximum(abs(rows), abs(columns))
    inside = {
        "cross": (near < 2) & (far < size),
        "disc": rows**2 + columns**2 < size**2,
        "square": far < size,
        "stripes": (rows % 4 < 2) & (far < size),
    }[kind]
    colour = generator.integers(120, 256, 3)
    noise = generator.integers(0, 100, (SIDE, SIDE, 3))
    return np.where(inside[..., None], colour, noise).astype(np.uint8)


def make_images(folder: Path) -> None:
    from PIL import Image  # comes with the extra "vision"

    generator = np.random.default_rng(0)
    for part, count in (("train", TRAINING), ("val", VALIDATION)):
        for kind in KINDS:
            (folder / part / kind).mkdir(parents=True)
            for number in range(count):
                picture = Image.fromarray(draw(kind, generator))
                picture.save(folder / part / kind / f"{number}.png")


def walked(name: str, command: str | tuple[str, ...]) -> dict[str, object]:
    """Run a step in the folder that this was started in, with the programs of this Python."""
    program, *words = command.split() if isinstance(command, str) else command
    print(f"\n== {name}", flush=True)
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([str(Path(sys.executable).parent / program), *words], check=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"step": name, "wall_seconds": round(wall, 1), "cpu_seconds": round(spent, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write what was noted, as JSON")
    out = parser.parse_args().out
    if any(Path(name).exists() for name in ("runs", "images")):
        sys.exit("start in an empty folder: runs or images are here already")
    make_images(Path("images"))
    steps = [walked(name, command) for name, command in STEPS]
    told = {
        "command": "python benchmarks/walk.py",
        "date": datetime.now(UTC).date().isoformat(),
        "steps": steps,
        "wall_seconds": round(sum(step["wall_seconds"] for step in steps), 1),
        "cpu_seconds": round(sum(step["cpu_seconds"] for step in steps), 1),
        "load_average": os.getloadavg()[0],
        "environment": {
            "dessilbi": dessilbi.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "compiler": shutil.which("g++") is not None,
        },
    }
    text = json.dumps(told, indent=2) + "\n"
    print(text)
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    main()
