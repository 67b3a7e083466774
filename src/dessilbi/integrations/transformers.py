# SPDX-License-Identifier: Apache-2.0
"""transformers: DessiLBI for Hugging Face's Trainer, and a callback that keeps its Path.

With accelerate alone nothing is needed: make the Path before ``accelerator.prepare``, which wraps
the optimizer that it watches.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dessilbi.files.runs import Run
from dessilbi.graph.program import ExampleInputs
from dessilbi.groups import Rules, param_groups
from dessilbi.integrations.recording import Recorder
from dessilbi.optimizers.optimizer import DessiLBI
from dessilbi.path.path import Path

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        f"the callback needs transformers ({error}): pip install 'dessilbi[transformers]'"
    ) from error


def optimizer_cls_and_kwargs(
    model: nn.Module,
    rules: Rules | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    **options: Any,
) -> tuple[type[DessiLBI], dict[str, Any]]:
    """Return what ``Trainer(optimizer_cls_and_kwargs=...)`` makes DessiLBI of.

    The Trainer's own learning rate and weight decay are not used: options say both.

    Args:
        model: The model that the Trainer gets.
        rules: As in :func:`dessilbi.param_groups`.
        example_inputs: As in :func:`dessilbi.param_groups`; with it heads and neurons are units.
        options: Those of :class:`dessilbi.DessiLBI`, for example ``lr=0.1, nu=20.0, lam=0.5``.

    Raises:
        ValueError: As :func:`dessilbi.param_groups`.

    >>> kind, options = optimizer_cls_and_kwargs(nn.Linear(4, 2), lr=0.1, nu=5.0, lam=0.3)
    >>> kind.__name__, sorted(options)
    ('DessiLBI', ['lam', 'lr', 'nu', 'params'])
    """
    groups = param_groups(model, rules, example_inputs=example_inputs)
    return DessiLBI, {"params": groups, **options}


class PathCallback(TrainerCallback, ExportableState):
    """Records the path of a training in its output folder, through the Trainer's own checkpoints.

    ``callback.path`` is the :class:`dessilbi.Path`; its files lie in ``output_dir``
    (``path.jsonl``, at the end ``scores.safetensors``), where ``Path.load(folder)`` reads them.
    Every checkpoint folder gets a copy of the path, and
    ``trainer.train(resume_from_checkpoint=...)`` goes on from there.

    Args:
        every: Record a point every so many steps; None: about 100 over the whole training.
        folder: Where its files go; None: the Trainer's output folder.

    Raises:
        ValueError: When training begins: the optimizer has no structured group or no names.
        FileExistsError: The folder holds the path of another training.

    >>> callbacks = [PathCallback(every=10)]  # of Trainer(callbacks=callbacks)
    """

    def __init__(self, every: int | None = None, folder: str | FilePath | None = None):
        self._recorder = Recorder(every, folder)

    @property
    def path(self) -> Path:
        """The path of the current or last training.

        Raises:
            ValueError: No training has begun yet.
        """
        return self._recorder.begun("trainer.train")

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Watch the optimizer, whose state has been restored by now."""
        sources: list[FilePath] = []
        if state.global_step:
            told = _told(state)
            self._recorder.load(told["position"])
            sources = [_checkpoint(args, state) / Run(FilePath()).path, FilePath(told["file"])]
        self._recorder.begin(
            getattr(optimizer, "optimizer", optimizer),  # accelerate wraps the one that steps
            args.output_dir,
            total_steps=state.max_steps if state.max_steps > 0 else None,
            writes=state.is_world_process_zero,
            sources=sources,
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Put a copy of the path into the checkpoint."""
        if self._recorder.path is not None and (file := self.path.history.file) is not None:
            shutil.copyfile(file, _checkpoint(args, state) / file.name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record the end, and save the scores of blocks."""
        self._recorder.end()

    def state(self) -> dict[str, Any]:
        """Return what ``trainer_state.json`` keeps: where the path stands."""
        position = self._recorder.state()
        told = {"position": position, "file": str(self.path.history.file)} if position else {}
        folder = None if self._recorder.folder is None else str(self._recorder.folder)
        own = {"every": self._recorder.every, "folder": folder}
        return {"args": own, "attributes": {}, "path": told}


def _checkpoint(args: TrainingArguments, state: TrainerState) -> FilePath:
    return FilePath(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _told(state: TrainerState) -> Mapping[str, Any]:
    """What a checkpoint says of its path."""
    told: Any = (state.stateful_callbacks or {}).get(PathCallback.__name__)
    told = told[0] if isinstance(told, list) and told else told
    if not isinstance(told, dict) or not told.get("path"):
        raise ValueError(
            f"the checkpoint of step {state.global_step} was made without PathCallback, so its "
            f"path cannot go on: train from the start, or leave the callback out"
        )
    found: Mapping[str, Any] = told["path"]
    return found
