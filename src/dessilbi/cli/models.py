# SPDX-License-Identifier: Apache-2.0
"""Commands on models, before anything is trained: plan."""

from typing import Annotated

import typer

from dessilbi.cli.terminal import JsonOption, RecipeName, SetOption, guarded, print_json
from dessilbi.training.recipes import RecipeError, load_recipe


@guarded
def plan(
    recipe: RecipeName,
    assignments: SetOption = None,
    coupled: Annotated[
        bool, typer.Option("--coupled", help="Couple filters that are removed together.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what training a recipe could remove from its model; needs no data."""
    from dessilbi.planning import plan as plan_model
    from dessilbi.training.ingredients import data_of, model_of

    chosen = load_recipe(recipe, assignments or ())
    # Made-up samples have the shape of the real ones and need no files.
    known, _, _ = chosen.data.partition(":")
    made_up = chosen.data if known == "generated" else f"generated:{chosen.data}"
    data = data_of(chosen.model_copy(update={"data": made_up, "validation": 1}), root=None)
    model = model_of(chosen, data)
    try:
        planned = plan_model(
            model,
            chosen.structure,
            example_inputs=data.blank(),
            coupled=coupled or chosen.coupled,
        )
    except ValueError as error:
        raise RecipeError(f"recipe {chosen.name}: {error}") from None
    if as_json:
        print_json(planned.to_json())
    else:
        typer.echo(str(planned))
