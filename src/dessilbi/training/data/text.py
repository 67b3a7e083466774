# SPDX-License-Identifier: Apache-2.0
"""Text files as sequences of characters: each character is to be told from those before it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dessilbi.training.data.fetching import folder_of, inside
from dessilbi.training.data.parts import Data, Wish
from dessilbi.training.feeding import Draw, OnDevice, Split
from dessilbi.training.recipes import RecipeError

DEFAULT_LENGTH = 128


class Characters:
    """Samples of ``length`` characters, one after the other through a text.

    A shuffled batch shifts each sample by up to ``length`` - 1 characters, so that in time every
    place begins one. In order they stand where they are.

    Args:
        codes: The text, one number per character, (N,).
        length: Characters of a sample; targets are the same shifted by one.
    """

    def __init__(self, codes: Tensor, length: int) -> None:
        self._codes = OnDevice(codes)
        self._size = len(codes)
        self._length = length

    def __len__(self) -> int:
        return (self._size - 1) // self._length

    def read(self, plan: Iterable[Draw], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield int64 (n, length) inputs and targets; see ``feeding.Source``."""
        (codes,) = self._codes(device)
        offsets = torch.arange(self._length + 1, device=device)
        for draw in plan:
            begin = draw.indices * self._length
            if draw.seed is not None:
                shift = torch.randint(self._length, (draw.size,), generator=draw.generator())
                begin = (begin + shift[draw.share]).clamp(max=self._size - self._length - 1)
            found = codes[begin.to(device)[:, None] + offsets].to(torch.int64)
            yield found[:, :-1].contiguous(), found[:, 1:].contiguous()


def read_text(root: str | Path | None, file: str, *, name: str) -> str:
    """Return the text in ``file`` of the data folder.

    Args:
        root: The data folder.
        file: UTF-8; a place in it.
        name: How error messages call the set.

    Raises:
        ValueError: ``root`` is None, ``file`` leads out of it, or is not UTF-8.
        FileNotFoundError: It is not there.
    """
    path = inside(folder_of(root, name=name, listed=file), file, name=name)
    if not path.is_file():
        raise FileNotFoundError(f"{name} needs the text file {path}: put it there")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it") from None


def load_text(text: str, wish: Wish) -> Data:
    """Cut a text by position: the last tenth for testing, before it validation, the rest to train.

    ``wish.validation`` counts samples of ``wish.length`` characters. No character is in two parts.

    Raises:
        RecipeError: A part would be empty.
        ValueError: The text has fewer than 2 different characters.
    """
    wish.refuse("image_size", "which is no images")
    length = wish.length or DEFAULT_LENGTH
    found, places = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_inverse=True)
    if len(found) < 2:
        raise ValueError(f"{wish.name} has {len(found)} different characters: give a longer text")
    codes = torch.from_numpy(places.astype(np.int32))
    rest, test = codes[: -(len(codes) // 10)], codes[-(len(codes) // 10) :]
    samples = (len(rest) - 2) // length
    if samples < 2 or len(test) <= length:
        raise RecipeError(
            f"{wish.name} has {len(text)} characters, too few for samples of {length}: "
            f"give length={max(1, len(text) // 40)} or less"
        )
    wish.check_validation(samples)
    cut = len(rest) - (wish.validation * length + 1)
    parts = (Characters(part, length) for part in (rest[:cut], rest[cut:], test))
    train, validation, tested = map(Split, parts)
    return Data(
        name=wish.name,
        train=train,
        validation=validation,
        test=tested,
        num_classes=len(found),
        length=length,
        vocabulary="".join(map(chr, found)),
    )
