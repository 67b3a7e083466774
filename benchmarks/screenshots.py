# SPDX-License-Identifier: Apache-2.0
"""Photograph the page of a run: desktop, phone and dark, into docs/images.

python benchmarks/screenshots.py runs/mnist-lenet runs/fashion-lenet   # report-NAME-desktop.png ...

Needs Chromium and playwright (in the group dev); the page is what `dessilbi report` writes.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from dessilbi.reporting.page import report_of

ROOT = Path(__file__).parents[1]
VIEWS = {
    "desktop": {"viewport": {"width": 1280, "height": 1180}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 1180}, "color_scheme": "dark"},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "color_scheme": "light",
        "device_scale_factor": 2,
    },
}


def photograph(browser: Browser, page: Path, name: str, folder: Path, *, whole: bool) -> None:
    for view, options in VIEWS.items():
        context = browser.new_context(**options)
        shown = context.new_page()
        shown.goto(page.absolute().as_uri())
        slider = shown.locator("input[type=range]").first
        if slider.count():  # in the middle of the path there is most to see
            slider.evaluate("s => { s.value = Math.round(s.max / 2) }")
            slider.dispatch_event("input")
        shown.screenshot(path=folder / f"report-{name}-{view}.png", full_page=whole)
        context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--whole", action="store_true", help="the whole page, not one screen")
    parser.add_argument("--page", type=Path, help="photograph this page instead of a new one")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = shutil.which("chromium") or shutil.which("google-chrome")  # None: playwright's own
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for run in arguments.runs:
            page = arguments.page or Path(folder, f"{run.name}.html")
            if arguments.page is None:
                page.write_text(report_of([run]).html())
            photograph(browser, page, run.name, arguments.out, whole=arguments.whole)
        browser.close()


if __name__ == "__main__":
    main()
