# SPDX-License-Identifier: Apache-2.0
"""The palette of every figure and page: one list of colours, safe for colour-blind eyes.

Hues are those of Okabe and Ito; each tone has a value for light and one for dark grounds. Lines
that meet in one figure also differ in their dashes, so that no message hangs on colour alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tone:
    """A colour with a role: ``light`` on a light ground, ``dark`` on a dark one."""

    light: str
    dark: str


TONES = {
    "dense": Tone("#5c6370", "#a5adba"),
    "ticket": Tone("#0072b2", "#56b4e9"),
    "gamma": Tone("#c04f00", "#f0a35e"),
    "tuned": Tone("#00795a", "#3cc79c"),
    "mark": Tone("#8a3f78", "#dd9fcb"),
    "ground": Tone("#ffffff", "#171a20"),
    "page": Tone("#f5f6f8", "#0f1116"),
    "ink": Tone("#1b1f27", "#e8eaee"),
    "soft": Tone("#565d6b", "#a7aebb"),
    "line": Tone("#dcdfe5", "#323844"),
    "empty": Tone("#e9ebef", "#262b34"),
}
SERIES = ("ticket", "gamma", "tuned", "mark", "dense")  # for things of one kind: runs, layers
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2 1 2 1 2")

# From early to late, readable on light and dark grounds, and by lightness alone.
RAMP = ("#3b5bb5", "#3f8fc4", "#4fb3a6", "#a6c961", "#f5c342")
# Of weights; the nearer to zero, the fainter.
NEGATIVE, POSITIVE = "#d55e00", "#1f86c9"

BLUE, ORANGE, GREEN, GREY = (TONES[name].light for name in ("ticket", "gamma", "tuned", "dense"))


def rgb(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue, from 0 to 255.

    >>> rgb("#0072b2")
    (0, 114, 178)
    """
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def between(colours: tuple[str, ...], share: float) -> tuple[int, int, int]:
    """Return the colour at a share (0 to 1) of the way along a row of colours.

    >>> between(("#000000", "#ff0000"), 0.5)
    (128, 0, 0)
    """
    place = min(max(share, 0.0), 1.0) * (len(colours) - 1)
    low = min(int(place), len(colours) - 2)
    part = place - low
    pairs = zip(rgb(colours[low]), rgb(colours[low + 1]), strict=True)
    red, green, blue = (round(a + (b - a) * part) for a, b in pairs)
    return red, green, blue
