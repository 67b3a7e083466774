# SPDX-License-Identifier: Apache-2.0
"""What the documents show works, and what they point to exists."""

import contextlib
import importlib.util
import io
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import dessilbi
from dessilbi.cli import app

ROOT = Path(__file__).parents[1]
MAKING = ROOT / "docs" / "making"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.S | re.M)
CODE = {page: BLOCK.findall(page.read_text()) for page in PAGES}
COMMAND = re.compile(r"(?:^    (?:torchrun .*-m )?|`)dessilbi ([^`\n]+)", re.M)


def named(page):
    return str(page.relative_to(ROOT))


def making(name, folder=MAKING):
    """A script of docs/making as a module."""
    spec = importlib.util.spec_from_file_location(f"making_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's advice
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # Lightning's call
@pytest.mark.parametrize("page", [page for page in PAGES if CODE[page]], ids=named)
def test_code_runs_as_it_stands_and_prints_what_is_shown(page):
    names, together = {}, "The blocks belong together" in page.read_text()
    for code, shown in CODE[page]:
        torch.manual_seed(0)
        names = names if together else {}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, str(page), "exec"), names)
        assert not shown or printed.getvalue() == shown


def test_there_is_code_to_run_and_output_to_compare():
    assert CODE[ROOT / "README.md"]
    assert any(shown for _, shown in CODE[ROOT / "docs" / "units.md"])


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def anchors(page):
    """Anchors of a page as GitHub makes them; those of the library's reference are its names."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]  # a link's words
    slugs = [re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-") for title in titles]
    again = [f"{slug}-{slugs[:i].count(slug)}" for i, slug in enumerate(slugs) if slug in slugs[:i]]
    return {*slugs, *again, *re.findall(r"^::: (\S+)$", text, re.M)}


def anchors_missed(text, page):
    """The links of a text that lead to no heading of the page they name, or of their own."""
    links = re.findall(r"\]\(((?:[^)#\s]*\.md)?)#([^)\s]+)\)", text)
    near = [(target, anchor) for target, anchor in links if "://" not in target]
    there = {
        target: anchors((page.parent / target).resolve() if target else page) for target, _ in near
    }
    return [f"{target}#{anchor}" for target, anchor in near if anchor not in there[target]]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_to_a_heading_find_it(page):
    assert anchors_missed(page.read_text(), page) == []


def test_a_link_to_no_heading_is_found():
    text = "[a](density.md#measured) [b](density.md#no-such) [c](#choosing) [d](#no-such)"
    page = ROOT / "docs" / "tickets.md"
    assert anchors_missed(text, page) == ["density.md#no-such", "#no-such"]


def options_of(command):
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def unknown_in(line):
    """The first word of a command line that the command line does not know, or None."""
    command, words = get_command(app), line.split("#")[0].split("|")[0].replace("[", " ").split()
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if words[0].isupper():  # "dessilbi COMMAND --help"
            return None
        if words[0].strip(".,;:)]") not in command.commands:
            # a group may also be called by itself, as in "dessilbi recipes lists them"
            return words[0] if command.name != "recipes" else None
        command, words = command.commands[words[0].strip(".,;:)]")], words[1:]
    known = {*options_of(command), "--help"}
    given = [w.strip(".,;:)]").split("=")[0] for w in words if w.startswith("-") and len(w) > 1]
    return next((option for option in given if option not in known), None)


def commands_in(page):
    return COMMAND.findall(page.read_text().replace("\\\n", " "))


@pytest.mark.parametrize("page", [p for p in PAGES if commands_in(p)], ids=named)
def test_commands_and_options_shown_exist(page):
    wrong = {line: unknown_in(line) for line in commands_in(page)}
    assert not {line: word for line, word in wrong.items() if word is not None}


def test_a_command_or_option_that_does_not_exist_is_found():
    assert unknown_in("train mnist-lenet --data DIR") is None
    assert unknown_in("trian mnist-lenet") == "trian"
    assert unknown_in("train mnist-lenet --dat DIR") == "--dat"


def test_the_page_of_commands_is_what_they_say_of_themselves():
    pinned = re.search(r"^typer==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    if pinned is None or pinned.group(1) != version("typer"):
        pytest.skip("another typer words its help in another way")
    script = making("write_commands", ROOT / "docs")
    told = script.page()
    assert told == script.PAGE.read_text(encoding="utf-8"), "run: python docs/write_commands.py"
    for name in ("train", "path", "filters", "recipes show"):
        assert f"### dessilbi {name}\n" in told


def test_the_readme_names_the_commands_of_the_makefile():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "check", "test", "test-full", "docs"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.M)


def listed(entries):
    """The pages of a navigation, in order."""
    for entry in entries:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else listed(target)


def test_every_page_has_one_place_in_the_navigation():
    docs = ROOT / "docs"
    places = listed(making("navigation").navigation(docs))
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    pages = {page for page in pages if not page.startswith("results/")}
    assert sorted(p for p in places if not p.startswith("project/")) == sorted(pages)


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    names = set(dessilbi.__all__) - {"__version__"}
    assert {f"dessilbi.{name}" for name in names} <= set(re.findall(r"^::: (\S+)$", text, re.M))


def test_the_fields_of_recipes_are_those_of_today():
    script = making("recipe_fields")
    assert script.PAGE.read_text() == script.page()


def test_the_order_of_files_is_that_of_today():
    script = making("order")
    assert script.PAGE.read_text() == script.page()


def test_the_drawing_is_that_of_its_script():
    script = making("drawing")
    assert script.FILE.read_text(encoding="utf-8") == script.drawing()


def test_examples_in_docstrings_become_code_and_references_words():
    text = "Say :func:`~a.b.close` and ``x``.\n\n>>> 1 + 1\n2\n\nMore."
    script = making("docstrings")
    assert script.as_markdown(text) == (
        "Say `close` and `x`.\n\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore."
    )
