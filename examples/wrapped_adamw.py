# SPDX-License-Identifier: Apache-2.0
"""AdamW moves the weights, DessiLBI selects: the neurons of a small net on made-up data.

python examples/wrapped_adamw.py [--smoke]
"""

import argparse

import torch

from dessilbi import Path, param_groups, wrap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
steps, done = 1000, 20 if parser.parse_args().smoke else 1000

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
groups = param_groups(model, {"0.weight": "neuron", "2.weight": None})
base = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
optimizer = wrap(base, nu=0.5, lam=2.0)  # T is about 1000 * 0.005, so R = T/nu is 10
scheduler = torch.optim.lr_scheduler.OneCycleLR(base, max_lr=0.01, total_steps=steps)
path = Path(optimizer, total_steps=steps)

for _ in range(done):
    inputs = torch.randn(128, 20)
    targets = (inputs[:, :1] * inputs[:, 1:2]).relu()  # two of twenty inputs matter
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    scheduler.step()

neurons = optimizer.support().mask_of("0.weight")[:, 0].sum().item()
print(f"loss {loss.item():.3f}; {neurons} of 64 neurons are in the support")
