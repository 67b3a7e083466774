# SPDX-License-Identifier: Apache-2.0
"""The house rule: a file imports only from files above it. Written before the code."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "dessilbi"

# From the ground up: files, and rooms of files in their own order. Where a room has no order inside
# its files may import each other. What nothing is said of tells itself, by its first line.
ORDER: dict[str, str | dict[str, str]] = {
    "columns": "names, curves and paragraphs in 80 columns, no torch",
    "files": {
        "storage": "durable files, no torch",
        "folders": "what kind of folder something is, no torch",
        "sealing": "the checksums of a run folder, no torch",
        "tensorfiles": "tensors in a file",
        "runs": "the run folder, no torch",
    },
    "blocks": {
        "naming": "canonical parameter names",
        "structure": "block shapes",
        "sharding": "blocks whose elements lie on several ranks",
        "enforcing": "what is dead stays dead",
        "ticket": "block masks",
    },
    "kernels": "",
    "optimizers": {
        "dual": "reading V: norms, units, Gamma, support",
        "loading": "optimizer state from a file",
        "options": "allowed values of a param group",
        "fusing": "which tensors a fused kernel takes",
        "carrying": "the fused step and the norms it carries",
        "optimizer": "DessiLBI: W learns as under SGD, and V integrates towards the sparse Gamma",
        "wrappable": "which optimizers can be wrapped",
        "wrapping": "the same dynamics around another torch optimizer, which moves W as ever",
    },
    "graph": "",
    "groups": "",
    "cuts": {
        "unread": "blocks whose every reader is dead",
        "closing": "a ticket extended to what hangs on it",
        "cutting": "kept indices, applied to tensors and modules",
        "counting": "multiply-accumulates of one sample",
        "costs": "what a cut leaves, in numbers",
    },
    "choosing": {
        "selection": "scores -> ticket of a wanted density",
        "choosing": "the closed family of one ranking, and the largest within a budget",
        "controls": "random tickets as sparse as another, layer by layer",
    },
    "dynamics": {
        "clock": "path time, R",
        "scheduling": "nu, lambda, kappa as functions of progress",
        "forecast": "when blocks will enter",
        "safety": "Lipschitz constant, step-size bound",
        "monitors": "what to watch along the path",
        "levels": "the lambda above which a wanted share lies",
        "invariance": "weights whose size a normalisation undoes",
        "targets": "... and what it will have to be at the end",
        "calibration": "DensityControl",
    },
    "path": {
        "lines": "what the lines of a path's file hold",
        "blocknorms": "norms of W of every filter at the recorded points",
        "history": "recorded points and their file",
        "scores": "how much each block weighs",
        "hints": "early warnings",
        "asking": "what a path can be asked for",
        "path": "Path: watches an optimizer, remembers when every block entered, gives out tickets",
        "settling": "when the support has stopped changing",
    },
    "compaction": {
        "adapting": "how each operation's constants follow",
        "rewriting": "kept indices, applied to the exported program",
        "guarding": "a program that is handed out checks its inputs",
        "blueprint": "kept indices as a value: the same cut on a fresh model",
        "sizing": "which attributes of modules follow a cut",
        "folding": "constants of dead channels",
        "following": "the optimizer goes on with the smaller model",
        "comparing": "how far answers are from others, each element in its own scale",
        "certifying": "whether two models compute the same",
        "rehearsing": "whether a smaller model can be trained, tried on a copy",
        "proving": "numbers before and after",
        "witness": "what the masked model answers, for later",
        "candidates": "one smaller model in several forms",
        "compaction": "close and compact: a closed ticket becomes a smaller, ordinary model",
    },
    "planning": "",
    "growth": {
        "widening": "indices that come again where a unit gets wider",
        "planting": "other widths, and values for what is new",
        "growth": "grow: wider units, the same function",
    },
    "exporting": "",
    "maximising": "the input that excites a filter most",
    "models": "",
    "saving": {
        "manifest": "the JSON file of a saved compact model",
        "saving": "a compact model as a folder without pickle or code, and back",
    },
    "training": {
        "values": "",
        "growth_table": "",
        "recipes": "",
        "telling": "",
        "feeding": "",
        "data": "",
        "widths": "",
        "ingredients": "",
        "starting": "",
        "schedules": "",
        "engine": "",
        "objective": "",
        "steering": "",
        "setting": "",
        "state": "",
        "randomness": "",
        "position": "",
        "checkpoints": "",
        "guards": "",
        "stopping": "",
        "progress": "",
        "watching": "",
        "evaluation": "",
        "judging": "",
        "tracing": "",
        "growing": "",
        "environment": "",
        "opening": "",
        "session": "",
        "loop": "",
        "finetune": "",
        "curve": "",
        "thinning": "",
        "iterating": "",
        "retraining": "",
        "studying": "",
    },
    "outcomes": {
        "measuring": "members chosen by latency and accuracy",
        "tickets": "a run and a wish become a ticket",
        "compacting": "a run and a ticket become a smaller model",
        "auditing": "every file of a run folder against its checksums",
    },
    "reporting": {
        "assets": "",
        "pixels": "",
        "scales": "",
        "charts": "",
        "summary": "",
        "evidence": "",
        "palette": "",
        "wording": "",
        "blockfigures": "",
        "frames": "",
        "comparison": "",
        "curves": "",
        "doctor": "",
        "examination": "",
        "svg": "",
        "plots": "",
        "figures": "",
        "filters": "",
        "mosaic": "",
        "sections": "",
        "page": "",
        "tables": "",
    },
    "integrations": "",
    "testing": "",
    "cli": "",
    "__main__": "`python -m dessilbi`",
}


def listed() -> list[str]:
    """Every place in the order: a room is imported through its files, which come one by one."""
    places = []
    for room, files in ORDER.items():
        places += [f"{room}.{file}" for file in files] if isinstance(files, dict) else [room]
    return places


PLACES = listed()
NO_TORCH_AT_IMPORT = {
    "columns",
    "files.storage",
    "files.folders",
    "files.sealing",
    "files.runs",
    "cli",
    "__main__",
    "__init__",
}


def place_of(dotted: str) -> str:
    """The place in the order of a module: ``path.history``, or ``graph`` for all of a room."""
    room, _, rest = dotted.partition(".")
    return f"{room}.{rest.split('.')[0]}" if isinstance(ORDER.get(room), dict) and rest else room


def is_front(path: Path) -> bool:
    """Whether a file is the front of a room whose files have an order."""
    return path.name == "__init__.py" and isinstance(ORDER.get(path.parent.name), dict)


def module_of(path: Path) -> str:
    return place_of(".".join(path.relative_to(SRC).with_suffix("").parts))


def imports_of(tree: ast.AST) -> set[str]:
    """Places of the dessilbi modules that this file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            _, _, below = f"{node.module}.".partition("dessilbi.")
            below = below.rstrip(".")
            if node.module.split(".")[0] != "dessilbi":
                continue
            names = {alias.name for alias in node.names} - {"__version__"}
            whole = not below or isinstance(ORDER.get(below), dict)  # modules are what is imported
            found |= {place_of(f"{below}.{n}".lstrip(".")) for n in names} if whole else {below}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dessilbi":
                    found.add(alias.name.partition(".")[2] or "__init__")
    return {place_of(name) for name in found}


FILES = sorted(SRC.rglob("*.py"))


def test_the_source_tree_is_found():
    assert len(FILES) >= 5


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_only_from_files_above(path):
    module, imported = module_of(path), imports_of(ast.parse(path.read_text()))
    if is_front(path):
        assert not imported, "a room with an order is entered through its files"
        return
    if module == "__init__":
        return
    assert module in PLACES, f"{module} has no place in the order"
    for other in imported:
        assert other in PLACES, f"{path.name} imports {other}, which has no place"
        assert other == module or PLACES.index(other) < PLACES.index(module), (
            f"{path.name} imports {other}, which stands below it"
        )


def test_every_place_in_the_order_is_taken():
    taken = {module_of(path) for path in FILES if not is_front(path)}
    assert taken - {"__init__"} == set(PLACES)


def test_an_import_from_below_is_found():
    tree = ast.parse("from dessilbi.path import history\nfrom dessilbi.graph.units import Unit")
    assert imports_of(tree) == {"path.history", "graph"}
    tree = ast.parse("from dessilbi.optimizers.dual import norms\nimport dessilbi.cli.terminal")
    assert imports_of(tree) == {"optimizers.dual", "cli"}
    assert PLACES.index("path.lines") < PLACES.index("path.history") < PLACES.index("training.loop")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_relative_imports_are_not_used(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level > 0)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_light_modules_do_not_load_torch_at_import(path):
    if module_of(path) not in NO_TORCH_AT_IMPORT:
        return
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not any(name.split(".")[0] == "torch" for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_carry_their_licence_and_stay_one_concept(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert len(text.splitlines()) <= 400, "is there a second concept in it?"
