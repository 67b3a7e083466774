# SPDX-License-Identifier: Apache-2.0
"""Start it, end it in any way, start it again: it goes on where it was saved, path included.

python examples/resume_own_loop.py [--smoke] [FOLDER]    (--smoke: 30 steps, and stops at 15 once)
"""

import argparse
import sys
import tempfile
from pathlib import Path as FilePath

import torch

from dessilbi import DessiLBI, Path, param_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a few steps, with a crash among them")
parser.add_argument("folder", nargs="?", type=FilePath, default=FilePath(tempfile.mkdtemp()))
given = parser.parse_args()
steps, every = (30, 10) if given.smoke else (5000, 500)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
optimizer = DessiLBI(param_groups(model), lr=0.05, nu=2.0, lam=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
given.folder.mkdir(parents=True, exist_ok=True)
saved, place = given.folder / "saved.pt", None
if saved.exists():
    place = torch.load(saved, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(place[name])
file = given.folder / "path.jsonl"
if place is None:
    file.unlink(missing_ok=True)  # of a start that never came to its first save
path = Path(optimizer, file=file, total_steps=steps, resume=place and place["path"])
print(f"from step {path.step}")

while path.step < steps:
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(path.step))
    optimizer.zero_grad()
    (model(inputs) - inputs[:, :4].abs()).square().mean().backward()
    optimizer.step()
    scheduler.step()
    if path.step % every == 0:  # all four after the same step; there whole or not at all
        told = {name: part.state_dict() for name, part in parts.items()}
        torch.save(told | {"path": path.state_dict()}, given.folder / "new.pt")
        (given.folder / "new.pt").replace(saved)
    if given.smoke and place is None and path.step == 15:
        sys.exit("crashed at step 15")
print(f"done: {len(path.points)} points, density {path.points[-1].density:.3f}")
