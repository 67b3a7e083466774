# SPDX-License-Identifier: Apache-2.0
"""Write docs/speed.md from the newest folder in benchmarks/results that has step-*.json.

python benchmarks/speed_page.py
"""

from pathlib import Path

from dessilbi.storage import read_json

ROOT = Path(__file__).parents[1]
ORDER = ["lenet", "resnet20", "resnet50", "vit-b", "gpt-350m"]
INTRO = """# Speed

Written by `python benchmarks/speed_page.py` from `{folder}`, which `python benchmarks/step.py` and
`python benchmarks/train_overhead.py` wrote. {machine}. Other programs ran on the same two
cores: "fastest" is the fastest of {rounds} interleaved rounds, and the ratio is given for the
fastest rounds and, in brackets, as quartiles of the ratio within a round. Ratios are to torch's
`AdamW(fused=True)`, which moves as many bytes as DessiLBI: 28 per float32 weight (SGD: 20).

`fused=True` builds the kernel once, into the user's cache; `fused=None`, the default, uses it where
it is built. `optimizer.kernel` tells what steps. Without a compiler the row "reference" is what one
gets. The CUDA kernel (Triton) has been run in Triton's interpreter and compiled for GPUs, but **not
measured, nor run, on one**.
"""


def bytes_of(count: float) -> str:
    """A size for people."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def section(result: dict) -> list[str]:
    """The table of one model and number of threads."""
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    told = (
        f"{result['parameters']:,} parameters in {result['tensors']} tensors; copying runs at "
        f"{result['copy_gb_per_s']:.0f} GB/s; load {result['load']:.1f}."
    )
    lines = [
        f"## {result['model']}, {threads}",
        "",
        told,
        "",
        "| optimizer | fastest ms | GB/s | state | ratio | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        low, high = row["ratio_quartiles"]
        size = bytes_of(row["state_bytes"])
        lines.append(
            f"| {name} | {row['ms_min']:.3f} | {row['gb_per_s']:.0f} | {size} | "
            f"**{row['ratio_min']:.2f}** | {low:.2f} to {high:.2f} |"
        )
    return [*lines, ""]


def training(told: dict) -> list[str]:
    """The table of whole epochs."""
    setting = (
        f"{told['model']}, batch {told['batch']}, epochs of {told['images']:,} images of noise, "
        f"{told['threads']} threads, all contenders batch by batch in turn; DessiLBI by filter, "
        f"with a Path observing. Ratios are to `torch.optim.SGD` as it comes."
    )
    lines = [
        "## Training",
        "",
        setting,
        "",
        "| optimizer | seconds per epoch | ratio | median of batches | step alone / SGD's epoch |",
        "|---|---|---|---|---|",
    ]
    for number, epoch in enumerate(told["epochs"]):
        for name, own in epoch.items():
            lines.append(
                f"| {name} (epoch {number + 1}) | {own['seconds']:.1f} | {own['ratio']:.3f} | "
                f"{own['ratio_median']:.3f} | {100 * own['step_share']:.2f} % |"
            )
    return lines


def main() -> None:
    folder = max(f.parent for f in (ROOT / "benchmarks" / "results").glob("*/step-*.json"))
    files = [folder / f"step-{name}.json" for name in ORDER]
    told = [read_json(file) for file in files if file.exists()]
    machine = told[0]["machine"]
    name = f"{machine['processor']}, {machine['cpus']} cores, torch {machine['torch']}"
    rounds = [result["rounds"] for own in told for result in own["results"]]
    lines = [
        INTRO.format(
            folder=folder.relative_to(ROOT),
            machine=f"{name}, {machine['compiler']}",
            rounds=f"{min(rounds)} to {max(rounds)}",
        )
    ]
    for own in told:
        for result in own["results"]:
            lines += section(result)
    if (file := folder / "train-overhead.json").exists():
        lines += training(read_json(file))
    (ROOT / "docs" / "speed.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
