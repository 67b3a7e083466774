# SPDX-License-Identifier: Apache-2.0
"""The order of the site's pages. A test holds that every page of docs/ is in it."""

from pathlib import Path

# A page that is named here and is not there is left out.
ORDER: list[dict] = [
    {"Home": "index.md"},
    {"Tutorial": "tutorial.md"},
    {
        "How to": [
            {"Couple what hangs together": "units.md"},
            {"Choose a density, or nu and lambda": "choosing.md"},
            {"Let lambda be found": "density.md"},
            {"Wrap another optimizer": "wrapping.md"},
            {"Choose and train tickets": "tickets.md"},
            {"Hold a smaller model": "compaction.md"},
            {"Train on after compaction": "continuing.md"},
            {"Grow": "growing.md"},
            {"Train a recipe": "training.md"},
            {"Stop, crash and resume": "resuming.md"},
            {"Use many machines": "scaling.md"},
            {"Transformers, Lightning, Hugging Face, timm": "integrations.md"},
            {"Look at a run": "report.md"},
            {"See what filters answer to": "filters.md"},
            {"From the authors' code": "from-the-authors-code.md"},
            {"From Torch-Pruning": "from-torch-pruning.md"},
        ]
    },
    {
        "Reference": [
            {"Library": "api.md"},
            {"Training from Python": "api-training.md"},
            {"Commands": "commands.md"},
            {"Recipes": "recipes.md"},
            {"Fields of a recipe": "recipe-fields.md"},
            {"Files": "formats.md"},
        ]
    },
    {
        "Background": [
            {"Mathematics": "mathematics.md"},
            {"Precision": "precision.md"},
            {"What can go": "what-can-go.md"},
            {"Results": "results.md"},
            {"Evidence": "evidence.md"},
            {"Early tickets": "tickets-evidence.md"},
            {"Speed": "speed.md"},
            {"Compaction of well-known models": "compaction-zoo.md"},
            {"How the code is laid out": "architecture.md"},
        ]
    },
    {"Caveats": "caveats.md"},
    {
        "Project": [
            {"Releasing": "releasing.md"},
            {"Security": "project/security.md"},
            {"Changelog": "project/changelog.md"},
        ]
    },
]


def navigation(docs: Path) -> list[dict]:
    """Return the pages that are there, in order, and the decision records."""
    return [*_present(ORDER, docs), {"Decisions": decisions(docs)}]


def _present(entries: list[dict], docs: Path) -> list[dict]:
    found = []
    for (title, target), *_ in (list(entry.items()) for entry in entries):
        if isinstance(target, list):
            found.append({title: _present(target, docs)})
        elif target.startswith("project/") or (docs / target).is_file():
            found.append({title: target})
    return found


def decisions(docs: Path) -> list[dict[str, str]]:
    """Return the architecture decision records by title."""
    pages = sorted((docs / "adr").glob("*.md"))
    titles = [page.read_text().splitlines()[0].lstrip("# ") for page in pages]
    return [{t: f"adr/{page.name}"} for t, page in zip(titles, pages, strict=True)]
