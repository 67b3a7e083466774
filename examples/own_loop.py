# SPDX-License-Identifier: Apache-2.0
"""An own training loop: two lines are new, and any ticket can be had afterwards.

python examples/own_loop.py [--smoke]
"""

import argparse
import copy

import torch
from sklearn.datasets import load_digits

from dessilbi import DessiLBI, Path, param_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
epochs, done = 40, 1 if parser.parse_args().smoke else 40

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train, test = torch.randperm(len(labels)).tensor_split([1400])

model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 10)
)
rules = {"0.weight": {"structure": "filter", "lam": 3.0}, "3.weight": {"lam": 0.3}}
# T, the sum of the learning rates, is 40 * 28 * 0.05 = 56; nu = T/10
optimizer = DessiLBI(param_groups(model, rules), lr=0.05, nu=5.6, momentum=0.9)  # new
path = Path(optimizer, total_steps=epochs * 28)  # new

for _ in range(done):
    for part in train[torch.randperm(len(train))].split(50):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()

for density in (1.0, 0.3, 0.1, 0.05):
    masked = path.ticket(density=density).apply_(copy.deepcopy(model))
    accuracy = (masked(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"density {density:.2f}: accuracy {accuracy:.3f}, nothing retrained")
