# SPDX-License-Identifier: Apache-2.0
"""Commands on smaller models: compact, export, verify."""

from enum import StrEnum
from pathlib import Path as FilePath
from shlex import quote
from typing import Annotated, Any

import typer

from dessilbi.cli.family import ticket_or_density
from dessilbi.cli.terminal import (
    DataOption,
    DensityOption,
    JsonOption,
    RunArgument,
    TicketOption,
    data_root,
    fail,
    guarded,
    print_json,
)
from dessilbi.cli.verification import verify_run
from dessilbi.files.folders import MANIFEST, kind_of
from dessilbi.files.runs import Run, free_path
from dessilbi.files.storage import to_json

FolderArgument = Annotated[
    FilePath, typer.Argument(help="A folder that `dessilbi compact` made.", metavar="DIR")
]


class FormatName(StrEnum):
    """The formats of ``export``, as words of the command line."""

    ONNX = "onnx"
    PT2 = "pt2"
    SAFETENSORS = "safetensors"


@guarded
def compact(
    run: RunArgument,
    density: DensityOption = None,
    ticket: TicketOption = None,
    out: Annotated[FilePath | None, typer.Option(help="The folder to make.")] = None,
    multiple_of: Annotated[int, typer.Option(min=1, help="Round widths up to a multiple.")] = 1,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a physically smaller model of one ticket, with proof that it computes the same."""
    if (density is None) == (ticket is None):
        raise fail("give exactly one of --density and --ticket", 2)
    from dessilbi.outcomes.compacting import save_shrunk, shrink
    from dessilbi.reporting.tables import proof_text
    from dessilbi.training.finetune import load_trained

    chosen, name = ticket_or_density(run, ticket, density, data_root(data))
    trained = load_trained(Run(run), data_root=data_root(data))
    shrunk = shrink(trained, chosen, multiple_of=multiple_of)
    place = save_shrunk(shrunk, out or free_path(Run(run).compacted, name), Run(run), trained)
    if as_json:
        print_json({**shrunk.to_json(), "folder": str(place)})
        return
    closed = shrunk.compacted.closed
    typer.echo(f"density {chosen.density:.4g}, closed {closed.density:.4g}")
    typer.echo(proof_text(shrunk.compacted.proof))
    typer.echo(
        f"accuracy {shrunk.accuracy_before:.4f} masked, {shrunk.accuracy_after:.4f} compact; "
        f"{shrunk.same} of {shrunk.total} predictions identical"
    )
    typer.echo(f"saved in {place}; export it with:")
    typer.echo(f"  dessilbi export {quote(str(place))} --format onnx")


@guarded
def export(
    folder: FolderArgument,
    file_format: Annotated[FormatName, typer.Option("--format", help="What to write.")],
    out: Annotated[FilePath | None, typer.Option(help="The file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a smaller model for a runtime, and compare the file with it."""
    if out is not None and out.suffix != f".{file_format.value}":
        raise fail(
            f"--format {file_format.value} does not fit {out}: name a .{file_format.value}", 2
        )
    from dessilbi.exporting import export as export_model
    from dessilbi.graph.inputs import draw
    from dessilbi.saving.saving import open_certified

    opened = open_certified(None, folder)
    args, kwargs = draw(opened.witness.inputs, 1)[0]
    file = out or free_path(folder, "model", f".{file_format.value}")
    exported = export_model(opened.model, file, example_inputs=args or kwargs)
    if as_json:
        print_json(exported.to_json())
        return
    batch = ", takes any batch" if exported.dynamic_batch else ", takes a fixed batch"
    weights_alone = file_format is FormatName.SAFETENSORS
    typer.echo(
        f"{exported.file}: {exported.bytes:,} bytes{'' if weights_alone else batch}; "
        f"max |difference| to the PyTorch model {exported.max_abs_diff:.3g}"
    )
    for note in exported.notes:
        typer.echo(note)


@guarded
def verify(
    folder: Annotated[
        FilePath, typer.Argument(help="A run folder, or what `dessilbi compact` made.")
    ],
    run: Annotated[
        FilePath | None, typer.Option(help="Also make the masked model again from this run.")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every file of a run, or of a smaller model and compute its proof again."""
    if Run(folder).recipe.exists() or Run(folder).checksums.exists():
        if run is not None:
            raise fail(f"{folder} is a run folder itself: leave out --run", 2)
        verify_run(folder, as_json=as_json)
        return
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"{folder} is neither a run folder nor a smaller model: {kind_of(folder, MANIFEST)}; "
            f"name a folder that `dessilbi train` or `dessilbi compact` has written"
        )
    from dessilbi.saving.saving import open_compact

    opened = open_compact(None, folder)
    verdict, accepted = opened.verdict, opened.tolerance
    if run is not None:
        from dessilbi.outcomes.compacting import recheck
        from dessilbi.training.finetune import load_trained

        trained = load_trained(Run(run), data_root=data_root(data))
        verdict, accepted = recheck(opened, Run(run), trained)
    holds = opened.holds and verdict.relative_diff <= accepted
    told: dict[str, Any] = {
        **opened.manifest.proof,
        **vars(verdict),
        "tolerance": accepted,
        "holds": holds,
        "retrained": opened.manifest.retrained,
        "folder": str(folder),
    }
    typer.echo(to_json(told) if as_json else _words(told, against=run))
    if not holds:
        raise typer.Exit(1)


def _words(told: dict[str, Any], against: FilePath | None) -> str:
    answers = "the answers saved with it" if against is None else f"the masked net of {against}"
    lines = [
        f"files            {'as saved':>14}",
        f"max |difference| {told['max_abs_diff']:>14.3g}  from {answers}, float64",
        f"relative         {told['relative_diff']:>14.3g}  accepted {told['tolerance']:.3g}",
    ]
    if told["retrained"]:
        lines.append("trained after compaction: the answers are its own, not those of a masked net")
    return "\n".join([*lines, "the proof holds" if told["holds"] else "the proof DOES NOT hold"])
