# SPDX-License-Identifier: Apache-2.0
"""The built site: links and anchors lead somewhere, it works from a folder, all can read it."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
VIEWS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}
KINDS = ("index", "tutorial", "recipe-fields", "api-training", "commands", "adr/0004-the-engine")
pytestmark = pytest.mark.full


class Read(HTMLParser):
    """What a page points to, what it can be pointed at, and its headings."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded, self.levels, self.nameless = set(), [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.ids.add(told.get("id"))
        if tag == "a" and told.get("href"):
            self.links.append(told["href"])
        elif told.get("href") or told.get("src"):
            self.loaded.append(told.get("href") or told.get("src"))
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if tag == "img" and not told.get("alt"):
            self.nameless.append(told.get("src"))


@pytest.fixture(scope="module")
def site():
    script = str(ROOT / "docs" / "making" / "site.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "site"


@pytest.fixture(scope="module")
def pages(site):
    found = {file: Read(file.read_text()) for file in site.rglob("*.html")}
    del found[site / "404.html"]  # is shown at any address
    assert len(found) > 40
    return found


def dead(page, link, pages):
    """Whether a link within the site leads to no file, or to no place in it."""
    path, _, anchor = link.partition("#")
    target = (page.parent / unquote(path)).resolve() if path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return True
    return bool(anchor) and target in pages and unquote(anchor) not in pages[target].ids


def within(links):
    return [link for link in links if not re.match(r"[a-z]+:", link)]


def test_links_and_anchors_lead_somewhere(pages):
    links = [(page, link) for page, read in pages.items() for link in within(read.links)]
    assert len(links) > 1000
    assert any("#" in link for _, link in links)
    assert [(page.name, link) for page, link in links if dead(page, link, pages)] == []
    start = next(page for page in pages if page.name == "index.html")
    assert dead(start, "no-such-page.html", pages)
    assert dead(start, "caveats.html#no-such-place", pages)


def test_all_that_a_page_loads_is_in_the_folder(pages):
    loaded = [(page, link) for page, read in pages.items() for link in read.loaded]
    assert any(link.endswith(".svg") for _, link in loaded)
    assert any(link.endswith("offline.js") for _, link in loaded)
    assert [link for page, link in loaded if "://" in link or dead(page, link, pages)] == []


def test_headings_descend_one_by_one_and_images_have_words(pages):
    for page, read in pages.items():
        assert read.levels[0] == 1, page.name
        steps = zip(read.levels, read.levels[1:], strict=False)
        assert all(after <= before + 1 for before, after in steps), page.name
        assert read.nameless == [], page.name


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed on this system")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def test_search_works_without_a_server(browser, site):
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "tutorial.html").as_uri())
    page.keyboard.press("Control+k")
    page.keyboard.type("threshold")
    page.get_by_text(re.compile(r"^\d+ results$")).wait_for(timeout=10_000)
    assert [url for url in asked if not url.startswith(("file:", "blob:", "data:"))] == []
    page.close()


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_no_serious_fault(browser, site, view):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    context = browser.new_context(**VIEWS[view])
    page, faults = context.new_page(), []
    for name in KINDS:
        page.goto((site / f"{name}.html").as_uri())
        page.wait_for_timeout(200)  # tables and buttons are dressed by a script
        found = axe.Axe().run(page).response
        assert "color-contrast" in {rule["id"] for rule in found["passes"]}
        faults += [
            (name, rule["id"], rule["nodes"][0]["html"][:120])
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical")
        ]
    assert faults == []
    context.close()


def test_a_phone_shows_every_kind_of_page_without_scrolling_sideways(browser, site):
    context = browser.new_context(**VIEWS["phone"])
    page = context.new_page()
    for name in (*KINDS, "evidence", "mathematics", "architecture"):
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    context.close()
