# SPDX-License-Identifier: Apache-2.0
"""Frames: the models along a path, as a slider shows them and as a command extracts them.

The model of a point is all that had entered Gamma by its step, closed: what ``dessilbi ticket
--step`` writes. Its parameters and MACs are those of the compacted model.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dessilbi.blocks.structure import block_norms
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.cuts.closing import closed_and_settled
from dessilbi.cuts.costs import Cost, CostModel
from dessilbi.files.storage import told_by
from dessilbi.graph import Graph, read_graph
from dessilbi.outcomes.tickets import shape_of
from dessilbi.reporting.evidence import Evidence
from dessilbi.reporting.summary import Row, thinned
from dessilbi.training.finetune import sizes_of
from dessilbi.training.recipes import validate_recipe
from dessilbi.training.starting import built, load_start

MOST = 60  # positions of the slider


@dataclass(frozen=True)
class Frame:
    """One position: the recorded point, and the model that can be extracted there.

    Attributes:
        row: What was recorded.
        alive: Tensor -> blocks of the model that live.
        density: Of its ticket, as ``dessilbi ticket`` tells it.
        cost: Of its compacted model; None where it could not be worked out.
        commands: What to paste, line by line; none where nothing had entered yet.
    """

    row: Row
    alive: Mapping[str, int]
    density: float
    cost: Cost | None
    commands: Sequence[str]


@dataclass(frozen=True)
class Frames:
    """The positions of a run's slider.

    Attributes:
        frames: In the order of their steps.
        totals: Tensor -> number of its blocks.
        dense: Cost of the whole model, where known.
        recorded: How many points the path has; the frames are as many or fewer.
        why_not: Why costs are unknown; empty where they are known.
    """

    frames: Sequence[Frame]
    totals: Mapping[str, int]
    dense: Cost | None
    recorded: int
    why_not: str


def frames_of(found: Evidence, most: int = MOST) -> Frames:
    """Return the positions of a slider; the model is made from the recipe, its data not looked at.

    Args:
        found: The run.
        most: How many at most; they are spread evenly, with the first and the last.
    """
    if found.path is None or not found.rows:
        return Frames((), {}, None, 0, "")
    graph, costs, why_not = _opened(found)
    rows = thinned(found.rows, most)
    frames = [_frame(found, row, graph, costs) for row in rows]
    totals = {name: spec.num_blocks for name, spec in found.path.specs.items()}
    return Frames(frames, totals, costs.dense if costs else None, len(found.rows), why_not)


def _opened(found: Evidence) -> tuple[Graph | None, CostModel | None, str]:
    """The graph of the run's model, or why it cannot be had."""
    if found.own_loop:  # said once, among what is missing
        return None, None, ""
    try:
        recipe = validate_recipe(dict(found.recipe), origin=str(found.run.recipe))
        if recipe.grow is not None and not found.run.model.is_file():
            raise ValueError("its network has not finished to grow")
        data = shape_of(recipe)
        model = built(recipe, data, load_start(found.run), sizes_of(found.run))
        assert found.path is not None
        found.path.support(step=found.rows[0].step).density_of_model(model)  # checks the names
        graph = read_graph(model, data.blank())
        return graph, CostModel(graph, model), ""
    except Exception as error:  # whatever an own or newer model does when it is read
        return None, None, told_by(error)


def _frame(found: Evidence, row: Row, graph: Graph | None, costs: CostModel | None) -> Frame:
    assert found.path is not None
    ticket = found.path.ticket(step=row.step)
    empty = not ticket.kept_elements
    cost = None
    if graph is not None and costs is not None and not empty:
        ticket, settled = closed_and_settled(graph, ticket)
        cost = costs.after(settled.gone)
    alive = {name: _alive(ticket, name, spec) for name, spec in found.path.specs.items()}
    return Frame(row, alive, ticket.density, cost, () if empty else _extracting(found, row.step))


def _alive(ticket: Ticket, name: str, spec: TensorSpec) -> int:
    """Count the path's blocks of which anything lives; a closed ticket has finer ones."""
    if ticket.specs[name] == spec:
        return int(ticket[name].sum())
    return int((block_norms(ticket.mask_of(name).float(), spec.block) > 0).sum())


def _extracting(found: Evidence, step: int) -> tuple[str, ...]:
    if found.own_loop:
        return (f"dessilbi.Path.load({str(found.run.folder)!r}).ticket(step={step})",)
    return commands(found, step)


def commands(found: Evidence, step: int) -> tuple[str, ...]:
    """Return the lines that write the ticket of a step and the compacted model of it."""
    folder = shlex.quote(str(found.run.folder))
    file = shlex.quote(f"{found.run.folder.absolute().name}-step-{step}.safetensors")
    taken = f"dessilbi ticket {folder} --step {step} --out {file}"
    return taken, f"dessilbi compact {folder} --ticket {file}"
