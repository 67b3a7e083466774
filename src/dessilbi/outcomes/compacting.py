# SPDX-License-Identifier: Apache-2.0
"""Shrinking: a run and a ticket become a smaller model in a folder, judged against the masked net.

The masked net is the one that training judges: dead blocks at zero, BatchNorm statistics estimated
again.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from dessilbi.blocks.ticket import Ticket
from dessilbi.compaction.compaction import Compacted, compact
from dessilbi.compaction.proving import measure_latency
from dessilbi.compaction.witness import Verdict
from dessilbi.cuts.closing import close
from dessilbi.exporting import export, open_session, run_session
from dessilbi.files.runs import Run
from dessilbi.files.storage import sha256_of
from dessilbi.graph.inputs import Arguments
from dessilbi.graph.program import evaluating
from dessilbi.models.registry import WIDTHS
from dessilbi.saving.saving import Opened, save_compact
from dessilbi.training.evaluation import masked
from dessilbi.training.feeding import Split
from dessilbi.training.finetune import Trained, sizes_of

ESTIMATED = 1e-4  # relative; statistics estimated again on another machine are rounded differently
_BATCH = 500


@dataclass(frozen=True)
class Shrunk:
    """A masked net, its smaller twin, and how both do on the test split.

    ``same`` of ``total`` predictions are identical; accuracies are fractions.
    """

    masked: nn.Module
    compacted: Compacted
    accuracy_before: float
    accuracy_after: float
    same: int
    total: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values: the proof, accuracies and identical predictions."""
        return {
            **self.compacted.proof.to_json(),
            "density": self.compacted.closed.density,
            "density_of_model": self.compacted.closed.density_of_model(self.masked),
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            "same_predictions": self.same,
            "predictions": self.total,
        }


def shrink(
    trained: Trained, ticket: Ticket, *, multiple_of: int = 1, latency_repeats: int = 50
) -> Shrunk:
    """Close a ticket of a run, mask the model, and compact it.

    Args:
        trained: The run, loaded again.
        ticket: Any ticket of it.
        multiple_of: Round widths up to a multiple.
        latency_repeats: Measure latency at batch 1 with so many runs.

    Raises:
        ValueError: The ticket is of another model, or no exact compaction was found.
    """
    example = example_of(trained)
    closed = close(ticket, trained.model, example_inputs=example)
    big = masked(trained.model, closed, trained.data.train)
    compacted = compact(
        big,
        closed,
        example_inputs=example,
        multiple_of=multiple_of,
        latency_repeats=latency_repeats,
    )
    return Shrunk(big, compacted, **_compared(big, compacted.model, trained.data.test))


def example_of(trained: Trained) -> Tensor:
    """Return the first training sample as a batch of one."""
    return trained.data.train.examples(1)[0]


@torch.no_grad()
def _compared(one: nn.Module, other: nn.Module, split: Split) -> dict[str, Any]:
    """Return how often two models are right and how often they say the same; modes are kept."""
    right, same, total = [0, 0], 0, 0
    with evaluating(one), evaluating(other):
        for inputs, targets in split.in_order(_BATCH):
            answers = [model(inputs).argmax(-1) for model in (one, other)]
            right = [n + int((a == targets).sum()) for n, a in zip(right, answers, strict=True)]
            same += int((answers[0] == answers[1]).sum())
            total += targets.numel()
    shares = {"accuracy_before": right[0] / total, "accuracy_after": right[1] / total}
    return {**shares, "same": same, "total": total}


def save_shrunk(
    shrunk: Shrunk, folder: FilePath, run: Run, trained: Trained, *, fine_tuned: bool = False
) -> FilePath:
    """Save the smaller model with the registered name of its factory and where it came from.

    Args:
        shrunk: What to save.
        folder: A new folder.
        run: The run.
        trained: The run, loaded again.
        fine_tuned: Whether the weights were trained further than the run's.
    """
    model, data = trained.recipe.model, trained.data
    told: dict[str, Any] = {"num_classes": data.num_classes, "in_channels": data.in_channels}
    if ":" in model:
        told |= {"side": data.side}
    if (sizes := sizes_of(run)) is not None:
        told |= {WIDTHS: " ".join(f"{unit}={width}" for unit, width in sizes.items())}
        told |= {"side": data.side}
    if data.length is not None:
        told |= {"length": data.length}
    compacted, start = shrunk.compacted, trained.start
    if start is not None and start.blueprint is not None:  # one cut, from the recipe's own model
        whole = start.blueprint.then(compacted.blueprint)
        compacted = replace(compacted, blueprint=whole)
    return save_compact(
        compacted,
        folder,
        factory=f"dessilbi:{model}",
        options={name: value for name, value in told.items() if value is not None},
        source={
            "run": str(run.folder),
            "run_model_sha256": sha256_of(run.model),
            "recipe": trained.recipe.name,
            "fine_tuned": fine_tuned,
            "density": shrunk.compacted.closed.density,
            "accuracy_before": shrunk.accuracy_before,
            "accuracy_after": shrunk.accuracy_after,
        },
    )


def recheck(opened: Opened, run: Run, trained: Trained) -> tuple[Verdict, float]:
    """Compare a saved model with the masked net made again from its run.

    Returns:
        How far they are apart, and the relative difference to accept.

    Raises:
        ValueError: The model was not made from this run.
    """
    if opened.manifest.source.get("fine_tuned"):
        raise ValueError(
            f"{opened.folder} was fine-tuned, so its run alone cannot make it again: verify it "
            f"without --run"
        )
    if sha256_of(run.model) != opened.manifest.source.get("run_model_sha256"):
        raise ValueError(
            f"{opened.folder} was not made from {run.folder} as it is now (another "
            f"{run.model.name}): name the run it came from"
        )
    big = masked(trained.model, opened.ticket, trained.data.train)
    estimated = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in big.modules())
    folded = estimated or opened.manifest.folded
    verdict = opened.witness.answered_by(big).judge(opened.model, folded=folded)
    return verdict, max(opened.tolerance, ESTIMATED if estimated else 0.0)


@dataclass(frozen=True)
class Shipped:
    """ONNX files of a masked net and of its smaller twin: bytes and milliseconds at batch 1.

    The masked net's file is only measured, not kept.
    """

    file: FilePath
    bytes_before: int
    bytes_after: int
    latency_ms_before: float
    latency_ms_after: float


def shipped(shrunk: Shrunk, file: FilePath, example: Tensor, *, repeats: int = 200) -> Shipped:
    """Export both nets and measure them in onnxruntime, one after the other.

    Raises:
        ImportError: A package of the extra ``export`` is missing.
        ValueError: A net cannot be exported.
    """
    sizes, times = [], []
    with tempfile.TemporaryDirectory() as folder:
        for model, place in (
            (shrunk.masked, FilePath(folder) / "masked.onnx"),
            (shrunk.compacted.model, file),
        ):
            sizes.append(export(model, place, example_inputs=example).bytes)
            session = open_session(place)
            arguments: Arguments = (example,), {}
            run = partial(run_session, session)
            times.append(measure_latency(run, ((arguments,), {}), repeats)[0])
            del session
    return Shipped(file, *sizes, *times)
