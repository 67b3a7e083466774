# SPDX-License-Identifier: Apache-2.0
"""docs/recipe-fields.md: every field of a recipe, from the model that checks recipes.

`python docs/making/recipe_fields.py` writes it; a test holds that it is current.
"""

import inspect
import re
import textwrap
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dessilbi.training import recipes
from dessilbi.training.growth_table import GrowRecipe

PAGE = Path(__file__).parents[1] / "recipe-fields.md"
TABLES = {
    "A recipe": recipes.Recipe,
    "[optimizer]": recipes.OptimizerRecipe,
    "[schedule]": recipes.ScheduleRecipe,
    "[moving]": recipes.MovingRecipe,
    "[finetune]": recipes.FinetuneRecipe,
    "[retrain]": recipes.RetrainRecipe,
    "[stop]": recipes.StopRecipe,
    "[grow]": GrowRecipe,
}
HEAD = """\
# Fields of a recipe

Written by `python docs/making/recipe_fields.py` from the model that checks every recipe. A recipe
is a TOML file with these fields; `dessilbi train FILE.toml` trains it, `--set optimizer.nu=12` sets
one of them, and what is not a field is refused with the names of those that are.
`dessilbi recipes show NAME` prints one in full.
"""
LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def kind(annotation: Any) -> str:
    """Return a type as a reader of TOML says it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        told = [bound for one in inner[1:] if isinstance(one, FieldInfo) for bound in one.metadata]
        return kind(inner[0]) + limits(told)
    if origin is Literal:
        return ", ".join(f'"{word}"' for word in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(part) for part in inner if part is not type(None))
    if origin in (tuple, list):
        return "list"
    if origin is dict:
        return "table"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "table"
    return {int: "integer", float: "number", str: "text", bool: "true, false"}[annotation]


def limits(bounds: Iterable[Any]) -> str:
    """Return the bounds of a number, with a space before."""
    told = [
        f"{sign} {getattr(bound, name)}".replace(str(2**63), "2^63")
        for bound in bounds
        for name, sign in LIMITS.items()
        if hasattr(bound, name)
    ]
    return f" {', '.join(told)}" if told else ""


def default(field: FieldInfo) -> str:
    """Return what holds when the field is not given."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "-"
    if isinstance(value, BaseModel):
        return "its own"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value!r}`".replace("'", '"')


def prose(part: type[BaseModel]) -> str:
    """Return a docstring as Markdown."""
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda m: f"`{m[1].split('.')[-1]}`", inspect.getdoc(part))
    text = text.replace("``", "`")
    headed = re.sub(r"^(\w[^\n]*:)\n((?: {4}.*\n?)+)", _titled, text, flags=re.M)
    return headed.strip()


def _titled(match: re.Match[str]) -> str:
    return f"**{match[1].rstrip(':')}.**\n{textwrap.dedent(match[2])}\n"


def section(title: str, part: type[BaseModel]) -> str:
    """Return the section of one table."""
    rows = [
        f"| `{name}` | {kind(field.annotation)}{limits(field.metadata)} | {default(field)} |"
        for name, field in part.model_fields.items()
    ]
    table = "\n".join(["| field | value | default |", "|---|---|---|", *rows])
    return f"## {title}\n\n{prose(part)}\n\n{table}\n"


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(section(title, part) for title, part in TABLES.items())])


if __name__ == "__main__":
    PAGE.write_text(page())
