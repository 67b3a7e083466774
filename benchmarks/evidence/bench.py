# SPDX-License-Identifier: Apache-2.0
"""Bench: the jobs' table, the settings chosen from it, and dense networks that jobs share."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from benchmarks.evidence.settings import TRIALS, TUNING_SEED, Setting
from benchmarks.evidence.tasks import Task, task
from benchmarks.evidence.training import Spent, Stage, fit, sgd
from torch import nn

from dessilbi.files.storage import append_line, write_atomic

# Which method's trials another takes over.
BORROWED = {
    ("b", "iterative"): ("a", "sgd"),
    ("d", "dense"): ("a", "sgd"),
    ("d", "early"): ("b", "dessilbi"),
    ("e", "dessilbi"): ("b", "dessilbi"),
}
STANDS_FOR = {"fashion": "digits", "mnist": "digits", "cifar": "digits-resnet", "text": "chatter"}


@dataclass(frozen=True)
class Job:
    """What is run in one go: a method on a task with a seed, over all of its budgets.

    Attributes:
        part: "a" to "i".
        task: Its name.
        method: As in TRIALS.
        seed: Of initialisation and order.
        budgets: One line each.
        trial: Which setting is tried, None for what is reported.
        change: Of part (e).
    """

    part: str
    task: str
    method: str
    seed: int
    budgets: tuple[Any, ...]
    trial: int | None = None
    change: str = ""

    @property
    def name(self) -> str:
        """Names the job in the table."""
        tail = "" if self.trial is None else f" trial {self.trial}"
        change = f" {self.change}" if self.change else ""
        return f"{self.part} {self.task} {self.method}{change} {self.seed}{tail}"

    def cell(self, budget: object) -> str:
        """Names a line."""
        return f"{self.name} @ {budget}"

    @property
    def reported(self) -> bool:
        """Whether the test part may be read."""
        return self.trial is None


class MissingError(LookupError):
    """A job needs lines that are not there yet."""


class Bench:
    """Results in a file of lines, and networks in a folder.

    Args:
        results: The file; lines are only ever added.
        work: Folder of networks that jobs share; they can be made again.
        root: Folder of the data sets.
        smoke: Tiny stand-ins for all tasks.
    """

    def __init__(self, results: Path, work: Path, root: str | None, *, smoke: bool = False):
        self.results, self.work, self.root, self.smoke = results, work, root, smoke

    def lines(self) -> list[dict[str, Any]]:
        """Return the table, read again: others may write as well."""
        if not self.results.exists():
            return []
        text = self.results.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # another process may be writing a line
        return [json.loads(line) for line in whole.splitlines()]

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.results, line)

    def task(self, name: str) -> Task:
        """Return a task, or what stands for it."""
        return task(STANDS_FOR[name] if self.smoke else name, self.root)

    def setting(self, job: Job) -> Setting:
        """Return what a trial tries, or the best of the trials.

        Raises:
            MissingError: Not all trials are there.
        """
        part = "c" if job.part == "g" else job.part
        part, method = BORROWED.get((part, job.method), (part, job.method))
        if job.trial is not None:
            return dict(TRIALS[part][method][job.trial])
        return self.chosen(part, method)

    def chosen(self, part: str, method: str) -> Setting:
        """Return the setting with the best validation score (text: loss) among a method's trials.

        Raises:
            MissingError: Not all trials are there.
        """
        offered = TRIALS[part][method][: 1 if self.smoke else None]
        own = {
            line["trial"]: -line["val_loss"] if part == "f" else line["val_accuracy"]
            for line in self.lines()
            if (line["part"], line["method"], line["seed"]) == (part, method, TUNING_SEED)
        }
        if len(own) < len(offered):
            raise MissingError(f"{part} {method}: {len(own)} of {len(offered)} trials are there")
        return dict(offered[max(sorted(own), key=lambda trial: own[trial])])

    def dense(self, name: str, seed: int) -> tuple[nn.Module, Spent]:
        """Return the network of a task trained by SGD over E, kept from an earlier job if it was.

        Raises:
            MissingError: The learning rate is not chosen yet.
        """
        lr, at = self.chosen("a", "sgd")["lr"], self.task(name)
        file = self.work / f"dense-{at.name}-{seed}-{lr:g}.safetensors"
        model = at.model(seed)
        macs = 3.0 * at.macs(model) * at.batch * at.steps
        if file.is_file():
            model.load_state_dict(safetensors.torch.load_file(file))
            return model, Spent(macs, 0.0)
        spent = fit(at, model, sgd(model, lr), Stage(at.steps), seed=seed)
        self.work.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        write_atomic(file, safetensors.torch.save(state))
        return model, spent


def line_of(job: Job, budget: object, setting: Setting, **facts: Any) -> dict[str, Any]:
    """Return a line of the table."""
    return {
        "cell": job.cell(budget),
        "part": job.part,
        "task": job.task,
        "method": job.method,
        "seed": job.seed,
        "trial": job.trial,
        "change": job.change,
        "budget": budget,
        "setting": setting,
        **facts,
        "torch": torch.__version__,
    }
