# SPDX-License-Identifier: Apache-2.0
"""Judging: what W, the ticket on supp(Gamma) and Gamma are worth along the path, and how often.

Judging a point takes five passes over validation and test samples, so that a hundred points can
cost more than the training. By default as many are judged as fit in a tenth of the training's own
cost, counted in samples (a training step as two passes, which is little: so it is rather less).
"""

import math
from functools import partial

from dessilbi.training.engine import Engine
from dessilbi.training.evaluation import SAMPLES, answered, changed, norms_of, set_weights
from dessilbi.training.feeding import Split
from dessilbi.training.setting import Setting

SHARE, PASSES = 0.1, 2


class Judge:
    """Measures accuracies; every process must call it at the same steps.

    Args:
        setting: The run's.
        engine: The run's.
    """

    def __init__(self, setting: Setting, engine: Engine):
        self.setting, self.engine = setting, engine
        self._latest: tuple[int, float] | None = None
        recipe, steps = setting.recipe, setting.total_steps
        self.every = max(1, steps // recipe.points)
        points = math.ceil(steps / self.every)
        wanted = min(points, recipe.judged or max(1, _affordable(setting)))
        self._stride = self.every * math.ceil(points / wanted)

    def follow(self, setting: Setting) -> None:
        """Go on with a network of another size."""
        self.setting, self._latest = setting, None

    def wants(self, step: int) -> bool:
        """Whether the point after ``step`` steps is one of those to judge."""
        return step % self._stride == 0 or step == self.setting.total_steps

    def at_point(self, step: int) -> dict[str, float]:
        """Return the accuracies of W, of the ticket on supp(Gamma) and of Gamma."""
        data, optimizer = self.setting.data, self.setting.optimizer
        model = self.setting.model
        self.engine.share_buffers(model)
        support, gamma = optimizer.support(), optimizer.gamma()
        facts = {"accuracy": self._accuracy(data.test), "val_accuracy": self.validation(step)}
        with self.engine.autocast():
            with changed(model, support.apply_, data.train):
                facts["ticket_accuracy"] = self._accuracy(data.test)
                facts["val_ticket_accuracy"] = self._accuracy(data.validation)
            with changed(model, partial(set_weights, weights=gamma), data.train):
                facts["gamma_accuracy"] = self._accuracy(data.test)
        return facts

    def of_ticket(self, step: int) -> dict[str, float]:
        """Return the validation accuracies of W and of the ticket on supp(Gamma) alone."""
        data, model = self.setting.data, self.setting.model
        dense = self.validation(step)
        self.engine.share_buffers(model)
        support = self.setting.optimizer.support()
        with self.engine.autocast(), changed(model, support.apply_, data.train):
            ticket = self._accuracy(data.validation)
        return {"val_accuracy": dense, "val_ticket_accuracy": ticket}

    def of_weights(self) -> dict[str, float]:
        """Return the accuracies of W as it is, masked or not."""
        data = self.setting.data
        self.engine.share_buffers(self.setting.model)
        return {
            "accuracy": self._accuracy(data.test),
            "val_accuracy": self._accuracy(data.validation),
        }

    def masked_now(self, *, again: bool) -> dict[str, float]:
        """Return the accuracies of W before it is trained, BatchNorm statistics estimated again.

        Args:
            again: Whether they are.
        """
        if not again:
            return self.of_weights()
        self.engine.share_buffers(self.setting.model)
        with (
            self.engine.autocast(),
            changed(self.setting.model, lambda model: model, self.setting.data.train),
        ):
            return self.of_weights()

    def validation(self, step: int) -> float:
        """Return the accuracy of W on the validation split after ``step`` steps."""
        if self._latest is None or self._latest[0] != step:
            self.engine.share_buffers(self.setting.model)
            self._latest = (step, self._accuracy(self.setting.data.validation))
        return self._latest[1]

    def _accuracy(self, split: Split) -> float:
        # A sharded model needs all its processes for every batch.
        alone = self.engine.world_size == 1 or self.engine.sharded
        share = {} if alone else {"rank": self.engine.rank, "world_size": self.engine.world_size}
        with self.engine.autocast():
            counts = answered(self.setting.model, split, **share)
        correct, answers = (counts if alone else self.engine.total(counts)).tolist()
        return float(correct / answers)


def _affordable(setting: Setting) -> int:
    """How many points can be judged within the share of the training's cost."""
    data = setting.data
    training = PASSES * len(data.train) * setting.recipe.longest
    again = min(SAMPLES, len(data.train)) if norms_of(setting.model) else 0
    judging = 3 * len(data.test) + 2 * len(data.validation) + 2 * again
    return int(SHARE * training / judging)
