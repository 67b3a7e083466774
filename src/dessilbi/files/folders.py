# SPDX-License-Identifier: Apache-2.0
"""Folders: what a path is where a folder of another kind was expected (no torch here)."""

from pathlib import Path

RECIPE, PATH, STUDY, MANIFEST = "recipe.json", "path.jsonl", "study.json", "manifest.json"


def kind_of(folder: str | Path, wanted: str) -> str:
    """Return what a path is, for the sentence that says that it has no file ``wanted``.

    >>> kind_of("nowhere", RECIPE)
    'it does not exist'
    """
    folder = Path(folder)
    if not folder.exists():
        return "it does not exist"
    if not folder.is_dir():
        return "it is a file"
    if wanted != MANIFEST and (folder / MANIFEST).is_file():
        return "it is a smaller model, for `dessilbi export` and `dessilbi verify`"
    if wanted != STUDY and (folder / STUDY).is_file():
        return f"it is a retraining: it has no {wanted} but a run in each of its folders"
    if not (folder / RECIPE).is_file():
        return f"it has no {wanted}"
    if wanted == PATH:
        return f"it has no {PATH}, for nothing in it was to become sparse, as in a retraining"
    return f"it is a run folder and has no {wanted}"
