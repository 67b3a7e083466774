# SPDX-License-Identifier: Apache-2.0
"""Compact random nets with random tickets and write docs/results/measured/random-nets.json.

python benchmarks/random_nets.py        # 300 nets; needs the tests beside it

A net whose compaction is wrong ends this script with an error, and nothing is written.
"""

import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from dessilbi.files.storage import write_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from random_nets import outcomes  # noqa: E402


def main(count: int = 300) -> None:
    start = time.perf_counter()
    seen = outcomes(count)
    refused = Counter(
        re.sub(r"\d[\d.e+-]*", "N", told) for told in seen if told not in ("equal", "nothing")
    )
    record = {
        "command": "python benchmarks/random_nets.py",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start),
        "nets": len(seen),
        "equal": seen.count("equal"),
        "nothing_to_remove": seen.count("nothing"),
        "refused": refused.total(),
        "reasons": dict(refused.most_common()),
    }
    write_json(ROOT / "docs" / "results" / "measured" / "random-nets.json", record)
    print(record)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
