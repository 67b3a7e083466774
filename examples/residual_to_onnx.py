# SPDX-License-Identifier: Apache-2.0
"""A residual net: coupled filters, half of the MACs, fine-tuned, compacted, as an ONNX file.

python examples/residual_to_onnx.py [--smoke] [FILE.onnx]    (needs the extra "export")
"""

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits

import dessilbi as lbi
from dessilbi.models import build_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
parser.add_argument("file", nargs="?", default=tempfile.mkdtemp() + "/small.onnx")
given = parser.parse_args()
epochs, samples = 8, 1400

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
model = build_model("resnet8-small", num_classes=10, in_channels=1, seed=0)
x = images[:2]


def fit(optimizer, epochs):
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(samples).split(50):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            if given.smoke:
                break


steps = epochs * samples // 50
optimizer = lbi.DessiLBI(
    lbi.param_groups(model, {"fc.*": None}, example_inputs=x), lr=0.05, momentum=0.9
)
lbi.set_coupling(optimizer, 5, total_time=lbi.total_time(optimizer, steps=steps))
control = lbi.DensityControl(optimizer, density=0.3, total_steps=steps)
path = lbi.Path(optimizer, total_steps=steps)
fit(optimizer, epochs)
path.close()

ticket = path.ticket(macs=0.5, model=model.eval(), example_inputs=x)
tuner = torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9)
ticket.enforce(model, tuner)
fit(tuner, epochs // 4)
small = lbi.compact(model.eval(), ticket, example_inputs=x)
print(small.proof)
right = small.model(images[1400:]).argmax(1) == labels[1400:]
print(f"accuracy {right.float().mean().item():.3f}")
print(lbi.export(small.model, given.file, example_inputs=x))
