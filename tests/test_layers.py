# SPDX-License-Identifier: Apache-2.0
"""The house rule: a file imports only from files above it. Written before the code."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "dessilbi"

# From the ground up. A package stands for all of its files, which may import each other.
ORDER = [
    "storage",  # durable files, no torch
    "columns",  # names, curves and paragraphs in 80 columns, no torch
    "folders",  # what kind of folder something is, no torch
    "sealing",  # the checksums of a run folder, no torch
    "tensorfiles",  # tensors in a file
    "naming",  # canonical parameter names
    "structure",  # block shapes
    "sharding",  # blocks whose elements lie on several ranks
    "kernels",  # one step, several speeds
    "enforcing",  # what is dead stays dead
    "ticket",  # block masks
    "runs",  # the run folder, no torch
    "dual",  # reading V: norms, units, Gamma, support
    "loading",  # optimizer state from a file
    "options",  # allowed values of a param group
    "fusing",  # which tensors a fused kernel takes
    "carrying",  # the fused step and the norms it carries
    "optimizer",
    "wrapping",
    "foreign",  # layers of other libraries, known by name
    "graph",
    "groups",
    "clock",  # path time, R
    "scheduling",  # nu, lambda, kappa as functions of progress
    "forecast",  # when blocks will enter
    "safety",  # Lipschitz constant, step-size bound
    "monitors",  # what to watch along the path
    "selection",  # scores -> ticket of a wanted density
    "levels",  # the lambda above which a wanted share lies
    "invariance",  # weights whose size a normalisation undoes
    "targets",  # ... and what it will have to be at the end
    "calibration",  # DensityControl
    "pathlines",  # what the lines of a path's file hold
    "blocknorms",  # ||W_g|| of filters at the recorded points
    "history",  # recorded points and their file
    "scores",  # how much each block weighs
    "hints",  # early warnings
    "inputs",  # example inputs as plain data
    "unread",  # blocks whose every reader is dead
    "closing",  # a ticket extended to what hangs on it
    "cutting",  # kept indices, applied to tensors and modules
    "maximising",  # the input that excites a filter most
    "counting",  # multiply-accumulates of one sample
    "widening",  # indices that come again where a unit gets wider
    "costs",  # what a cut leaves, in numbers
    "choosing",  # the closed family of one ranking, and the largest within a budget
    "controls",  # random tickets as sparse as another, layer by layer
    "path",
    "settling",  # when the support has stopped changing
    "adapting",  # how each operation's constants follow
    "rewriting",  # kept indices, applied to the exported program
    "blueprint",  # kept indices as a value: the same cut on a fresh model
    "folding",  # constants of dead channels
    "following",  # the optimizer goes on with the smaller model
    "certifying",  # whether two models compute the same
    "proving",  # numbers before and after
    "witness",  # what the masked model answers, for later
    "candidates",  # one smaller model in several forms
    "compaction",
    "planning",  # the dry run of param_groups
    "measuring",  # members chosen by latency and accuracy
    "planting",  # other widths, and values for what is new
    "growth",  # wider units, the same function
    "exporting",
    "manifest",  # the JSON file of a saved compact model
    "training",
    "registry",  # models that a file may name
    "saving",
    "drawing",  # a run and a wish become a ticket
    "shrinking",  # a run and a ticket become a smaller model
    "auditing",  # every file of a run folder against its checksums
    "reporting",
    "integrations",
    "testing",
    "cli",
    "__main__",
]
NO_TORCH_AT_IMPORT = {
    "storage",
    "columns",
    "folders",
    "sealing",
    "runs",
    "cli",
    "__main__",
    "__init__",
}


def module_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> set[str]:
    """First-level dessilbi modules that this file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = node.module.split(".")
            if parts[0] == "dessilbi":
                names = {alias.name for alias in node.names}
                found |= {parts[1]} if len(parts) > 1 else names - {"__version__"}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "dessilbi":
                    found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


FILES = sorted(SRC.rglob("*.py"))


def test_the_source_tree_is_found():
    assert len(FILES) >= 5


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_only_from_files_above(path):
    module = module_of(path)
    if module == "__init__":
        return
    assert module in ORDER, f"{module} has no place in the order"
    for imported in imports_of(ast.parse(path.read_text())):
        assert imported in ORDER, f"{path.name} imports {imported}, which has no place"
        assert imported == module or ORDER.index(imported) < ORDER.index(module), (
            f"{path.name} imports {imported}, which stands below it"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_relative_imports_are_not_used(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level > 0)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_light_modules_do_not_load_torch_at_import(path):
    if module_of(path) not in NO_TORCH_AT_IMPORT or path.parent.name not in ("dessilbi", "cli"):
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
