# SPDX-License-Identifier: Apache-2.0
"""Compact well-known models; one line per model and density in docs/results, and a page of tables.

python benchmarks/compact.py                        # all that is not measured yet
python benchmarks/compact.py resnet18 vgg16_bn      # these, where not measured yet
python benchmarks/compact.py --page                 # only write docs/compaction-zoo.md again

Needs torchvision, timm, onnx, onnxscript, onnxruntime, and the tests beside it. Weights are drawn
at random, so nothing here says anything about accuracy.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from latencies import environment, measure_latency

from dessilbi.compaction.compaction import compact
from dessilbi.files.storage import to_json
from dessilbi.graph import read_graph
from dessilbi.testing import random_ticket

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "results" / "compact-zoo.jsonl"
KEEPS = (0.7, 0.4)
sys.path.insert(0, str(ROOT / "tests"))
from zoo import ZOO, build  # noqa: E402


def coverage(graph):
    """Share of parameter elements that lie in something removable."""
    names = set(graph.reading.program.weights.values())
    total = sum(int(np.prod(graph.shapes[name])) for name in names)
    free = {name: {} for name in names}
    for axis, blocks in graph.axes.items():
        if axis.name in names:
            share = float((blocks < 0).mean())
            free[axis.name][axis.dim] = min(share, free[axis.name].get(axis.dim, 1.0))
    left = sum(
        float(np.prod(list(free[name].values()) or [1.0])) * int(np.prod(graph.shapes[name]))
        for name in names
    )
    return 1 - left / total


def relative_gap(masked, small, x):
    with torch.no_grad():
        expected, found = masked(x), small.eval()(x)
    return float((expected - found).abs().max() / expected.abs().max())


def compacted(model, keep, multiple_of=1):
    """Ticket, compaction and how long both took (wall and CPU seconds)."""
    x = torch.randn(1, 3, 224, 224, dtype=next(model.parameters()).dtype)
    ticket = random_ticket(model, example_inputs=x, density=keep)
    start, cpu = time.perf_counter(), time.process_time()
    result = compact(model, ticket, example_inputs=x, multiple_of=multiple_of)
    spent = time.perf_counter() - start, time.process_time() - cpu
    masked = ticket.apply_(copy.deepcopy(model))
    return result, masked, [round(t, 2) for t in spent]


def measure(library, name, keep, runs):
    record = {"model": name, "library": library, "keep": keep, **environment()}
    model = build(library, name)
    graph = read_graph(model, torch.randn(1, 3, 224, 224))
    record |= {
        "units": len(graph.units),
        "blocks": graph.num_blocks,
        "coverage": round(coverage(graph), 4),
        "left_out": len(graph.left_out),
    }
    try:
        fresh = torch.randn(2, 3, 224, 224)
        result, masked, spent = compacted(copy.deepcopy(model).double(), keep)
        record["float64_gap"] = relative_gap(masked, result.model, fresh.double())
        result, masked, spent = compacted(model, keep)
        record["float32_gap"] = relative_gap(masked, result.model, fresh)
    except ValueError as error:
        return record | {"refused": str(error)}
    proof = result.proof
    record |= {
        "seconds": spent[0],
        "cpu_seconds": spent[1],
        "certificate": proof.relative_diff,
        "form": proof.form,
        "params": [proof.params_before, proof.params_after],
        "macs": [proof.macs_before, proof.macs_after],
        "dead": proof.dead,
        "removed": proof.removed,
        "revived": sum(proof.revived.values()),
        "kept_zero": sum(proof.kept_zero.values()),
    }
    with tempfile.TemporaryDirectory() as folder:
        x = torch.randn(1, 3, 224, 224)
        record |= measure_latency(masked, result.model, proof, x, Path(folder), runs=runs, rounds=3)
    return record


def records():
    if not RECORDS.exists():
        return []
    return [json.loads(line) for line in RECORDS.read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    wanted = [] if options.page else [(*m, k) for m in ZOO for k in KEEPS]
    for library, name, keep in wanted:
        if options.models and name not in options.models:
            continue
        if any((r["model"], r["keep"]) == (name, keep) for r in records()):
            continue
        record = measure(library, name, keep, options.runs)
        with RECORDS.open("a") as file:
            file.write(to_json(record) + "\n")
        print(to_json(record), flush=True)
    import compact_page

    compact_page.write()


if __name__ == "__main__":
    main()
