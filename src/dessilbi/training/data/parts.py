# SPDX-License-Identifier: Apache-2.0
"""What loading is asked for and what it gives: a data set in three parts."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dessilbi.training.feeding import Split
from dessilbi.training.recipes import RecipeError


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, its training part cut into training and validation.

    Attributes:
        name: What a recipe calls it.
        train: To train with.
        validation: To choose settings and tickets with.
        test: To report with, once.
        num_classes: Targets are 0 ... num_classes - 1.
        in_channels: Channels of the images; None where the inputs are no images.
        side: Pixels of a side of them.
        length: Characters of a text sample; None where the inputs are no text.
        vocabulary: The characters that the classes of a text stand for; else empty.
        root: The data folder that was given and needed; None where no files are read.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    in_channels: int | None = None
    side: int | None = None
    length: int | None = None
    vocabulary: str = ""
    root: str | None = None

    def blank(self, count: int = 1) -> Tensor:
        """Return ``count`` empty inputs in the shape of the samples, on the CPU."""
        if self.length is not None:
            return torch.zeros(count, self.length, dtype=torch.int64)
        assert self.in_channels is not None
        assert self.side is not None
        return torch.zeros(count, self.in_channels, self.side, self.side)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked of a data set; see :func:`dessilbi.training.data.load_data`."""

    name: str
    root: str | Path | None
    validation: int
    seed: int
    download: bool = False
    normalise: bool = True
    augment: bool = True
    image_size: int | None = None
    length: int | None = None
    workers: int = 0

    def refuse(self, field: str, because: str) -> None:
        """Raise where ``field`` is set although it means nothing here.

        Raises:
            RecipeError: It is.
        """
        value = getattr(self, field)
        if value is not None:
            raise RecipeError(
                f"{field}={value} does not apply to {self.name}, {because}: leave it out"
            )

    def divided(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the validation part and of the rest of ``count`` samples.

        The seed draws them; each is ascending.

        Raises:
            RecipeError: One of them would be empty.
        """
        self.check_validation(count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return order[: self.validation].sort().values, order[self.validation :].sort().values

    def check_validation(self, count: int) -> None:
        """Refuse a validation part that leaves nothing on one side of ``count`` samples.

        Raises:
            RecipeError: It does.
        """
        if not 1 <= self.validation <= count - 1:
            raise RecipeError(
                f"a validation split of {self.validation} samples does not fit {self.name}, which "
                f"has {count} to train with: give a number from 1 to {count - 1}"
            )
