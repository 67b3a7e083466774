# SPDX-License-Identifier: Apache-2.0
"""The page of a run in a real Chromium: it works, it is quiet, and everybody can use it."""

import json
import re
import shutil

import pytest
from handmade import EVIL, QUOTES, SCRIPT, handmade

from dessilbi.reporting.page import report_of

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed on this system")

PHONE = {"width": 390, "height": 844}
PAPER = {"width": 688, "height": 1017}  # A4 within the margins of the style, in CSS pixels
VIEWS = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": PHONE, "color_scheme": "dark"},
}
NAMES = ("conv1.weight", f"{EVIL}.weight", f"{SCRIPT}.weight", f"{QUOTES}.weight")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A page of two runs, one with hostile names."""
    folder = tmp_path_factory.mktemp("page")
    hostile = handmade(folder / f"<u>{EVIL[:4]}", points=8, names=NAMES, summary=SCRIPT)
    plain = handmade(folder / "plain", points=5)
    (folder / "report.html").write_text(report_of([hostile.folder, plain.folder]).html())
    return folder / "report.html"


class Opened:
    """A page, and all that it did."""

    def __init__(self, browser, file, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())


@pytest.fixture
def opened(browser, file):
    found = Opened(browser, file)
    yield found
    found.context.close()


def frames_in(page, run):
    return json.loads(page.locator("#frames").text_content())[run]


def assert_shows(page, run, place):
    """Every number beside the slider of a run is that of a place on it."""
    told = frames_in(page, run)
    frame = told["frames"][place]
    box = page.locator(f"[data-run='{run}']")
    shown = box.evaluate(
        "b => Object.fromEntries([...b.querySelectorAll('[data-field]')]"
        ".map(f => [f.dataset.field, f.textContent]))"
    )
    assert shown == frame["shown"]
    assert box.locator("[data-count]").all_text_contents() == [
        f"{alive} of {total}" for alive, total in zip(frame["alive"], told["totals"], strict=True)
    ]
    widths = box.evaluate(
        "b => [...b.querySelectorAll('[data-bar]')].map(r => r.width.baseVal.value)"
    )
    assert widths == pytest.approx(
        [100 * alive / total for alive, total in zip(frame["alive"], told["totals"], strict=True)],
        abs=1e-3,
    )
    assert box.locator("input").get_attribute("aria-valuetext") == frame["said"]
    return shown


def move(page, run, place):
    page.locator(f"[data-run='{run}'] input").evaluate(
        "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input')) }",
        place,
    )


def test_every_number_follows_the_slider(opened):
    seen = []
    for place in (0, 3, 7, 5):
        move(opened.page, 0, place)
        seen.append(assert_shows(opened.page, 0, place)["ticket"])
    assert len(set(seen)) == 4
    assert_shows(opened.page, 1, 4)  # the other run's stays


def test_the_slider_moves_with_the_keyboard(opened):
    opened.page.locator("#slider-1").focus()
    for key, place in (("ArrowLeft", 3), ("Home", 0), ("ArrowRight", 1), ("End", 4)):
        opened.page.keyboard.press(key)
        assert_shows(opened.page, 1, place)


def test_a_line_in_the_figures_follows_the_slider(opened):
    line = opened.page.locator("#r1-accuracy-by-epoch .now")
    places = []
    for place in (0, 2, 4):
        move(opened.page, 1, place)
        assert line.get_attribute("visibility") == "visible"
        places.append(float(line.get_attribute("x1")))
    # Epochs 1, 3 and 5 of 5 on an axis from 56 to 466.
    assert places == pytest.approx([56 + 410 * epoch / 5 for epoch in (1, 3, 5)])


def test_one_layer_is_shown_and_another_can_be_chosen(opened):
    choice = opened.page.locator("#layers-0")
    figures = opened.page.locator("#filters-0 ~ .figures .chooser figure")
    assert figures.count() == len(NAMES)
    for number in (0, 2):
        choice.select_option(index=number)
        assert [figures.nth(i).is_visible() for i in range(len(NAMES))] == [
            i == number for i in range(len(NAMES))
        ]


def test_the_command_can_be_copied(opened):
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.page.locator("[data-run='1'] [data-copy]").click()
    opened.page.get_by_text("Copied.").wait_for()
    copied = opened.page.evaluate("navigator.clipboard.readText()")
    assert copied == frames_in(opened.page, 1)["frames"][-1]["shown"]["command"]


def test_tab_reaches_all_that_can_be_used_in_order(opened):
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.textContent") == "Skip to the content"
    reached = []
    for _ in range(40):
        opened.page.keyboard.press("Tab")
        reached.append(
            opened.page.evaluate("document.activeElement.id || document.activeElement.tagName")
        )
    assert "slider-0" in reached
    assert "BUTTON" in reached


def test_nothing_leaves_the_page_and_the_console_stays_empty(opened, file):
    move(opened.page, 0, 3)
    opened.page.locator("summary").first.click()
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [file.as_uri()]


def test_hostile_names_are_inert(opened):
    page = opened.page
    move(page, 0, 3)
    assert page.title() == "2 runs side by side - DessiLBI"
    assert page.locator("img").count() == 0
    assert page.locator("u").count() == 0
    assert page.locator("script").count() == 2
    names = page.locator("[data-run='0'] .bars tbody th").all_text_contents()
    assert names == [name.removesuffix(".weight") for name in NAMES]


def test_even_a_name_that_got_through_would_be_refused_by_the_policy(opened):
    opened.page.evaluate(
        "m => document.querySelector('main').insertAdjacentHTML('beforeend', m)", EVIL
    )
    opened.page.wait_for_timeout(100)
    assert opened.page.title() == "2 runs side by side - DessiLBI"
    assert any("Content Security Policy" in text for text in opened.said)


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_no_serious_fault(browser, file, view):
    opened = Opened(browser, file, **VIEWS[view])
    found = axe_api.Axe().run(opened.page).response
    assert len(found["passes"]) > 20
    assert {rule["id"] for rule in found["passes"]} >= {"color-contrast", "label", "svg-img-alt"}
    grave = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in grave] == []
    opened.context.close()


def test_axe_does_find_faults(opened):
    opened.page.evaluate("document.querySelector('label[for=slider-0]').remove()")
    found = axe_api.Axe().run(opened.page, options={"runOnly": ["label"]}).response
    assert "label" in {v["id"] for v in found["violations"]}


def test_a_phone_shows_the_page_without_scrolling_sideways(browser, file):
    opened = Opened(browser, file, viewport=PHONE)
    width = opened.page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"]
    letters = opened.page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg.figure')].filter(s => s.clientWidth)"
        ".map(s => s.getScreenCTM().a * 11))"
    )
    assert letters >= 7
    opened.context.close()


def test_without_scripts_the_page_still_shows_the_end_and_every_layer(browser, file):
    opened = Opened(browser, file, java_script_enabled=False)
    text = opened.page.content()
    assert "step 50" in text
    assert re.search(r'<p class="pick" hidden', text)
    assert opened.page.locator("#filters-1 ~ .figures .chooser figure").count() == 2
    opened.context.close()


@pytest.fixture
def printed(browser, file):
    """The page as a dark screen has it; `on_paper` makes it what a printer gets."""
    found = Opened(browser, file, color_scheme="dark", viewport=PAPER)
    yield found.page
    found.context.close()


def on_paper(page):
    page.emulate_media(media="print", color_scheme="dark")


def shown(page, selector):
    """Whether each element of a kind can be seen."""
    return page.locator(selector).evaluate_all("found => found.map(e => e.checkVisibility())")


def test_paper_has_no_controls(printed):
    controls = "nav, .skip, input, button, select, [data-status]"
    assert all(shown(printed, controls))
    on_paper(printed)
    assert not any(shown(printed, controls))


def test_paper_has_the_model_at_the_slider(printed):
    move(printed, 0, 3)
    on_paper(printed)
    assert_shows(printed, 0, 3)
    assert all(shown(printed, "[data-run] :is([data-field], [data-count], [data-bar])"))


def test_paper_is_light_under_a_dark_scheme(printed):
    def greys():
        return printed.evaluate(
            "[['h1', 'color'], ['.now', 'stroke'], ['body', 'backgroundColor'],"
            " ['.card', 'backgroundColor']].map(([one, what]) => {"
            "  const told = getComputedStyle(document.querySelector(one))[what];"
            "  return told.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + +part / 3, 0) })"
        )

    for part, ink in zip(greys(), (True, True, False, False), strict=True):
        assert part > 150 if ink else part < 60
    on_paper(printed)
    for part, ink in zip(greys(), (True, True, False, False), strict=True):
        assert part < 110 if ink else part > 250


def test_paper_cuts_no_figure_and_no_row(printed):
    kinds = {"figure", "tr", ".tiles div", ".command"}

    def kept():
        told = "k => getComputedStyle(document.querySelector(k)).breakInside"
        return {kind for kind in kinds if printed.evaluate(told, kind) == "avoid"}

    assert kept() == set()
    on_paper(printed)
    assert kept() == kinds
    # Chromium hands a grid's row to the next page as a whole: figures are not in one.
    layout = "[...document.querySelectorAll('.figures')].map(f => getComputedStyle(f).display)"
    assert set(printed.evaluate(layout)) == {"block"}


def test_paper_has_the_settings_and_only_the_tables_that_were_opened(printed):
    printed.locator("figure summary").first.click()
    tables, settings = "figure details .scroll", "details.card pre"
    assert not any(shown(printed, settings))
    on_paper(printed)
    assert len(shown(printed, settings)) >= 2
    assert all(shown(printed, settings))
    assert shown(printed, tables).count(True) == 1
    assert shown(printed, "figure summary").count(True) == 1


def test_paper_is_wide_enough(printed):
    printed.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    on_paper(printed)
    cut = printed.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() &&"
        " !e.closest('.hidden') && (e.getBoundingClientRect().right > innerWidth + 1 ||"
        " e.matches('.scroll, pre') && e.scrollHeight > e.clientHeight + 1))"
        ".map(e => e.tagName + ' ' + e.textContent.slice(0, 60))"
    )
    assert cut == []
