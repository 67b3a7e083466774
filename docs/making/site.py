# SPDX-License-Identifier: Apache-2.0
"""The documents as a web site: `python docs/making/site.py` writes site/, without network.

The pages in docs/ are written for a reader of the repository. Here they are copied to build/pages
with links that leave docs/ made to lead somewhere on the site, and given to the generator with the
order of navigation.py. Warnings are errors. The site also works opened as files, search included.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import tomli_w

sys.path.insert(0, str(Path(__file__).parent))
from navigation import navigation

ROOT = Path(__file__).parents[2]
DOCS, PAGES = ROOT / "docs", ROOT / "build" / "pages"
LINK = re.compile(r"(?<!!)\[([^\]\[]*)\]\(([^)#\s]+)([^)]*)\)")
FIGURE = re.compile(r"^(!\[[^\]]*\]\((\S+\.svg)\))$", re.M)


def place_of(source: Path) -> str:
    """Return where a file of the repository lies on the site."""
    if source.is_relative_to(DOCS) and source.suffix != ".py":
        return source.relative_to(DOCS).as_posix()
    if source.name == "README.md":
        return "index.md"
    if source.suffix == ".md" and source.parent == ROOT:
        return f"project/{source.name.lower()}"
    return f"files/{source.relative_to(ROOT).as_posix()}.txt"  # shown, not downloaded


def title_of(page: Path) -> str:
    """Return the first heading of a page."""
    return page.read_text().splitlines()[0].lstrip("# ")


def rewritten(text: str, source: Path, wanted: set[Path]) -> str:
    """Point the links of a page to places on the site; note the files outside docs/ they need."""
    depth = place_of(source).count("/")

    def place(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        target = (source.parent / link).resolve()
        if "://" in link or not target.is_file():
            return match[0]
        if not target.is_relative_to(DOCS) or target.suffix == ".py":
            wanted.add(target)
        shown = title_of(target) if text == target.name and target.suffix == ".md" else text
        return f"[{shown}]({'../' * depth}{place_of(target)}{anchor})"

    text = FIGURE.sub(r"[\1](\2)", text)  # a phone shows it in full when it is touched
    text = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return LINK.sub(place, text)


def stage() -> None:
    """Fill build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(DOCS, PAGES, ignore=shutil.ignore_patterns("making", "*.py"))
    pages = sorted(DOCS.rglob("*.md")) + [ROOT / f"{name}.md" for name in ("CHANGELOG", "SECURITY")]
    wanted: set[Path] = set()
    while pages:
        page = pages.pop()
        file = PAGES / place_of(page)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rewritten(page.read_text(), page, wanted))
        pages += [p for p in wanted if p.suffix == ".md" and not (PAGES / place_of(p)).exists()]
    for target in wanted:
        file = PAGES / place_of(target)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, file)
    for name in ("style.css", "offline.js", "favicon.svg"):
        shutil.copyfile(DOCS / "making" / name, PAGES / name)


def add_search(site: Path) -> None:
    """Give pages that are opened as files what they may not fetch: index and worker in a script."""
    index = (site / "search.json").read_text()
    (worker,) = (site / "assets" / "javascripts" / "workers").glob("search.*.js")
    script = f"var __index = {index};\nvar __worker = {json.dumps(worker.read_text())};\n"
    (site / "search.js").write_text(script)


def settings() -> dict:
    """Return the generator's settings with the navigation in them."""
    told = tomllib.loads((DOCS / "making" / "zensical.toml").read_text())
    told["project"]["nav"] = navigation(DOCS)
    options = told["project"]["plugins"]["mkdocstrings"]["handlers"]["python"]["options"]
    options["extensions"] = [str(DOCS / "making" / "docstrings.py")]
    return told


def main() -> None:
    """Build, or end with the generator's word."""
    stage()
    config = PAGES.parent / "zensical.toml"
    config.write_text(tomli_w.dumps(settings()))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(config)]
    built = subprocess.run(command, cwd=ROOT, check=False).returncode
    if built == 0:
        add_search(PAGES.parent / "site")
        shutil.rmtree(ROOT / "site", ignore_errors=True)
        shutil.move(PAGES.parent / "site", ROOT / "site")
    sys.exit(built)


if __name__ == "__main__":
    main()
