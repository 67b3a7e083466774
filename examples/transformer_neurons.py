# SPDX-License-Identifier: Apache-2.0
"""A small transformer: the neurons of its MLPs as units, half of them removed, exactly.

python examples/transformer_neurons.py [--smoke]
"""

import argparse

import torch

import dessilbi as lbi

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
steps, done = 800, 5 if parser.parse_args().smoke else 400

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True)
        self.embed = torch.nn.Embedding(16, 32)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(32, 2)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)))


model, x = Model(), torch.randint(16, (2, 12))
rules = lbi.plan(model, example_inputs=x).rules({"neuron": {}})
optimizer = lbi.DessiLBI(lbi.param_groups(model, rules, example_inputs=x), lr=0.05, momentum=0.9)
lbi.set_coupling(optimizer, 5, total_time=lbi.total_time(optimizer, steps=steps))
control = lbi.DensityControl(optimizer, density=0.5, total_steps=steps)
path = lbi.Path(optimizer, total_steps=steps)

for _ in range(done):  # does a token occur once more in its sequence?
    tokens = torch.randint(16, (64, 12))
    again = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).sum(2) > 1
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), again.flatten().long())
    loss.backward()
    optimizer.step()

ticket = path.ticket(density=0.5, model=model.eval(), example_inputs=x)
small = lbi.compact(model, ticket, example_inputs=x)
print(f"loss {loss.item():.3f}")
print(small.proof)
