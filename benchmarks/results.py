# SPDX-License-Identifier: Apache-2.0
"""Measure recipes and write docs/results: one JSON and one figure each, and the page of tables.

python benchmarks/results.py digits-lenet                      # runs/results/digits-lenet
python benchmarks/results.py mnist-lenet mnist-lenet-best --data DIR
python benchmarks/results.py                                   # only write the page again
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path as FilePath

from dessilbi.files.runs import free_path
from dessilbi.files.sealing import sealed
from dessilbi.files.storage import read_json, write_json
from dessilbi.path.path import Path
from dessilbi.reporting.figures import save_path_figure
from dessilbi.reporting.summary import summarise, thinned
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.finetune import Trained, judge_tickets, load_trained
from dessilbi.training.loop import train
from dessilbi.training.progress import default_reporter
from dessilbi.training.recipes import load_recipe

ROOT = FilePath(__file__).parents[1]
FOLDER = ROOT / "docs" / "results"
DENSITIES = (0.5, 0.3, 0.2, 0.15, 0.1, 0.05)


def measure(name: str, data: str | None) -> None:
    recipe = load_recipe(name)
    run = train(
        recipe,
        free_path(ROOT / "runs" / "results", name),
        data_root=data,
        reporter=default_reporter(),
    )
    trained = load_trained(run, data_root=data)
    path = Path.load(run.folder)
    outcomes = [asdict(o) for o in judge_tickets(trained, path, DENSITIES)]
    write_json(run.family, sealed({"accuracy": trained.accuracy, "tickets": outcomes}))
    summary = summarise(run.folder)
    last = summary.rows[-1]
    write_json(
        FOLDER / f"{name}.json",
        {
            "command": f"python benchmarks/results.py {name}",
            "recipe": recipe.model_dump(),
            "environment": {
                key: value
                for key, value in read_json(run.environment).items()
                if key not in ("command", "platform", "data")
            },
            "seconds": run.read_status()["seconds"],
            "final": asdict(last),
            "val_accuracy": accuracy(trained.model, trained.data.validation),
            "tickets": outcomes,
            "val_tickets": validated(trained, path),
            "path": [asdict(row) for row in thinned(summary.judged, 20)],
        },
    )
    save_path_figure(summary, ROOT / "docs" / "images" / f"{name}.svg")


def validated(trained: Trained, path: Path) -> list[float]:
    """Validation accuracy of the same tickets, at once: what a choice may look at."""
    tickets = [path.ticket(density=density) for density in DENSITIES]
    return [
        accuracy(masked(trained.model, ticket, trained.data.train), trained.data.validation)
        for ticket in tickets
    ]


def page() -> str:
    """The page of all measured recipes."""
    intro = (
        "Written by `python benchmarks/results.py`; the numbers are in `docs/results/*.json` with "
        "recipe, seed and machine. Test accuracy in %, one seed. Choices were made on the "
        "validation split; the test split is only reported."
    )
    parts = ["# Results", "", intro]
    notes = FOLDER / "notes"
    for file in sorted(FOLDER.glob("*.json")):
        parts += ["", *section(file.stem, read_json(file))]
        if (note := notes / f"{file.stem}.md").is_file():
            parts += ["", note.read_text().strip()]
    return "\n".join(parts) + "\n"


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def section(name: str, result: dict) -> list[str]:
    final, recipe = result["final"], result["recipe"]
    layers = ", ".join(
        f"{layer.removesuffix('.weight')} {100 * density:.1f} %"
        for layer, density in final["layers"].items()
    )
    rows = [
        f"| {percent(t['density'])} | {percent(t['before'])} | {percent(t['after'])} |"
        for t in result["tickets"]
    ]
    setting = (
        f"{recipe['summary']}. Seed {recipe['seed']}, {recipe['epochs']} epochs, "
        f"{result['seconds']:.0f} s on {result['environment']['threads']} CPU threads "
        f"(torch {result['environment']['packages']['torch']}). `{result['command']}`"
    )
    return [
        f"## {name}",
        "",
        setting,
        "",
        "| at the end of the path | |",
        "|---|---|",
        f"| dense W | {percent(final['accuracy'])} |",
        f"| ticket: W on supp(Γ), nothing retrained | {percent(final['ticket_accuracy'])} |",
        f"| Γ | {percent(final['gamma_accuracy'])} |",
        f"| density of the ticket | {percent(final['density'])} |",
        "",
        f"Blocks in supp(Γ): {layers}.",
        "",
        f"| density | at once | fine-tuned {recipe['finetune']['epochs']} epochs |",
        "|---|---|---|",
        *rows,
        "",
        f"![Path and family of {name}](images/{name}.svg)",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--data", default=os.environ.get("DESSILBI_DATA"))
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in arguments.recipes:
        measure(name, arguments.data)
    (ROOT / "docs" / "results.md").write_text(page())


if __name__ == "__main__":
    main()
