# SPDX-License-Identifier: Apache-2.0
"""The table [grow] of a recipe: how a network may grow. Read before torch is loaded."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Width = Annotated[int, Field(ge=2, le=1 << 16)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class GrowRecipe(BaseModel):
    """How widths grow; where a table is allowed it is glob of layer names -> value.

    ``start``: width of each layer at first, in filters or neurons; those that no glob names keep
    theirs for ever. ``every``: epochs between two
    checks. ``share``: a layer with at least this share of its blocks in supp(Gamma) gets wider, to
    max(n + ``step``, floor(``factor`` n)). ``epochs`` of the recipe are those of the final
    training, once no layer has grown or ``max_rounds`` checks are over; the learning rate is
    constant before, after ``warmup`` epochs in which it rises (a narrow net dies easily), and
    follows the schedule in them. ``max_width``, ``max_params`` and
    ``max_macs`` (of one sample) are never exceeded. ``target_accuracy``: growing ends where the
    validation accuracy reaches it. ``prune_after``: blocks that have not entered after so many
    checks are removed, while other layers grow; two stay in every layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    start: Width | dict[str, Width]
    every: Count = 10
    share: Share | dict[str, Share] = 0.8
    step: Count | dict[str, Count] = 4
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.1
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_rounds: Count = 20
    max_width: Width | dict[str, Width] | None = None
    max_params: Count | None = None
    max_macs: Count | None = None
    target_accuracy: Share | None = None
    prune_after: Count | None = None
