# SPDX-License-Identifier: Apache-2.0
"""Commands that train tickets again: retrain, prune-curve."""

from enum import StrEnum
from pathlib import Path as FilePath
from typing import Annotated

import typer

from dessilbi.cli.family import ticket_or_density
from dessilbi.cli.terminal import (
    DataOption,
    DeviceOption,
    JsonOption,
    RunArgument,
    TicketOption,
    check_new,
    console,
    data_root,
    fail,
    guarded,
    print_json,
    share,
)
from dessilbi.files.runs import Run, free_path
from dessilbi.files.storage import write_json


class ModeName(StrEnum):
    """The modes of retraining, as words of the command line."""

    FINETUNE = "finetune"
    REWIND = "rewind"
    EARLY_REWIND = "early-rewind"
    REINIT = "reinit"
    RANDOM = "random"
    DENSE = "dense"


@guarded
def retrain(
    run: Annotated[
        FilePath | None, typer.Argument(help="A run folder.", metavar="RUN", show_default=False)
    ] = None,
    ticket: TicketOption = None,
    density: Annotated[
        float | None, typer.Option(help="Or the share of weights to keep.", callback=share)
    ] = None,
    mode: Annotated[ModeName | None, typer.Option(help="From which weights.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every mode: the ticket and its controls.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many times each.")] = 1,
    compact: Annotated[
        bool, typer.Option("--compact", help="Train the physically smaller model.")
    ] = False,
    rescale: Annotated[
        bool, typer.Option("--rescale", help="Divide kept weights by the root of what is left.")
    ] = False,
    no_recalibrate: Annotated[
        bool, typer.Option("--no-recalibrate", help="Judge with BatchNorm statistics as they are.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Other than the recipe says.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SET", help="Train on another data set.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder of the data sets; by default $DESSILBI_DATA.")
    ] = None,
    out: Annotated[FilePath | None, typer.Option(help="The folder to make.")] = None,
    resume: Annotated[
        FilePath | None, typer.Option(metavar="DIR", help="Go on with what was cut short.")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a ticket again: fine-tuned, rewound, and beside its controls."""
    if (run is None) == (resume is None):
        raise fail("give either RUN or --resume DIR", 2)
    if resume is None and (ticket is None) == (density is None):
        raise fail("give exactly one of --ticket and --density", 2)
    if mode is not None and everything:
        raise fail("give either --mode or --all", 2)
    if data is not None and FilePath(data).is_dir():
        raise fail(f"--data names a data set here, not a folder: give --data-dir {data}", 2)
    from dessilbi.reporting.tables import study_table
    from dessilbi.training.progress import default_reporter
    from dessilbi.training.retraining import Wish, modes_of
    from dessilbi.training.studying import Study, carry_out, new_study, open_study

    if resume is not None:
        study = open_study(resume, data_root=data_root(data_dir))
    else:
        assert run is not None
        root = data_root(data_dir)
        wish = Wish(
            compact=compact,
            rescale=rescale,
            recalibrate=not no_recalibrate,
            epochs=epochs,
            data=data,
        )
        modes = modes_of(Run(run)) if everything else ((mode or ModeName.FINETUNE).value,)
        chosen, name = ticket_or_density(run, ticket, density, root)
        place = out or free_path(Run(run).retrained, name)
        study = new_study(Study(place, Run(run), modes, seeds, wish, root), chosen)
    rows = carry_out(study, device=device.value if device else "auto", reporter=default_reporter())
    if as_json:
        print_json({"folder": str(study.folder), "rows": [vars(row) for row in rows]})
    else:
        console().print(study_table(rows, study.wish.data))
        typer.echo(f"saved in {study.folder}")


@guarded
def prune_curve(
    run: RunArgument,
    layers: Annotated[
        str, typer.Option(help="Which, with commas between them: conv3,fc1.", show_default=False)
    ],
    no_finetune: Annotated[
        bool, typer.Option("--no-finetune", help="Only judge what is left, train nothing.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of fine-tuning, other than the recipe says.")
    ] = None,
    data: DataOption = None,
    out: Annotated[FilePath | None, typer.Option(help="The JSON file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prune layers by 10 to 90 %, by first entry, magnitude and at random, and judge the rest."""
    if no_finetune and epochs is not None:
        raise fail("--epochs are those of fine-tuning: leave it out, or --no-finetune", 2)
    if out is not None:
        check_new(out, "curve")
    from dessilbi.path.path import Path
    from dessilbi.reporting.tables import curve_table
    from dessilbi.training.curve import curve_of, names_of
    from dessilbi.training.finetune import load_trained

    path, names = Path.load(run), layers.split(",")
    names = names_of(path, names)
    trained = load_trained(Run(run), data_root=data_root(data))
    settings = trained.recipe.finetune
    if epochs is not None:
        settings = settings.model_copy(update={"epochs": epochs})
    points = curve_of(trained, path, names, finetune=None if no_finetune else settings)
    told = {
        "run": str(run),
        "layers": names,
        "dense": trained.accuracy,
        "finetune_epochs": 0 if no_finetune else settings.epochs,
        "points": [vars(point) for point in points],
    }
    folder = Run(run).curves
    if out is None:
        folder.mkdir(exist_ok=True)
    file = out or free_path(folder, "+".join(names).replace(".weight", ""), ".json")
    write_json(file, told)
    if as_json:
        print_json({**told, "file": str(file)})
    else:
        console().print(curve_table(points, names, trained.accuracy))
        typer.echo(f"saved as {file}")
