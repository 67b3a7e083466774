# SPDX-License-Identifier: Apache-2.0
"""Docstrings for the site: cross references, double backticks and examples become Markdown."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?([\w.]+)`")
EXAMPLE = re.compile(r"^( *)>>> .*\n?(?:\1\S.*\n?)*", re.M)


def as_markdown(text: str) -> str:
    """Return a docstring with ``code`` and :func:`name` as code, and examples in fences."""
    text = ROLE.sub(lambda match: f"`{match[1].rsplit('.', 1)[-1]}`", text).replace("``", "`")
    parts = EXAMPLE.sub(lambda m: f"\n{m[1]}```pycon\n{m[0].rstrip()}\n{m[1]}```\n", text)
    return re.sub(r"\n```\n+\n```pycon\n", "\n\n", parts)  # one example, with an empty line in it


class Markdown(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
