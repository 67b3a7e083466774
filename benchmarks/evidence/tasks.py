# SPDX-License-Identifier: Apache-2.0
"""Tasks: data in memory, a network, and how a batch is scored. No loader, no worker processes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dessilbi.cuts.counting import count_macs
from dessilbi.models import LeNet, build_model
from dessilbi.models.gpt import GPT
from dessilbi.training.data import load_data
from dessilbi.training.feeding import InMemory, Split

BATCH_TO_JUDGE = 250
CHANNELS_LAST = torch.channels_last


class QuickLeNet(LeNet):
    """LeNet with each ReLU behind its pooling: the same function, a third less time on a CPU."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, 1, 28, 28)."""
        y = F.relu(F.max_pool2d(self.conv1(inputs), 2))
        y = F.relu(F.max_pool2d(self.conv2(y), 2))
        y = F.relu(self.conv3(y)).flatten(1)
        logits: Tensor = self.fc2(F.relu(self.fc1(y)))
        return logits


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained on what, and for how long.

    Attributes:
        name: In the table.
        build: From a seed to a freshly initialised network.
        train, validation, test: Inputs and targets in memory, or splits.
        batch: Samples of a training batch.
        steps: E, the steps that each method may spend on one model.
        text: Targets are one per character, and the score is minus the loss.
        device: Where it is trained.
    """

    name: str
    build: Callable[[int], nn.Module]
    train: Split
    validation: Split
    test: Split
    batch: int
    steps: int
    text: bool = False
    device: str = "cpu"

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.train.steps_per_epoch(self.batch)

    def model(self, seed: int) -> nn.Module:
        """Return the network of a seed."""
        return self.build(seed).to(self.device)

    def example(self, count: int = 2) -> Tensor:
        """Return inputs of the right shape."""
        return self.train.examples(count, device=self.device)[0]

    def batches(self, seed: int, first: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training batches number ``first`` to ``first + steps`` of a seed."""
        done = 0
        while done < steps:
            epoch, start = divmod(first + done, self.per_epoch)
            for inputs, targets in self.train.batches(
                epoch, batch_size=self.batch, seed=seed, start=start, device=self.device
            ):
                yield (
                    (inputs if self.text else inputs.contiguous(memory_format=CHANNELS_LAST)),
                    targets,
                )
                done += 1
                if done == steps:
                    return

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of a batch."""
        logits = model(inputs)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def judge(self, model: nn.Module, part: Split) -> dict[str, float]:
        """Return accuracy and loss of a network on a part; its mode is restored."""
        training = model.training
        model.eval()
        right, loss, answers = 0, 0.0, 0
        for inputs, targets in part.in_order(BATCH_TO_JUDGE, device=self.device):
            if not self.text:
                inputs = inputs.contiguous(memory_format=CHANNELS_LAST)
            logits = model(inputs).flatten(0, -2)
            targets = targets.flatten()
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            right += int((logits.argmax(1) == targets).sum())
            answers += targets.numel()
        model.train(training)
        return {"accuracy": right / answers, "loss": loss / answers}

    def macs(self, model: nn.Module) -> int:
        """Return the multiply-accumulates of one sample."""
        training = model.training
        found = count_macs(model.eval(), ((self.example(1),), {}))
        model.train(training)
        return found


def _part(split: Split, count: int | None = None) -> Split:
    """Read a split into memory once, as it is."""
    return Split(InMemory(*split.examples(count or len(split))))


def _images(
    name: str,
    *,
    source: str,
    root: str | None,
    build: Callable[[int], nn.Module],
    sizes: dict[str, Any],
) -> Task:
    data = load_data(
        source,
        root=root,
        validation=sizes["validation"],
        seed=0,
        augment=sizes.get("augment", False),
    )
    train = Split(data.train.source, data.train.indices[: sizes["train"]])
    return Task(
        name=name,
        build=build,
        train=train if sizes.get("augment") else _part(train),
        validation=_part(data.validation),
        test=_part(data.test),
        batch=sizes["batch"],
        steps=sizes["steps"],
    )


def _lenet(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return QuickLeNet()


def _gpt(seed: int, *, classes: int, length: int, width: int, depth: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return GPT(num_classes=classes, length=length, width=width, depth=depth, num_heads=4)


def _text(name: str, *, source: str, root: str | None, sizes: dict[str, Any]) -> Task:
    data = load_data(
        source, root=root, validation=sizes["validation"], seed=0, length=sizes["length"]
    )
    build = partial(
        _gpt,
        classes=data.num_classes,
        length=sizes["length"],
        width=sizes["width"],
        depth=sizes["depth"],
    )
    return Task(
        name=name,
        build=build,
        train=data.train,
        validation=data.validation,
        test=_first(data.test, sizes.get("test")),
        batch=sizes["batch"],
        steps=sizes["steps"],
        text=True,
    )


def _first(split: Split, count: int | None) -> Split:
    return split if count is None else Split(split.source, torch.arange(min(count, len(split))))


LENET = {"train": 12_800, "validation": 5_000, "batch": 128, "steps": 1_200}
RESNET = {"train": 12_800, "validation": 5_000, "batch": 128, "steps": 1_000, "augment": True}
TEXT = {"validation": 400, "length": 64, "batch": 32, "steps": 800, "width": 64, "depth": 2}
FULL = {"train": 45_000, "validation": 5_000, "batch": 128, "steps": 160 * 351, "augment": True}
READY = ("mnist", "fashion", "cifar", "text", "digits", "digits-resnet", "chatter")
FULL_NETS = ("resnet20", "vgg16-bn", "resnet56")
SMALL = {"train": 1_000, "validation": 237, "batch": 50, "steps": 20}


@cache
def task(name: str, root: str | None = None) -> Task:
    """Return a task by its name; those of ``digits`` and ``chatter`` need no files.

    Raises:
        ValueError: The name is unknown.
    """
    resnet = partial(_built, "resnet8-small")
    if name in FULL_NETS:
        build = partial(_built, name, 3)
        full = _images(name, source="cifar10", root=root, build=build, sizes=FULL)
        return replace(full, device="cuda")
    if name in ("mnist", "fashion"):
        source = {"mnist": "mnist", "fashion": "fashion-mnist"}[name]
        return _images(name, source=source, root=root, build=_lenet, sizes=LENET)
    if name == "cifar":
        return _images(name, source="cifar10", root=root, build=partial(resnet, 3), sizes=RESNET)
    if name == "text":
        return _text(name, source="tinyshakespeare", root=root, sizes=TEXT)
    if name == "digits":
        return _images(name, source="digits", root=None, build=_lenet, sizes=SMALL)
    if name == "digits-resnet":
        return _images(name, source="digits", root=None, build=partial(resnet, 1), sizes=SMALL)
    if name == "chatter":
        sizes = TEXT | {
            "validation": 40,
            "steps": 20,
            "batch": 8,
            "length": 32,
            "width": 16,
            "test": 40,
        }
        return _text(name, source="generated:tinyshakespeare:300", root=None, sizes=sizes)
    known = ", ".join((*READY, *FULL_NETS))
    raise ValueError(f"task {name!r} is unknown: use one of {known}")


def _built(name: str, channels: int, seed: int) -> nn.Module:
    return build_model(name, num_classes=10, in_channels=channels, seed=seed)


def hold(progress: float, *, warmup: float = 0.1, start: float = 0.75) -> float:
    """Return the factor on the learning rate: warm-up, constant, cosine to 0.

    >>> [round(hold(p), 2) for p in (0.0, 0.05, 0.5, 0.75, 0.875, 1.0)]
    [0.01, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return max(progress / warmup, 0.01)
    if progress < start:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - start) / (1 - start))))
