# SPDX-License-Identifier: Apache-2.0
"""Values of recipes: which numbers are allowed, words that TOML lacks, and values set by text."""

import math
import tomllib
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def _threshold(value: object) -> object:
    return math.inf if value == "inf" else value


def rules(value: object) -> object:
    """Read what TOML and JSON have no word for: "none" is no structure, "all" a whole dimension."""
    if not isinstance(value, dict):
        return value
    return {pattern: _rule(rule) for pattern, rule in value.items()}


def _rule(rule: object) -> object:
    if rule == "none":
        return None
    if isinstance(rule, list | tuple):
        return tuple(
            None if length == "all" else tuple(length) if isinstance(length, list) else length
            for length in rule
        )
    if isinstance(rule, dict):
        if set(rule) == {"structure"}:  # as TOML writes a plain structure among tables
            return _rule(rule["structure"])
        told = {key: _threshold(value) for key, value in rule.items()}
        return told | ({"structure": _rule(told["structure"])} if "structure" in told else {})
    return rule


Threshold = Annotated[float, Field(gt=0), BeforeValidator(_threshold)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    """Refuse values out of order."""
    if list(values) != sorted(values):
        raise ValueError("must be ascending")
    return values


def _line(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    places = [place for place, _ in points]
    if places != sorted(places):
        raise ValueError("must be (progress, factor) points in ascending order of progress")
    return points


Points = Annotated[tuple[tuple[NonNegative, NonNegative], ...], AfterValidator(_line)]
PositivePoints = Annotated[tuple[tuple[NonNegative, Positive], ...], AfterValidator(_line)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Density = Annotated[float, Field(gt=0, lt=1)]


def assign(values: dict[str, Any], assignment: str) -> None:
    """Set one "key=value" text on top of plain values, in place.

    Raises:
        ValueError: The text is not of that form.
    """
    key, equals, text = assignment.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {assignment!r} is not of the form key=value or part.key=value")
    if keys[0] == "structure" and len(keys) > 2:
        keys = ["structure", ".".join(keys[1:])]  # parameter names have dots of their own
    for step in keys[:-1]:
        values = values.setdefault(step, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {assignment!r}: {step} has no fields of its own")
    if keys == ["optimizer", "R"] and values.get("nu") != "auto":
        values.pop("nu", None)  # one follows from the other
    elif keys == ["optimizer", "nu"] and text.strip() != "auto":
        values.pop("R", None)
    try:
        values[keys[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[keys[-1]] = text.strip()
