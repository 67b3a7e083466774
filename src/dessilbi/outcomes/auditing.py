# SPDX-License-Identifier: Apache-2.0
"""Auditing: every file of a run folder against its checksums. Nothing is written.

Safe beside a process that trains: logs only grow, and all else appears whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Literal

from dessilbi.blocks.ticket import Ticket
from dessilbi.files.folders import STUDY
from dessilbi.files.runs import Run
from dessilbi.files.sealing import Seal, check_sealed, read_seal, read_sealed
from dessilbi.files.storage import DamagedFileError, check_plain, read_lines
from dessilbi.path.history import BELIEVED, History
from dessilbi.saving.manifest import FILES, read_manifest
from dessilbi.saving.manifest import NAME as MANIFEST
from dessilbi.training.checkpoints import Checkpoint, verified
from dessilbi.training.session import check_logs, logs_of

State = Literal["good", "damaged", "missing", "unchecked", "extra"]
FAULTS: tuple[State, ...] = ("damaged", "missing")


@dataclass(frozen=True)
class Finding:
    """What was found of one file or folder, by its name in the run folder.

    Attributes:
        file: The name.
        state: "good", "damaged", "missing", "unchecked" (it has no checksum) or "extra" (a run has
            no such file).
        detail: One sentence where there is more to say.
    """

    file: str
    state: State
    detail: str = ""


def audit(folder: str | FilePath) -> list[Finding]:
    """Check every file of a run folder, also of a run that has not ended.

    Raises:
        FileNotFoundError: It is no run folder.
    """
    run = Run(FilePath(folder))
    if not (run.recipe.exists() or run.checksums.exists()):
        run.read_recipe()
    found = {finding.file: finding for finding in _all(run)}
    for place in sorted(run.folder.iterdir()):
        if place.name in found or place == run.lock or _is_listed(place, run):
            continue
        inner = _inner_runs(place)
        if not inner:
            found[place.name] = _extra(place)
        for other in inner:
            name = str(other.relative_to(run.folder))
            found |= {f"{name}/{f.file}": replace(f, file=f"{name}/{f.file}") for f in audit(other)}
    return list(found.values())


def _inner_runs(place: FilePath) -> list[FilePath]:
    """Run folders in a folder: what was trained from the tickets of a run."""
    if place.is_symlink() or not place.is_dir():
        return []
    inside = sorted(f for f in place.iterdir() if f.is_dir() and not f.is_symlink())
    studies = [f for f in inside if (f / STUDY).is_file()]
    inside += [run for study in studies for run in _inner_runs(study)]
    return [f for f in inside if Run(f).recipe.exists() or Run(f).checksums.exists()]


def _is_listed(place: FilePath, run: Run) -> bool:
    made = (run.checkpoints, run.tickets, run.compacted, run.curves, run.figures)
    return place in made and not place.is_symlink()


def _all(run: Run) -> Iterator[Finding]:
    seal: Seal | None = None
    try:
        seal = read_seal(run.folder)
        if seal is None:
            told = "this run was made by an older release: its files have no checksums"
            yield Finding(run.checksums.name, "unchecked", told)
        else:
            yield Finding(run.checksums.name, "good")
    except DamagedFileError as error:
        yield Finding(run.checksums.name, "damaged", str(error))
    yield _found(run, run.status, lambda: run.read_status())
    listed = {} if seal is None else seal.files
    for name in listed:
        yield _found(run, run.folder / name, partial(check_sealed, run.folder / name))
    checkpoints = list(_checkpoints(run))
    yield from (finding for finding, _ in checkpoints)
    if seal is None or seal.final is None:
        newest = next((c for _, c in reversed(checkpoints) if c is not None), None)
        yield from _logs(run, newest)
    yield from _family(run)
    why = "there is no checksum of it" if seal is None else "it is written again when the run ends"
    for file in (run.recipe, run.environment, run.init, run.early, run.model, run.scores):
        if file.name not in listed and file.is_file():
            yield Finding(file.name, "unchecked", why)


def _found(run: Run, file: FilePath, check: Callable[[], object]) -> Finding:
    """Check one file, and say how it is."""
    name = str(file.relative_to(run.folder))
    try:
        check_plain(file)
        check()
    except FileNotFoundError as error:
        return Finding(name, "missing", str(error))
    except (DamagedFileError, ValueError) as error:
        return Finding(name, "damaged", str(error))
    return Finding(name, "good")


def _checkpoints(run: Run) -> Iterator[tuple[Finding, Checkpoint | None]]:
    """Each checkpoint; one that is thinned out meanwhile is passed over."""
    if run.checkpoints.is_symlink() or not run.checkpoints.is_dir():
        return
    for place in sorted(run.checkpoints.iterdir()):
        name = str(place.relative_to(run.folder))
        if place.name.startswith("aside-"):
            yield Finding(name, "extra", "it was damaged and set aside"), None
        elif place.name.startswith(".step-"):
            yield Finding(name, "extra", "being written, or left by a killed process"), None
        elif not place.name.startswith("step-"):
            yield _extra(place, name), None
        else:
            try:
                checkpoint = verified(place)
            except DamagedFileError as error:
                if place.exists():
                    yield Finding(name, "damaged", str(error)), None
            else:
                yield Finding(name, "good"), checkpoint


def _logs(run: Run, newest: Checkpoint | None) -> Iterator[Finding]:
    """The logs of a run that has not ended, as far as the newest checkpoint knows them."""
    logs = (*logs_of(run), run.path)
    if newest is None:
        for log in logs:
            if log.exists() or log.is_symlink():
                yield _found(run, log, partial(_read, run, log))
        return
    try:
        check_logs(run, newest)
        fault = ""
    except DamagedFileError as error:
        fault = str(error)
    for log in logs:
        if not (log.exists() or log.is_symlink() or fault.startswith(str(log))):
            continue  # its first line is still to come
        found = _found(run, log, partial(_read, run, log))
        if found.state == "good" and fault.startswith(str(log)):
            found = Finding(log.name, "damaged", fault)
        yield found


def _read(run: Run, log: FilePath) -> None:
    if log == run.path:
        with log.open("rb") as file:
            if not file.readline(1 << 20).endswith(b"\n") and not any(
                run.checkpoints.glob("step-*")
            ):
                return  # killed in its first line: without checkpoint the run begins anew
        History.load(log, largest=max(BELIEVED, run.weight_bytes))
    else:
        for _ in read_lines(log):
            pass


def _family(run: Run) -> Iterator[Finding]:
    """What was made from the run afterwards: tickets, smaller models, judged accuracies."""
    if run.family.exists() or run.family.is_symlink():
        yield _found(run, run.family, lambda: read_sealed(run.family))
    if run.tickets.is_dir() and not run.tickets.is_symlink():
        for file in sorted(run.tickets.iterdir()):
            yield _found(run, file, partial(Ticket.load, file))
    if run.compacted.is_dir() and not run.compacted.is_symlink():
        for place in sorted(run.compacted.iterdir()):
            name = str(place.relative_to(run.folder))
            if place.is_symlink() or not (place / MANIFEST).exists():
                yield _extra(place, name)
                continue
            yield _of_folder(name, place)
            for file in sorted(place.iterdir()):
                if file.name not in (*FILES, MANIFEST):
                    yield Finding(f"{name}/{file.name}", "unchecked", "there is no checksum of it")


def _of_folder(name: str, place: FilePath) -> Finding:
    try:
        read_manifest(place)
    except FileNotFoundError as error:
        return Finding(name, "missing", str(error))
    except ValueError as error:
        return Finding(name, "damaged", str(error))
    return Finding(name, "good")


def _extra(place: FilePath, name: str | None = None) -> Finding:
    name = name or place.name
    if place.is_symlink():
        told = "it is a link: nothing outside of the folder is read"
        return Finding(name, "damaged", told)
    if place.name == "tensorboard":
        return Finding(name, "unchecked", "curves have no checksums")
    return Finding(name, "extra", "a run has no such file")
