# SPDX-License-Identifier: Apache-2.0
"""Commands that look at an installation: doctor."""

from typing import Annotated

import typer

from dessilbi.cli.terminal import DataOption, SetOption, data_root, guarded, known_recipes
from dessilbi.columns import paragraph


@guarded
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Examine this recipe instead: its clock, step and first entries.",
            autocompletion=known_recipes,
        ),
    ] = None,
    assignments: SetOption = None,
    data: DataOption = None,
) -> None:
    """Say what is installed and whether runs can be written; or what a recipe will run into."""
    if recipe is None:
        from dessilbi.reporting.doctor import findings

        told = findings(data_root(data))
    else:
        from dessilbi.reporting.examination import examine
        from dessilbi.training.recipes import load_recipe

        told = examine(load_recipe(recipe, assignments or ()), data_root(data))
    for name, value in told:
        typer.echo(paragraph(value, f"{name:16} "))
