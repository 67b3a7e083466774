# SPDX-License-Identifier: Apache-2.0
"""A compiled step computes what the eager step computes."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself


@pytest.mark.parametrize(
    "structure", ["element", "filter", "channel", "layer", (2, 2), None], ids=str
)
def test_a_compiled_step_equals_the_eager_one(structure):
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    compiled = deepcopy(eager)

    lam = 0.03 if structure == "element" else 0.15

    def build(model):
        groups = [
            {"params": [("a", model[0].weight), ("b", model[1].weight)], "structure": structure},
            {"params": [("c", model[0].bias), ("d", model[1].bias)]},
        ]
        return DessiLBI(groups, lr=0.05, nu=2.0, lam=lam, momentum=0.9)

    optimizers = build(eager), build(compiled)
    steps = optimizers[0].step, torch.compile(optimizers[1].step)
    for _ in range(15):
        inputs = torch.randn(16, 8)
        for model, optimizer, step in zip((eager, compiled), optimizers, steps, strict=True):
            optimizer.zero_grad()
            (model(inputs) - inputs[:, :4]).square().mean().backward()
            step()
    for left, right in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    if structure is not None:
        assert 0 < optimizers[0].support().density <= 1
        assert optimizers[0].support() == optimizers[1].support()
