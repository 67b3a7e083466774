# SPDX-License-Identifier: Apache-2.0
"""Write docs/speed.md from the newest folder in benchmarks/results that has step-*.json.

python benchmarks/speed_page.py
"""

from pathlib import Path

from dessilbi.files.storage import read_json

ROOT = Path(__file__).parents[1]
ORDER = ["lenet", "resnet20", "resnet50", "vit-b", "gpt-350m"]
INTRO = """# Speed

Written by `python benchmarks/speed_page.py` from `{folder}`, which `python benchmarks/step.py` and
`python benchmarks/train_overhead.py` wrote. {machine}. Nothing else computed meanwhile.

All optimizers take turns, {rounds} rounds per model. Milliseconds are medians; a ratio is the
median, and in brackets the quartiles, of the time divided by that of torch's `AdamW(fused=True)` in
the same round. AdamW moves as many bytes as DessiLBI: 28 per float32 weight (SGD: 20). GB/s are
these bytes by the median time; "copying" is what `torch.Tensor.copy_` reached in the same rounds.

`fused=True` builds the kernel once, into the user's cache; `fused=None`, the default, uses it where
it is built. `optimizer.kernel` tells what steps. Without a compiler the row "reference" is what one
gets. The CUDA kernel (Triton) has been run in Triton's interpreter and compiled for a GPU, but
**neither measured nor run on one**.

| goal, DessiLBI fused / AdamW fused | filter | element |
|---|---|---|
{goals}
"""
GOALS = {"resnet50": 1.0, "lenet": 1.3, "vit-b": 1.0}


def goals(told: list[dict]) -> str:
    """What was aimed at, and what came of it."""
    rows = []
    for result in (result for own in told for result in own["results"]):
        if (goal := GOALS.get(result["model"])) is None:
            continue
        cells = []
        for structure in ("filter", "element"):
            ratio = result["rows"][f"DessiLBI {structure} fused"]["ratio_median"]
            cells.append(f"{ratio:.2f} {'met' if ratio <= goal else '**missed**'}")
        name = f"{result['model']}, {threads_of(result)}: at most {goal}"
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def threads_of(result: dict) -> str:
    return "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"


def bytes_of(count: float) -> str:
    """A size for people."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def section(result: dict) -> list[str]:
    """The table of one model and number of threads."""
    told = (
        f"{result['parameters']:,} parameters in {result['tensors']} tensors; copying runs at "
        f"{result['copy_gb_per_s']:.0f} GB/s."
    )
    lines = [
        f"## {result['model']}, {threads_of(result)}",
        "",
        told,
        "",
        "| optimizer | ms | GB/s | state | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        low, high = row["ratio_quartiles"]
        size = bytes_of(row["state_bytes"])
        lines.append(
            f"| {name} | {row['ms_median']:.3f} | {row['gb_per_s']:.0f} | {size} | "
            f"**{row['ratio_median']:.2f}** ({low:.2f} to {high:.2f}) |"
        )
    return [*lines, ""]


def ratios(told: list[dict]) -> str:
    """What an epoch takes, against SGD's."""
    return " and ".join(
        f"{own['ratios']['DessiLBI fused']:.3f} times as long on {threads_of(own)}" for own in told
    )


def training(told: list[dict]) -> list[str]:
    """The table of whole epochs."""
    first = told[0]
    setting = (
        f"{first['model']}, batch {first['batch']}, epochs of {first['images']:,} images of noise, "
        f"all contenders batch by batch in turn; DessiLBI by filter, with a Path observing. Ratios "
        f"are to `torch.optim.SGD` as it comes. The goal was an epoch at most 3 % longer: "
        f"over all epochs it takes {ratios(told)}. Epochs of one optimizer differ by more than the "
        f"optimizers do; what the steps alone take is in the last column."
    )
    lines = [
        "## Training",
        "",
        setting,
        "",
        "| optimizer | seconds per epoch | ratio | median of batches | step alone / SGD's epoch |",
        "|---|---|---|---|---|",
    ]
    for own in told:
        for number, epoch in enumerate(own["epochs"]):
            for name, row in epoch.items():
                lines.append(
                    f"| {name} ({threads_of(own)}, epoch {number + 1}) | {row['seconds']:.1f} | "
                    f"{row['ratio']:.3f} | {row['ratio_median']:.3f} | "
                    f"{100 * row['step_share']:.2f} % |"
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
            rounds=f"{min(rounds)} to {max(rounds):,}",
            goals=goals(told),
        )
    ]
    for own in told:
        for result in own["results"]:
            lines += section(result)
    if trained := sorted(folder.glob("train-overhead-*.json")):
        lines += training([read_json(file) for file in trained])
    (ROOT / "docs" / "speed.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
