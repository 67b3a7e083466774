# SPDX-License-Identifier: Apache-2.0
"""Witness: what the masked model answers to inputs that can be drawn again.

With it a smaller model can be judged later and elsewhere, without the big one.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor, fx, nn

from dessilbi.compaction.certifying import Reference, outputs, wide
from dessilbi.compaction.comparing import COARSE, compare
from dessilbi.compaction.rewriting import widen
from dessilbi.graph.inputs import Arguments, Input, describe, draw
from dessilbi.graph.program import ExampleInputs

PROBES = 2


@dataclass(frozen=True)
class Verdict:
    """How far a model is from what a witness says, in float64.

    ``relative_diff`` is the largest difference of an element over how much it varies with the
    input, see :func:`compare`.
    """

    max_abs_diff: float
    relative_diff: float


@dataclass(frozen=True)
class Witness:
    """Inputs as data, and what the masked model answers in float64.

    Args:
        inputs: What to draw.
        factor: What the values drawn are multiplied by.
        expected: Every tensor of the answer, per probe.
    """

    inputs: tuple[Input, ...]
    factor: float
    expected: Sequence[Sequence[Tensor]]

    @classmethod
    def of(cls, reference: Reference, example_inputs: ExampleInputs) -> "Witness":
        """Keep the first drawn probes that the model could take; the example itself is left out."""
        found = dict(zip(reference.numbers, reference.expected, strict=True))
        numbers = takewhile(found.__contains__, range(1, 1 + PROBES))
        answers = [[x.cpu() for x in found[number]] for number in numbers]
        return cls(describe(example_inputs), reference.factor, answers)

    def probes(self) -> list[Arguments]:
        """Draw the inputs again, in float64."""
        return [wide(probe, self.factor) for probe in draw(self.inputs, len(self.expected))]

    def answered_by(self, model: nn.Module) -> "Witness":
        """Return a witness of ``model`` itself, for the same inputs."""
        return replace(self, expected=self._answers(model))

    def judge(self, model: nn.Module, *, folded: bool = False) -> Verdict:
        """Compare a model, turned to float64, with the answers.

        Args:
            model: The model.
            folded: Whether constants were rounded to the model's own type.

        Raises:
            ValueError: The model does not take the inputs, or there are none.
        """
        if not self.expected:
            raise ValueError(
                "inputs like the examples could not be drawn for the masked model, so there is "
                "nothing to compare: give example inputs whose numbers may stand in any order"
            )
        gap = compare(self.expected, self._answers(model), exact=not folded)
        return Verdict(gap.largest, gap.relative)

    def _answers(self, model: nn.Module) -> list[list[Tensor]]:
        double = copy.deepcopy(model).cpu()
        double = widen(double) if isinstance(double, fx.GraphModule) else double.double()
        try:
            return outputs(double, self.probes())
        except Exception as error:  # a forward may fail in any way
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{type(model).__name__} does not run on the inputs that were described "
                f"({reason}): give the model that was compacted"
            ) from None


def tolerance(model: nn.Module, *, exact: float, folded: bool) -> float:
    """Return the relative difference to accept.

    A cut copies numbers, so only rounding in float64 remains. Constants that were folded were
    rounded to the model's own type. Types with few digits are not let off: a quarter of what is
    typical of an output is a difference in any of them.
    """
    if not folded:
        return exact
    types = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return max([exact, *(min(0.25 / COARSE, 1e3 * torch.finfo(dtype).eps) for dtype in types)])
