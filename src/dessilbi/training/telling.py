# SPDX-License-Identifier: Apache-2.0
"""Telling: a recipe as the text of a file of one's own."""

from typing import Any

from dessilbi.training.recipes import Recipe


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as the text of a file of one's own, every value written out.

    What has no value is left out. It reads back as the same recipe.
    """
    import tomli_w

    values = recipe.model_dump()
    rules = values.pop("structure")
    return tomli_w.dumps(_without_none(values) | {"structure": _told_rules(rules)})


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _told_rules(rules: dict[str, Any]) -> dict[str, Any]:
    """Write rules in the words that ``_rules`` reads, in their order: the first match decides."""
    told = {pattern: _told_rule(rule) for pattern, rule in rules.items()}
    if not any(isinstance(rule, dict) for rule in told.values()):
        return told
    # TOML writes tables last, so either all are tables or none.
    return {
        pattern: rule if isinstance(rule, dict) else {"structure": rule}
        for pattern, rule in told.items()
    }


def _told_rule(rule: Any) -> Any:
    if isinstance(rule, dict):
        return {key: _told_rule(value) for key, value in rule.items()}
    if isinstance(rule, list | tuple):
        return ["all" if length is None else length for length in rule]
    return "none" if rule is None else rule
