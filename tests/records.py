# SPDX-License-Identifier: Apache-2.0
"""Records made up for tables and figures: nothing is trained, every number is fixed."""

from pathlib import Path
from types import SimpleNamespace

import torch

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.compaction.proving import Proof
from dessilbi.cuts.costs import Cost
from dessilbi.files.runs import Run
from dessilbi.files.storage import write_json
from dessilbi.outcomes.tickets import Drawn
from dessilbi.path.history import History
from dessilbi.path.lines import Point
from dessilbi.planning import Plan
from dessilbi.planning.values import PlannedTensor, PlannedUnit
from dessilbi.reporting.filters import Filter, Filters
from dessilbi.training.curve import CurvePoint
from dessilbi.training.studying import Row as RetrainedRow

SHAPES = {"conv1.weight": (4, 1, 3, 3), "conv2.weight": (8, 4, 3, 3), "fc.weight": (10, 8)}
NUM_POINTS = 30


def make_run(folder, names=tuple(SHAPES), recipe="golden"):
    """Write recipe and path of a run: blocks enter one after the other, one leaves again."""
    run = Run(Path(folder))
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.recipe, {"name": recipe})
    filters = (1, None, None, None)
    specs = {
        name: TensorSpec(shape, filters if len(shape) == 4 else (1, 1))
        for name, shape in zip(names, [*SHAPES.values()] * (len(names) // 3 + 1), strict=False)
    }
    history = History(specs, {}, run.path)
    for k in range(1, NUM_POINTS + 1):
        masks = {
            name: (torch.arange(spec.num_blocks) < (k - 3) * spec.num_blocks / 40).reshape(
                spec.grid
            )
            for name, spec in specs.items()
        }
        if k > 25:
            masks[names[0]][0] = False
        ticket = Ticket(masks, specs)
        history.add(Point(10 * k, k / 5, ticket.density), ticket)
        facts = {"epoch": k / 10, "loss": 2 / k}
        if k % 3 == 0:
            facts |= {"accuracy": 1 - 0.9**k, "ticket_accuracy": 1 - 0.93**k}
            facts |= {"gamma_accuracy": 1 - 0.96**k, "val_accuracy": 1 - 0.91**k}
            facts |= {"val_ticket_accuracy": 1 - 0.94**k}
        history.log(facts)
    return run


def some_ticket(density=0.5):
    """A ticket of one tensor."""
    kept = torch.arange(100) < 100 * density
    return Ticket({"fc.weight": kept[:, None]}, {"fc.weight": TensorSpec((100, 8), (1, None))})


def members(scale=1):
    """A family of tickets and what they cost."""
    return [
        Drawn(
            some_ticket(d),
            Cost(int(d * scale * 61706), int(d * scale * 246824), int(d * scale * 416520)),
            "",
            a,
        )
        for d, a in ((0.02, 0.31), (0.1, 0.925), (0.5, None), (1.0, 0.991))
    ]


def studied(scale=1):
    """A ticket and its controls, trained again."""
    modes = ("finetune", "rewind", "early-rewind", "reinit", "random", "dense")
    return [
        RetrainedRow(
            m,
            3,
            1.0 if m == "dense" else 0.1,
            0.11,
            61706 * scale,
            0.5 if m == "finetune" else None,
            0.97 - k / 100,
            None if m == "dense" else 0.0012,
            0.96 - k / 100,
            160,
        )
        for k, m in enumerate(modes)
    ]


def curve():
    """A layer pruned by 10, 50 and 90 %."""
    return [
        CurvePoint(
            order, share, 1 - share, 0.99 - share * loss, None if order == "random" else 0.98
        )
        for order, loss in (("entry", 0.1), ("magnitude", 0.2), ("random", 0.9))
        for share in (0.1, 0.5, 0.9)
    ]


def rounds(names=("conv1", "conv2", "fc1")):
    """The sizes of a network that grew."""
    return [
        {
            "epoch": epoch,
            "sizes": dict.fromkeys(names, width + 4 * epoch),
            "params": 1000 * width,
            "macs": 123456 * width,
            "accuracy": None if epoch == 0 else 0.9 + width / 1000,
            "training_macs": 10**12 * (epoch + 1),
        }
        for epoch, width in ((0, 4), (2, 8), (4, 12), (14, 12))
    ]


def proof(name="conv1.weight"):
    """What a compaction did."""
    return Proof(
        *(61706, 21706, 246824, 86824, 416520, 150000, 3.1e-6, 2.2e-16, 2, 40, 38),
        revived={name: 1},
        kept_zero={f"{name}.b": 1},
        form="module",
        sparse_bytes=80000,
        notes=(f"{name} keeps one filter that is zero, for its reader needs a channel to read",),
        latency_ms_before=(1.25, 0.1),
        latency_ms_after=(0.75, 0.05),
    )


def shrunk():
    """A masked net and its smaller twin."""
    compacted = SimpleNamespace(proof=proof(), closed=some_ticket(0.25))
    return SimpleNamespace(
        compacted=compacted, accuracy_before=0.97, accuracy_after=0.97, same=360, total=360
    )


def plan(name="conv1.weight"):
    """Two units and two tensors."""
    return Plan(
        *("LeNet", 61706, 416520, 50000, 300000, 61000),
        units=(
            PlannedUnit(
                name=name,
                kind="filter",
                removal="whole",
                why="",
                num_blocks=6,
                producers=(name,),
                followers=(),
                consumers=("conv2.weight",),
                parameters=2556,
                parameters_per_block=426,
                macs=117600,
                macs_per_block=19600,
            ),
            PlannedUnit(
                name="fc1.weight",
                kind="neuron",
                removal="apart",
                why="single weights are selected, not neurons",
                num_blocks=84,
                producers=("fc1.weight", f"{name}.twin"),
                followers=(),
                consumers=("fc2.weight",),
                parameters=11004,
                parameters_per_block=131,
                macs=10920,
                macs_per_block=130,
                notes=("a reader of it needs at least one",),
            ),
        ),
        tensors=(
            PlannedTensor(name, 150, "filter", name, ""),
            PlannedTensor("norm.weight", 6, None, None, "norms have no structure"),
            PlannedTensor(f"{name}.bias", 6, None, None, "biases have no structure"),
        ),
    )


def filters(layer="conv2", recipe="golden"):
    """Filters of which 25 have entered."""
    found = tuple(
        Filter(
            7 * i % 31,
            10 * i if i < 25 else None,
            i / 4 if i < 25 else None,
            i != 3,
            -i / 7,
            i / 3,
            torch.zeros(1),
        )
        for i in range(31)
    )
    return Filters(Path("run"), recipe, layer, "maximised", found, 31, 25, False)
