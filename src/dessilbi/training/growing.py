# SPDX-License-Identifier: Apache-2.0
"""Growing: a run whose network changes its size between epochs, and what each size was worth.

At the end of every few epochs the support says which layers need more; what never entered may go.
The optimizer, the path and all logs go on. A checkpoint holds the widths, so that the rest of a run
is the same to the bit however often it is cut.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.compaction.compaction import compact
from dessilbi.cuts.closing import close_on, dead_blocks
from dessilbi.graph import Graph, couplings, read_graph
from dessilbi.growth.growth import Grown, grow_on, macs_of
from dessilbi.growth.planting import Plant
from dessilbi.growth.widening import Change, takes_of, widths_of
from dessilbi.optimizers.optimizer import DessiLBI
from dessilbi.path.history import NEVER, History
from dessilbi.path.path import Path
from dessilbi.training.engine import Engine
from dessilbi.training.growth_table import GrowRecipe
from dessilbi.training.ingredients import init_of, model_of
from dessilbi.training.setting import Setting, setting_with
from dessilbi.training.widths import plain, wanted, within

TRAINING = 3  # a training step costs about as much as so many forward passes
FEWEST = 2  # blocks that stay in every unit: one alone could not be told from the layer


@dataclass
class Extent:
    """How far a network has grown.

    Attributes:
        sizes: Unit -> width.
        params: Parameters.
        macs: Multiply-accumulates of one sample.
        since: Step at which it got this size.
        spent: Multiply-accumulates of the training up to there.
        rounds: Checks that are over.
        final_from: Step at which the final training began; None: it still grows.
    """

    sizes: dict[str, int]
    params: int
    macs: int
    since: int = 0
    spent: int = 0
    rounds: int = 0
    final_from: int | None = None


class Growing:
    """Changes the sizes of a network between epochs, by the rule of its recipe.

    Args:
        setting: The run's, at its start.
        engine: The run's.
    """

    def __init__(self, setting: Setting, engine: Engine):
        assert setting.recipe.grow is not None
        self.options: GrowRecipe = setting.recipe.grow
        self.engine = engine
        self.example = setting.data.blank(2).to(engine.device)
        graph = read_graph(setting.model, self.example)
        macs = macs_of(setting.model, ((self.example,), {}))
        params = sum(p.numel() for p in setting.model.parameters())
        self.extent = Extent(widths_of(graph), params, macs)

    def is_due(self, epoch: int) -> bool:
        """Whether the network is looked at after so many epochs."""
        return self.extent.final_from is None and epoch % self.options.every == 0

    def spent(self, setting: Setting, step: int) -> int:
        """Return the multiply-accumulates of the training so far, all sizes counted."""
        here = self.extent
        samples = (step - here.since) * setting.recipe.batch_size
        return here.spent + TRAINING * here.macs * samples

    def start(self) -> dict[str, Any]:
        """Return the line that tells of the sizes at the start."""
        return self._line(0, 0, self.extent.spent)

    def check(
        self, setting: Setting, path: Path, *, epoch: int, accuracy: float
    ) -> tuple[Setting, dict[str, Any]]:
        """Look at the support; prune and widen what the rule says.

        Args:
            setting: The run's; what is replaced in it comes back in a new one.
            path: It goes on with the new sizes.
            epoch: Epochs that are over.
            accuracy: On the validation split, at this moment.

        Returns:
            The setting to go on with, and what to write down.
        """
        step, here = path.step, self.extent
        here.spent, here.since = self.spent(setting, step), step
        here.rounds += 1
        facts: dict[str, Any] = {"accuracy": accuracy, "max_abs_diff": 0.0}
        model = setting.model
        graph = read_graph(model, self.example)
        facts["shares"] = plain(shares_of(graph, setting.optimizer.support()))
        done = self.options.target_accuracy is not None and accuracy >= self.options.target_accuracy
        if not done and self.options.prune_after is not None:
            setting, graph, facts["pruned"] = self._prune(setting, graph, path)
        shares = shares_of(graph, setting.optimizer.support())
        widths = {} if done else wanted(graph, self.options, shares)
        change = None
        if widths:
            change = within(graph, setting.model, self.options, widths, macs=self._macs(setting))
        if change is not None:
            setting, grown = self._grow(setting, graph, change, path)
            facts["max_abs_diff"] = grown.proof.max_abs_diff
            facts["grown"] = plain({n: list(w) for n, w in grown.proof.grown.items()})
            graph = read_graph(setting.model, self.example)
        here.sizes = widths_of(graph)
        here.params = sum(p.numel() for p in setting.model.parameters())
        here.macs = self._macs(setting)
        if change is None or here.rounds >= self.options.max_rounds:
            here.final_from = step
            setting = replace(setting, final_from=step)
        return setting, self._line(epoch, step, here.spent) | facts

    def _macs(self, setting: Setting) -> int:
        return macs_of(setting.model, ((self.example,), {}))

    def finish(self, setting: Setting, *, epoch: int, step: int, accuracy: float) -> dict[str, Any]:
        """Return the line that tells of the end."""
        spent = self.spent(setting, step)
        return self._line(epoch, step, spent) | {"accuracy": accuracy, "finished": True}

    def _line(self, epoch: int, step: int, spent: int) -> dict[str, Any]:
        here = self.extent
        return {
            "epoch": epoch,
            "step": step,
            "sizes": plain(here.sizes),
            "units": dict(here.sizes),
            "params": here.params,
            "macs": here.macs,
            "accuracy": None,
            "max_abs_diff": 0.0,
            "training_macs": spent,
            "final": here.final_from is not None,
        }

    def _grow(
        self, setting: Setting, graph: Graph, change: Change, path: Path
    ) -> tuple[Setting, Grown]:
        recipe = setting.recipe
        # Each time others, and the same ones however often the run is cut.
        seed = int(np.random.SeedSequence((recipe.seed, path.step)).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            grown = grow_on(
                graph,
                setting.model,
                change,
                example_inputs=self.example,
                optimizer=setting.optimizer,
                plant=Plant(fresh=False, init=init_of(setting.model), seed=seed),
            )
        grown.follow_path(path)
        return self._with(setting, grown.model, grown.optimizer), grown

    def _with(self, setting: Setting, model: nn.Module, optimizer: Any) -> Setting:
        model.train(setting.model.training)
        if setting.steering is not None:
            setting.steering.follow(optimizer)
        return replace(
            setting,
            model=model,
            module=self.engine.place(model, compiled=setting.recipe.compile),
            optimizer=cast("DessiLBI", optimizer),
            stepper=self.engine.adopt(optimizer),
        )

    def _prune(
        self, setting: Setting, graph: Graph, path: Path
    ) -> tuple[Setting, Graph, dict[str, int]]:
        """Remove blocks that had time enough and have never entered."""
        age = (self.options.prune_after or 0) * self.options.every * setting.steps_per_epoch
        ticket = idle(graph, path.history, path.step - age)
        if ticket is None:
            return setting, graph, {}
        closed = close_on(graph, ticket)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the Path that watches")  # it comes along
            small = compact(
                setting.model, closed, example_inputs=self.example, optimizer=setting.optimizer
            )
        assert small.optimizer is not None
        path.move(small.optimizer, takes_of(path.history.specs, small.cuts))
        after = read_graph(small.model, self.example)
        before = widths_of(graph)
        lost = {n: before[n] - w for n, w in widths_of(after).items() if before.get(n, w) > w}
        return self._with(setting, small.model, small.optimizer), after, plain(lost)

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the run depends on, as plain JSON values."""
        return asdict(self.extent)

    def restore(self, setting: Setting, state: Mapping[str, Any]) -> Setting:
        """Return the setting at the sizes that :meth:`state_dict` told, to load values into."""
        self.extent = Extent(**state)
        model = model_of(setting.recipe, setting.data, sizes=self.extent.sizes)
        final = self.extent.final_from
        return replace(setting_with(setting, model, self.engine), final_from=final)


def shares_of(graph: Graph, support: Ticket) -> dict[str, float]:
    """Return unit -> share of its blocks of which anything is in the support."""
    alive = ~dead_blocks(graph, support)
    return {unit.name: float(alive[unit.blocks].mean()) for unit in graph.units}


def idle(graph: Graph, history: History, born_by: int) -> Ticket | None:
    """Return a ticket without the blocks that were there at a step and have never entered.

    Only blocks that are a block of every tensor that writes them can be told; ``FEWEST`` stay in
    every unit.
    """
    coupled = couplings(graph)
    masks: dict[str, Tensor] = {}
    specs: dict[str, TensorSpec] = {}
    for unit in graph.units:
        gone = np.ones(unit.num_blocks, bool)
        for member in unit.producers:
            name = member.name
            spec = history.specs.get(name)
            if spec is None or name not in coupled or coupled[name].structure != spec.block:
                gone[:] = False
                break
            entry, birth = history.entries[name].flatten(), history.births[name].flatten()
            gone &= ((entry == NEVER) & (birth <= born_by)).numpy()
        places = np.flatnonzero(gone)[: max(0, unit.num_blocks - FEWEST)]
        for member in unit.producers if len(places) else ():
            spec = specs[member.name] = history.specs[member.name]
            mask = torch.ones(spec.num_blocks, dtype=torch.bool)
            mask[torch.from_numpy(places)] = False
            masks[member.name] = mask.reshape(spec.grid)
    return Ticket(masks, specs, {"kind": "idle"}) if masks else None
