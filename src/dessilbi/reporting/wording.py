# SPDX-License-Identifier: Apache-2.0
"""Wording: numbers as a person reads them, the same on a page, in its titles and its tables."""

import math

PERCENT = "\u00a0%"


def share(value: float | None) -> str:
    """Return a fraction in percent, with digits enough to tell small ones apart.

    The space before the sign does not break.

    >>> print(share(0.98155), share(0.00123), share(0.0), share(None), sep=", ")
    98.16\u00a0%, 0.123\u00a0%, 0\u00a0%, not measured
    """
    if value is None or not math.isfinite(value):
        return "not measured"
    if value and abs(value) < 0.01:
        return f"{100 * value:.3g}{PERCENT}"
    return f"{100 * value:.2f}{PERCENT}" if value else f"0{PERCENT}"


def number(value: float | None) -> str:
    """Return a number with four digits that count.

    >>> number(1.23456), number(1e-7), number(None)
    ('1.235', '1e-07', 'not measured')
    """
    return "not measured" if value is None else f"{value:.4g}"


def count(value: int | None) -> str:
    """Return a whole number with its thousands apart.

    >>> count(61706)
    '61,706'
    """
    return "unknown" if value is None else f"{value:,}"


def part(value: int | None, whole: int | None) -> str:
    """Return "12,340 of 61,700 (20.00 %)", or the number alone where the whole is not known.

    >>> print(part(5, 20))
    5 of 20 (25.00\u00a0%)
    """
    if value is None or not whole:
        return count(value)
    return f"{value:,} of {whole:,} ({share(value / whole)})"


def epoch(value: float | None) -> str:
    """Return an epoch with one decimal, or none where it is whole.

    >>> epoch(3.0), epoch(3.25), epoch(None)
    ('3', '3.2', 'unknown')
    """
    if value is None:
        return "unknown"
    return f"{value:.0f}" if abs(value - round(value)) < 0.005 else f"{value:.1f}"


def points(value: float) -> str:
    """Return a difference of two fractions in percentage points.

    >>> points(0.0125), points(0.0001)
    ('1.25 points', '0.01 points')
    """
    return f"{100 * value:.2f} points"


def layer(name: str) -> str:
    """Return the name of a layer: that of its weight without the ending.

    >>> layer("stage1.0.conv1.weight")
    'stage1.0.conv1'
    """
    return name.removesuffix(".weight")
