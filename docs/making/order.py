# SPDX-License-Identifier: Apache-2.0
"""The order of the files in docs/architecture.md, from tests/test_layers.py.

`python docs/making/order.py` writes it; a test holds that it is current. A file without a comment
in the order is described by the first line of its docstring.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- order -->\n", "<!-- order end -->"
ENTRY = re.compile(r'^    "(\w+)",(?:  # (.*))?$', re.M)


def exists(module: str) -> bool:
    """Return whether a place in the order is taken."""
    source = ROOT / "src" / "dessilbi"
    return (source / f"{module}.py").exists() or (source / module).is_dir()


def described(module: str) -> str:
    """Return the first line of a module's docstring."""
    source = ROOT / "src" / "dessilbi"
    file = source / f"{module}.py"
    if not file.exists():
        file = source / module / "__init__.py"
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.splitlines()[0].rstrip(".").replace("``", "`")


def place(module: str) -> str:
    """Return the file or folder of a module."""
    return f"{module}.py" if (ROOT / "src" / "dessilbi" / f"{module}.py").exists() else f"{module}/"


def table() -> str:
    """Return the list as it stands in the page."""
    listed = (ROOT / "tests" / "test_layers.py").read_text().split("ORDER = [")[1].split("\n]")[0]
    found = [(m, said) for m, said in ENTRY.findall(listed) if exists(m)]
    rows = [f"| `{place(m)}` | {said or described(m)} |" for m, said in found]
    return "\n".join(["| file | what |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """Return the page with the list of today."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page())
