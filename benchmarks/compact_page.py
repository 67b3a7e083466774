# SPDX-License-Identifier: Apache-2.0
"""Write docs/compaction-zoo.md from the records in docs/results."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"

HEAD = """# Compaction of well-known models

Written by `benchmarks/compact.py`, `benchmarks/compact_half.py` and `benchmarks/random_nets.py`.
Weights, norms and tickets are drawn at random, so this says what can be removed exactly and what
it saves, nothing about accuracy. Latencies are of one image of 224 x 224 on one thread. *Realised*
is the cut in latency divided by the cut in MACs, by the wall clock and, in brackets, by the
thread's own time: other programs took turns on the cores (the load is in the records).
"""

ZOO = """
## The zoo

From [these records](results/compact-zoo.jsonl). Coverage: share of the parameters that lie in
something removable. Gap: largest difference between the masked and the compacted model on new
inputs, relative to the largest output. Seconds: CPU time of `compact` in float32, certificate
included, latency excluded. Form: these were taken when a module whose attributes follow was also
called "module"; it is "sized module" now.
"""
ZOO_COLUMNS = [
    *("model", "keep", "coverage", "params left", "MACs left", "removed of dead", "form"),
    *("gap float64", "gap float32", "seconds", "realised: PyTorch", "onnxruntime"),
]

HALF = """
## Odd widths and widths that hardware likes

From [these records](results/compact-half.jsonl). Every unit keeps the same share. *Odd*: widths
that are not multiples of 8.
"""
HALF_COLUMNS = [
    *("model", "keep", "multiple_of", "odd", "MACs left", "onnxruntime ms before, after"),
    *("realised", "PyTorch ms before, after", "realised"),
]


def table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def share(pair):
    return f"{pair[1] / pair[0]:.3f}"


def realised(record, engine):
    wall, thread = (record[f"{engine}_{clock}_realised"] for clock in ("wall", "thread"))
    return f"{wall:.2f} ({thread:.2f})"


def zoo_row(r):
    first = [r["model"], r["keep"], f"{r['coverage']:.3f}"]
    if "refused" in r:
        return [*first, f"refused: {r['refused']}", *[""] * (len(ZOO_COLUMNS) - 4)]
    return [
        *first,
        share(r["params"]),
        share(r["macs"]),
        f"{r['removed']} of {r['dead']}",
        r["form"],
        f"{r['float64_gap']:.1e}",
        f"{r['float32_gap']:.1e}",
        f"{r['cpu_seconds']:.1f}",
        realised(r, "torch"),
        realised(r, "onnxruntime"),
    ]


def half_row(r):
    cells = [r["model"], r["keep"], r["multiple_of"], r["odd_widths"], share(r["macs"])]
    for engine in ("onnxruntime", "torch"):
        cells += [", ".join(f"{t:.1f}" for t in r[f"{engine}_wall_ms"]), realised(r, engine)]
    return cells


def nets(record):
    count = "{nets} nets of `tests/random_nets.py`: {equal} equal, {nothing_to_remove} with nothing"
    told = count + " to remove, {refused} refused. A wrong one would leave no record.\n"
    reasons = [f"- {times} refused: {why}" for why, times in record["reasons"].items()]
    return "\n".join(["\n## Random nets\n", told.format(**record), *reasons])


def load(name):
    file = RESULTS / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write():
    zoo = sorted(load("compact-zoo.jsonl"), key=lambda r: (r["library"], r["model"], -r["keep"]))
    parts = [HEAD, ZOO, table(ZOO_COLUMNS, map(zoo_row, zoo))]
    half = load("compact-half.jsonl")
    if half:
        parts += [HALF, table(HALF_COLUMNS, map(half_row, half))]
    file = RESULTS / "measured" / "random-nets.json"
    if file.exists():
        parts.append(nets(json.loads(file.read_text())))
    (ROOT / "docs" / "compaction-zoo.md").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    write()
