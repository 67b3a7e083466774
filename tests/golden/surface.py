# SPDX-License-Identifier: Apache-2.0
"""The public surface as lines of text: names, parameters and defaults, without annotations.

Run as a program it writes public.txt again; see docs/releasing.md.
"""

import inspect
from pathlib import Path

import dessilbi

FILE = Path(__file__).with_name("public.txt")


def parameters(function):
    """The parameters of a function in one line."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def members(kind):
    """A line for each public method and property that a class has of its own."""
    for name, value in sorted(vars(kind).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"{kind.__name__}.{name}"
        elif callable(getattr(kind, name)) and not inspect.isclass(value):
            yield f"{kind.__name__}.{name}{parameters(getattr(kind, name))}"


def surface():
    """All lines, in the order of the names."""
    lines = []
    for name in sorted(set(dessilbi.__all__) - {"__version__"}):
        value = getattr(dessilbi, name)
        lines.append(f"{name}{parameters(value)}")
        if inspect.isclass(value):
            lines += members(value)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(surface())
