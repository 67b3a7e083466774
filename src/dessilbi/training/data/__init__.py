# SPDX-License-Identifier: Apache-2.0
"""Data sets by name, each cut into training, validation and test parts.

A name is one of ``DATA_SETS``, "imagenet", "tinyshakespeare", "folder" or "folder:NAME" (images of
one's own), "text:FILE", or "generated:SET" (made up, in the shape of any of these).
"""

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch

from dessilbi.training.data.folders import DEFAULT_SIZE, MEAN, STD, load_folder
from dessilbi.training.data.generated import chatter
from dessilbi.training.data.image_sets import DATA_SETS, DataSet, load_image_set, made_up
from dessilbi.training.data.parts import Data, Wish
from dessilbi.training.data.text import DEFAULT_LENGTH, load_text, read_text
from dessilbi.training.feeding import Split
from dessilbi.training.recipes import RecipeError

__all__ = ["DATA_SETS", "TEXTS", "Data", "DataSet", "Split", "load_data", "read_text"]

TEXTS = {"tinyshakespeare": "tinyshakespeare/input.txt"}
MOST = 1_000_000  # samples that are made up
FOLDERS = {"imagenet": ("imagenet", 1000)}  # folder and number of classes


def load_data(
    name: str,
    *,
    root: str | Path | None,
    validation: int,
    seed: int,
    download: bool = False,
    normalise: bool = True,
    augment: bool = True,
    image_size: int | None = None,
    length: int | None = None,
    workers: int = 0,
) -> Data:
    """Load a data set: small images and texts into memory, folders of images as a list of files.

    Args:
        name: See the head of this file. "digits", "synthetic-mnist" and "generated:SET" need no
            files and ignore ``root`` and ``download``.
        root: The data folder, laid out as torchvision does (``MNIST/raw/...``).
        validation: How many training samples are set apart for validation.
        seed: Decides which; both parts keep the order of the set. Texts are cut by position.
        download: Fetch missing files, with torchvision.
        normalise: Shift and scale pixels by the set's mean and deviation; else they lie in [0, 1].
        augment: Crop and flip training images at random, where the set's recipes do.
        image_size: Pixels of a side, for folders.
        length: Characters of a sample, for texts.
        workers: Processes that decode images, for folders.

    Raises:
        RecipeError: The name is unknown, or a wish does not fit the set.
        ValueError: ``root`` is None but needed, or a file is damaged.
        FileNotFoundError: Files are missing and ``download`` is False.
        ImportError: torchvision is needed and not installed.
        OSError: The download failed.

    >>> data = load_data("digits", root=None, validation=237, seed=0)
    >>> len(data.train), len(data.validation), len(data.test)
    (1200, 237, 360)
    """
    wish = Wish(
        name=name,
        root=root,
        validation=validation,
        seed=seed,
        download=download,
        normalise=normalise,
        augment=augment,
        image_size=image_size,
        length=length,
        workers=workers,
    )
    with torch.device("cpu"):
        data = _loaded(wish)
    made_up = name.startswith("generated:")
    needs_files = DATA_SETS[name].needs_files if name in DATA_SETS else not made_up
    return replace(data, root=str(root)) if needs_files and root is not None else data


def _loaded(wish: Wish) -> Data:
    name, root = wish.name, wish.root
    kind, _, rest = name.partition(":")
    if name in DATA_SETS:
        return load_image_set(DATA_SETS[name], wish)
    if name in TEXTS:
        return load_text(read_text(root, TEXTS[name], name=name), wish)
    if name in FOLDERS:
        return _checked(load_folder(FOLDERS[name][0], wish), FOLDERS[name][1])
    if kind == "folder":
        return load_folder(rest, wish)
    if kind == "text" and rest:
        return load_text(read_text(root, rest, name=name), wish)
    if kind == "generated" and rest:
        return _load_generated(rest, wish)
    raise _unknown(name)


def _unknown(name: str) -> RecipeError:
    known = [*DATA_SETS, *FOLDERS, *TEXTS]
    close = get_close_matches(name, known, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return RecipeError(
        f"data={name!r} is not known: use one of {', '.join(known)}, folder, folder:NAME, "
        f"text:FILE or generated:SET{meant}"
    )


def _checked(data: Data, num_classes: int) -> Data:
    if data.num_classes != num_classes:
        raise ValueError(
            f"{data.name} has {num_classes} classes, and {data.num_classes} folders of classes "
            f"are there: put the missing ones there, or use data=folder:{data.name}"
        )
    return data


def _load_generated(rest: str, wish: Wish) -> Data:
    """Load "SET" or "SET:COUNT": made up samples in the shape of a set, COUNT of them to train."""
    name, _, told = rest.partition(":")
    if told and not (told.isdecimal() and int(told)):
        raise RecipeError(f"data={wish.name!r} does not end in a number of samples of 1 or more")
    count = int(told or 500) if len(told) < 10 else MOST + 1
    if count > MOST:
        raise RecipeError(f"data={wish.name!r} asks for too many samples: give at most {MOST:,}")
    if name in TEXTS or name == "text":
        length = wish.length or DEFAULT_LENGTH
        return load_text(chatter(-(-(count * length + 2) * 10 // 9)), wish)
    if name in DATA_SETS:
        known = DATA_SETS[name]
        read = made_up(count, known.side, known.in_channels, known.num_classes)
        return load_image_set(replace(known, read=read), wish)
    if name not in FOLDERS and name != "folder":
        raise _unknown(name)
    side = wish.image_size or DEFAULT_SIZE
    num_classes = FOLDERS[name][1] if name in FOLDERS else 10
    read = made_up(count, side, 3, num_classes)
    source = DataSet(read, MEAN, STD, num_classes, in_channels=3, side=side)
    return load_image_set(source, replace(wish, image_size=None))
