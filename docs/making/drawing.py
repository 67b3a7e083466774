# SPDX-License-Identifier: Apache-2.0
"""docs/images/architecture.svg: from the command line to the kernel and back.

`python docs/making/drawing.py` writes it; a test holds that it is current.
"""

from html import escape
from pathlib import Path

FILE = Path(__file__).parents[1] / "images" / "architecture.svg"
WIDTH, HEIGHT = 1040, 690
BOX = 240, 62
LEFT, MIDDLE, RIGHT = 30, 400, 770

# name: (x, y, what it does, the files)
BOXES = {
    "cli": (LEFT, 70, "command line", "cli/"),
    "recipe": (LEFT, 200, "recipe, data, model", "training/ recipes, setting"),
    "loop": (LEFT, 330, "the loop", "training/ session, loop"),
    "optimizer": (LEFT, 460, "optimizer step", "optimizers/"),
    "kernel": (LEFT, 590, "kernel", "kernels/ foreach, cpu, triton"),
    "path": (MIDDLE, 330, "path", "path/"),
    "dual": (MIDDLE, 590, "reading V", "optimizers/ dual"),
    "run": (MIDDLE, 200, "run folder", "files/"),
    "ticket": (RIGHT, 590, "ticket", "choosing/"),
    "close": (RIGHT, 460, "close", "graph/, cuts/"),
    "compact": (RIGHT, 330, "compact", "compaction/"),
    "certify": (RIGHT, 200, "certify, prove", "compaction/ certifying"),
    "ship": (RIGHT, 70, "smaller model, file", "saving/, exporting"),
}
# from, to, what travels
ARROWS = [
    ("cli", "recipe", "names and values"),
    ("recipe", "loop", "param groups, batches"),
    ("loop", "optimizer", "gradients g"),
    ("optimizer", "kernel", "W, g, m, V, ‖V‖² by block"),
    ("kernel", "dual", "V, ‖V‖²"),
    ("dual", "path", "support of Γ, ‖V‖/λ"),
    ("path", "run", "points, scores"),
    ("run", "ticket", "path, scores, W"),
    ("ticket", "close", "block masks"),
    ("close", "compact", "closed masks"),
    ("compact", "certify", "kept indices"),
    ("certify", "ship", "model and proof"),
]
HEAD = """<defs>
<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
  orient="auto"><polygon points="0,0 8,4 0,8" fill="#1a6480"/></marker>
</defs>"""
STYLE = """
text { font-family: system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #1d2733; }
.what { font-size: 17px; font-weight: 600; }
.files { font-size: 12px; fill: #53616f; font-family: ui-monospace, Menlo, Consolas, monospace; }
.flow { font-size: 13px; fill: #1a6480; font-style: italic;
  stroke: #f7f9fa; stroke-width: 6px; paint-order: stroke; }
.title { font-size: 14px; fill: #53616f; }
rect.box { fill: #ffffff; stroke: #7b8b99; stroke-width: 1.3; }
rect.once { fill: #e9f3f6; stroke: #1a6480; }
path { fill: none; stroke: #1a6480; stroke-width: 1.6; }
"""


def box(name: str) -> str:
    """Draw one box."""
    x, y, what, files = BOXES[name]
    width, height = BOX
    middle = x + width / 2
    kind = "box once" if name in ("kernel", "run") else "box"
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="7"/>'
        f'<text class="what" x="{middle}" y="{y + 26}" text-anchor="middle">{escape(what)}</text>'
        f'<text class="files" x="{middle}" y="{y + 47}" text-anchor="middle">{escape(files)}</text>'
    )


def arrow(start: str, end: str, flow: str) -> str:
    """Draw one arrow, up, down or to the right (round a corner), with what travels along it."""
    (x0, y0, *_), (x1, y1, *_) = BOXES[start], BOXES[end]
    width, height = BOX
    if x0 == x1:
        down = y1 > y0
        begin, stop = (y0 + height, y1 - 3) if down else (y0, y1 + height + 3)
        x = x0 + width / 2
        line, place = f"M{x} {begin}V{stop}", (x + 10, (begin + stop) / 2 + 5, "start")
    else:
        y, end_y, middle = y0 + height / 2, y1 + height / 2, (x0 + width + x1) / 2
        corner = f"H{middle}V{end_y}" if end_y != y else ""
        line = f"M{x0 + width} {y}{corner}H{x1 - 3}"
        place = (middle, (y + end_y) / 2 - (0 if corner else 9), "middle")
    x, y, anchor = place
    return (
        f'<path d="{line}" marker-end="url(#head)"/>'
        f'<text class="flow" x="{x}" y="{y}" text-anchor="{anchor}">{escape(flow)}</text>'
    )


def drawing() -> str:
    """Return the picture."""
    titles = [
        (LEFT, "trained once, downwards"),
        (MIDDLE, "kept on disk"),
        (RIGHT, "any member of the family, upwards"),
    ]
    width = BOX[0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>From the command line to the kernel and back</title>",
        f"<style>{STYLE}</style>",
        HEAD,
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#f7f9fa"/>',
        *(
            f'<text class="title" x="{x + width / 2}" y="42" text-anchor="middle">{text}</text>'
            for x, text in titles
        ),
        *(arrow(*line) for line in ARROWS),
        *(box(name) for name in BOXES),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")
