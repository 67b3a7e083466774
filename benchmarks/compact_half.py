# SPDX-License-Identifier: Apache-2.0
"""How much of a cut in MACs becomes a cut in latency, with and without widths that hardware likes.

python benchmarks/compact_half.py        # what is not measured yet; then write the page

Half of every unit of ResNet-18 and VGG-16-BN leaves widths that are multiples of 8; 45 % leaves odd
ones, which ``multiple_of=8`` rounds up. MobileNetV2, where little work is left per channel, shows
what odd widths cost. Keep the machine quiet; the load before each measurement is recorded.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import compact_page
import torch
from compact import RECORDS, build, compacted
from latencies import environment, measure_latency

from dessilbi.files.storage import to_json

HALVES = RECORDS.parent / "compact-half.jsonl"
KEEPS = {"resnet18": (0.5, 0.45), "vgg16_bn": (0.5, 0.45), "mobilenet_v2": (0.7, 0.4)}
CASES = [(model, keep, by) for model, keeps in KEEPS.items() for keep in keeps for by in (1, 8)]


def measure(name, keep, multiple, runs=10, rounds=7):
    model = build("torchvision", name)
    result, masked, _ = compacted(model, keep, multiple)
    proof = result.proof
    with tempfile.TemporaryDirectory() as folder:
        x = torch.randn(1, 3, 224, 224)
        record = {"model": name, "keep": keep, "multiple_of": multiple}
        record |= environment()
        record |= measure_latency(
            masked, result.model, proof, x, Path(folder), runs=runs, rounds=rounds
        )
    convs = [m for m in result.model.modules() if isinstance(m, torch.nn.Conv2d)]
    return record | {
        "macs": [proof.macs_before, proof.macs_after],
        "params": [proof.params_before, proof.params_after],
        "rounded": sum(proof.rounded.values()),
        "odd_widths": sum(m.out_channels % 8 > 0 for m in convs),
    }


def main():
    warnings.simplefilter("ignore")
    lines = HALVES.read_text().splitlines() if HALVES.exists() else []
    keys = ("model", "keep", "multiple_of")
    done = {tuple(json.loads(line)[key] for key in keys) for line in lines}
    for case in CASES:
        if case not in done:
            record = to_json(measure(*case))
            with HALVES.open("a") as file:
                file.write(record + "\n")
            print(record, flush=True)
    compact_page.write()


if __name__ == "__main__":
    sys.exit(main())
