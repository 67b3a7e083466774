# SPDX-License-Identifier: Apache-2.0
"""Recording: the path of somebody else's trainer, as files of its run folder, through its resume.

The trainers differ in when they call and where their checkpoints keep small things; what is common
to their callbacks is here. In the folder lie ``path.jsonl`` and at the end ``scores.safetensors``:
:meth:`dessilbi.Path.load` reads it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dessilbi.blocks.naming import canonical_names, unwrap
from dessilbi.files.runs import Run
from dessilbi.files.storage import write_atomic
from dessilbi.path.history import History
from dessilbi.path.path import Path


class Recorder:
    """Makes one Path, keeps it in a folder, and lets it go on from what a checkpoint holds.

    Args:
        every: As in :class:`dessilbi.Path`.
        folder: Where its files go; None: where the trainer keeps its own.
    """

    def __init__(self, every: int | None, folder: str | FilePath | None):
        self.every, self.folder = every, folder
        self.path: Path | None = None
        self._watched: Optimizer | None = None
        self._pending: Mapping[str, Any] | None = None

    def begin(
        self,
        optimizer: Optimizer,
        folder: str | FilePath,
        *,
        total_steps: int | None,
        writes: bool = True,
        sources: Iterable[str | FilePath] = (),
        text: str | None = None,
    ) -> Path:
        """Watch an optimizer, from its first step or from where the loaded state stands.

        Args:
            optimizer: A DessiLBI or wrapped optimizer whose state has been loaded, if any is.
            folder: Where files go unless the recorder has a folder of its own.
            total_steps: Steps of the whole run, if known.
            writes: Whether this process writes the file (one of several does).
            sources: Copies of the path's file, to be continued if ``folder`` has none.
            text: What the file held, likewise.

        Raises:
            FileExistsError: The folder holds a path already, of another run.
            FileNotFoundError: The path that is to go on is nowhere to be found.
            ValueError: The optimizer has no structured group or no names.
        """
        state, self._pending = self._pending, None
        run = Run(FilePath(folder if self.folder is None else self.folder))
        file = run.path if writes else None
        if self.path is not None and self._watched is not None:  # a training that did not end
            if state is None and self._watched is optimizer and self.path.history.file == file:
                return self.path  # it begins anew with a smaller batch: the weights go on
            self._stop()
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if state is None and file.exists():
                raise FileExistsError(
                    f"{file} exists already and a path is never overwritten: give the callback "
                    f"another folder, or resume the training that wrote it"
                )
            if state is not None and not file.exists():
                _fetch(state["file"], file, sources, text)
        self.path = Path(
            optimizer, every=self.every, total_steps=total_steps, file=file, resume=state
        )
        self._watched = optimizer
        return self.path

    def begun(self, call: str) -> Path:
        """Return the path of the current or last training.

        Raises:
            ValueError: None has begun; ``call`` is what begins one.
        """
        if self.path is None:
            raise ValueError(f"there is no path yet: it is made when {call} begins")
        return self.path

    def state(self) -> dict[str, Any]:
        """Return where the path stands, as plain values; nothing before :meth:`begin`."""
        if self.path is None or self.path.history.file is None:
            return {}
        return self.path.state_dict()

    def text(self) -> str:
        """Return all that the path's file holds."""
        assert self.path is not None
        assert self.path.history.file is not None
        return self.path.history.file.read_text(encoding="utf-8")

    def load(self, state: Mapping[str, Any]) -> None:
        """Let the next :meth:`begin` go on from a :meth:`state`."""
        self._pending = dict(state) or None

    def end(self) -> None:
        """Record the last point, save the scores beside the path, and stop watching."""
        if self.path is None or self._watched is None:
            return
        self.path.record()
        self._stop()
        if (file := self.path.history.file) is not None:
            self.path.save_scores(Run(file.parent).scores)

    def _stop(self) -> None:
        assert self.path is not None
        self.path.close()
        self._watched = None


def _fetch(
    position: Mapping[str, int],
    file: FilePath,
    sources: Iterable[str | FilePath],
    text: str | None,
) -> None:
    """Write what a path held at a position: as told, or as the first source has it."""
    if text is not None:
        write_atomic(file, text.encode())
        return
    tried = [FilePath(source) for source in sources]
    for source in tried:
        if source.is_file():
            History.check_position(source, position)
            with source.open("rb") as opened:
                write_atomic(file, opened.read(position["bytes"]))
            return
    looked = ", ".join(map(str, tried)) or "the checkpoint"
    raise FileNotFoundError(
        f"the path that this checkpoint continues is not in {file}, nor in {looked}: put its "
        f"file there, or train from the start"
    )


def name_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """Give the parameters of an optimizer the names they have in a model, in place.

    For optimizers that a trainer has made from bare parameters: ``gamma``, ``support`` and Path
    need names.

    Raises:
        ValueError: A parameter of the optimizer is not one of the model's.

    >>> from dessilbi import DessiLBI
    >>> model = nn.Linear(4, 3)
    >>> optimizer = DessiLBI(model.parameters(), structure="layer")
    >>> name_parameters(optimizer, model)
    >>> list(optimizer.support())
    ['weight', 'bias']
    """
    own = dict(unwrap(model).named_parameters())
    names = {id(p): n for n, p in zip(canonical_names(list(own)), own.values(), strict=True)}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) not in names:
                raise ValueError(
                    f"the optimizer has a parameter of shape {tuple(param.shape)} that is not of "
                    f"this {type(unwrap(model)).__name__}: give the model it was made from"
                )
        group["param_names"] = [names[id(param)] for param in group["params"]]
