# SPDX-License-Identifier: Apache-2.0
"""Lightning: a callback that keeps the Path of a fit, through Lightning's own checkpoints.

``configure_optimizers`` returns DessiLBI as any other optimizer; nothing is needed for that.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from dessilbi.integrations.recording import Recorder
from dessilbi.path.path import Path

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer

NAMES = ("pytorch_lightning", "lightning.pytorch")  # one library, two sets of classes


def _bases() -> tuple[type, ...]:
    """The class Callback under every name that is installed: a Trainer asks for its own."""
    found, missing = [], []
    for name in NAMES:
        try:
            found.append(import_module(name).Callback)
        except ImportError as error:
            missing.append(str(error))
    if not found:
        raise ImportError(
            f"the callback needs Lightning ({'; '.join(missing)}): "
            f"pip install 'dessilbi[lightning]'"
        )
    return tuple(found)


if not TYPE_CHECKING:
    Callback = type("Callback", _bases(), {"__doc__": "What both Trainers take."})


class PathCallback(Callback):
    """Records the path of a fit beside its logs, and goes on with it when the fit is resumed.

    ``callback.path`` is the :class:`dessilbi.Path`; its files lie in the trainer's log folder
    (``path.jsonl``, at the end ``scores.safetensors``), where ``Path.load(folder)`` reads them.
    What the path held is part of every checkpoint: ``trainer.fit(model, ckpt_path=...)`` goes on
    from there, also in another folder.

    Args:
        every: Record a point every so many steps; None: about 100 over the whole fit.
        folder: Where its files go; None: the trainer's log folder.
        optimizer: Which of the module's optimizers is watched.

    Raises:
        ValueError: When the fit begins: the optimizer has no structured group or no names.
        FileExistsError: The folder holds the path of another fit.

    >>> import torch
    >>> from dessilbi import DessiLBI, param_groups
    >>> from pytorch_lightning import LightningModule  # or from lightning.pytorch
    >>> class Net(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(4, 2)
    ...     def training_step(self, batch):
    ...         return self.layer(batch).square().mean()
    ...     def configure_optimizers(self):
    ...         return DessiLBI(param_groups(self), lr=0.1, nu=5.0, lam=0.3, momentum=0.9)
    >>> callbacks = [PathCallback()]  # of Trainer(callbacks=callbacks)
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        folder: str | FilePath | None = None,
        optimizer: int = 0,
    ):
        super().__init__()
        self._recorder, self._optimizer = Recorder(every, folder), optimizer
        self._text: str | None = None

    @property
    def state_key(self) -> str:
        """The name of this callback in a checkpoint; one for each optimizer that is watched."""
        return f"{type(self).__qualname__}[{self._optimizer}]"

    @property
    def path(self) -> Path:
        """The path of the current or last fit.

        Raises:
            ValueError: No fit has begun yet.
        """
        return self._recorder.begun("trainer.fit")

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Forget what another call has loaded: ``trainer.test(ckpt_path=...)`` loads it as well."""
        self._recorder.load({})
        self._text = None

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Watch the optimizer, whose state has been restored by now."""
        count = len(trainer.optimizers)
        if not 0 <= self._optimizer < count:
            raise ValueError(
                f"PathCallback(optimizer={self._optimizer}) is not allowed: {count} optimizers "
                f"were configured, counted from 0"
            )
        if trainer.ckpt_path is not None and self._text is None:
            raise ValueError(
                f"the checkpoint {trainer.ckpt_path} was made without PathCallback, so its path "
                f"cannot go on: fit from the start, or leave the callback out"
            )
        steps, trial = trainer.estimated_stepping_batches, bool(trainer.fast_dev_run)
        known = not trial and steps != float("inf") and steps > 0
        self._recorder.begin(
            trainer.optimizers[self._optimizer],
            trainer.log_dir or trainer.default_root_dir,
            total_steps=int(steps) if known else None,  # a trial is too short to select anything
            writes=trainer.is_global_zero and not trial,  # and leaves no files
            text=self._text,
        )
        self._text = None

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Record the end, and save the scores of blocks."""
        self._recorder.end()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: where the path stands, and all that it holds."""
        state = self._recorder.state()
        return {"position": state, "lines": self._recorder.text()} if state else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept; the fit that begins next goes on from there."""
        self._recorder.load(state_dict.get("position", {}))
        self._text = state_dict.get("lines")
