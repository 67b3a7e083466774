# SPDX-License-Identifier: Apache-2.0
"""What the documents show works, and what they point to exists."""

import re
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from dessilbi.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)


CODE = [(page, code) for page in PAGES for code in blocks(page)]
SHOWN = [
    (page, code, output)
    for page in PAGES
    for code, output in re.findall(
        r"^```python\n((?:(?!^```).)*?)^```\n\n```text\n(.*?)^```", page.read_text(), re.S | re.M
    )
]


def test_there_is_code_to_run():
    assert any(page.name == "README.md" for page, _ in CODE)
    assert any(page.name == "units.md" for page, _, _ in SHOWN)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # Lightning's call
@pytest.mark.parametrize(
    ("page", "code"), CODE, ids=lambda v: v.name if isinstance(v, Path) else ""
)
def test_code_blocks_run_as_they_stand(page, code):
    torch.manual_seed(0)
    exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize(
    ("page", "code", "output"), SHOWN, ids=lambda v: v.name if isinstance(v, Path) else ""
)
def test_text_after_code_is_what_the_code_prints(page, code, output, capsys):
    exec(compile(code, str(page), "exec"), {})
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_the_readme_names_the_commands_of_the_makefile():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "check", "test", "test-full"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_page_of_commands_is_what_they_say_of_themselves():
    pinned = re.search(r"^typer==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    if pinned is None or pinned.group(1) != version("typer"):
        pytest.skip("another typer words its help in another way")
    spec = spec_from_file_location("write_commands", ROOT / "docs" / "write_commands.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    told = script.page()
    assert told == script.PAGE.read_text(encoding="utf-8"), "run: python docs/write_commands.py"
    for name in ("train", "path", "filters", "recipes show"):
        assert f"### dessilbi {name}\n" in told


def test_the_readme_shows_commands_that_exist():
    shown = re.findall(r"^    dessilbi ([a-z-]+)", (ROOT / "README.md").read_text(), re.M)
    assert len(shown) > 8
    known = {name.replace("_", "-") for part in COMMANDS.values() for name in map(name_of, part)}
    assert set(shown) <= known | {"recipes"}


def name_of(command):
    return command.__name__
