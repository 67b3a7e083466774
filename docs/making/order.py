# SPDX-License-Identifier: Apache-2.0
"""The order of the files in docs/architecture.md, from tests/test_layers.py.

`python docs/making/order.py` writes it; a test holds that it is current. Rooms and files of which
the order says nothing are described by the first line of their docstring.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dessilbi"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- order -->\n", "<!-- order end -->"


def order() -> dict[str, str | dict[str, str]]:
    """Return the order as the tests have it, without importing them."""
    for node in ast.parse((ROOT / "tests" / "test_layers.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ORDER":
            assert node.value is not None
            found: dict[str, str | dict[str, str]] = ast.literal_eval(node.value)
            return found
    raise LookupError("tests/test_layers.py has no ORDER")


def described(room: str) -> str:
    """Return the first line of the docstring of a room or file, without its name."""
    file = SOURCE / f"{room}.py"
    text = ast.get_docstring(
        ast.parse((file if file.exists() else SOURCE / room / "__init__.py").read_text())
    )
    assert text is not None
    name, colon, said = text.splitlines()[0].rstrip(".").replace("``", "`").partition(": ")
    return said if colon and len(name.split()) == 1 else name + colon + said


def row(place: str, said: str) -> str:
    """Return the line of a file, or of a folder inside a room."""
    ending = ".py" if (SOURCE / f"{place}.py").exists() else "/"
    return f"| `{place}{ending}` | {said or described(place)} |"


def table() -> str:
    """Return the list as it stands in the page."""
    rows = []
    for room, said in order().items():
        if isinstance(said, dict):
            rows.append(f"| **`{room}/`** | **{described(room)}** |")
            rows += [row(f"{room}/{file}", text) for file, text in said.items()]
        elif (SOURCE / f"{room}.py").exists():
            rows.append(row(room, said))
        else:
            rows.append(f"| **`{room}/`** | **{said or described(room)}** |")
    return "\n".join(["| file | what |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """Return the page with the list of today."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page())
