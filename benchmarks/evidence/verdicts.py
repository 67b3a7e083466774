# SPDX-License-Identifier: Apache-2.0
"""What the numbers come to, by the rules of PROTOCOL.md: won, level or lost."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

Line = dict[str, Any]
GOAL_A, GOAL_D = 0.2, 0.3  # points
BOTH = {"test_accuracy": "At the end", "once_test_accuracy": "Right after"}
COSTLIER = "iterative"  # outside the comparison at equal training


def _groups(lines: Sequence[Line], part: str, key: str) -> dict[tuple[str, Any], list[float]]:
    found: dict[tuple[str, Any], list[float]] = {}
    for line in lines:
        if line["part"] == part and line["trial"] is None and key in line:
            found.setdefault((line["method"], line["budget"]), []).append(100 * line[key])
    return found


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def compare(
    ours: Mapping[str, Sequence[float]], rivals: Mapping[str, Sequence[float]]
) -> tuple[str, str, float]:
    """Return the verdict, the best rival and how far the better of ours is above it.

    >>> compare({"x": [90.0, 91.0]}, {"y": [88.0, 88.5], "z": [80.0, 80.0]})
    ('won', 'y', 2.25)
    """
    own = max(ours, key=lambda name: mean(ours[name]))
    best = max(rivals, key=lambda name: mean(rivals[name]))
    ahead = mean(ours[own]) - mean(rivals[best])
    spread = max(_spread(ours[own]), _spread(rivals[best]))
    return ("level" if abs(ahead) <= spread else "won" if ahead > 0 else "lost"), best, ahead


def _verdicts(
    lines: Sequence[Line], part: str, budgets: Sequence[Any], names: Mapping[str, str], key: str
) -> Iterator[tuple[str, str]]:
    groups = _groups(lines, part, key)
    for budget in budgets:
        at = {m: v for (m, b), v in groups.items() if b == budget and m != COSTLIER}
        ours = {m: v for m, v in at.items() if m.startswith("dessilbi")}
        rivals = {m: v for m, v in at.items() if m not in ours}
        if ours and rivals:
            verdict, best, ahead = compare(ours, rivals)
            yield verdict, f"{budget}: {verdict} ({ahead:+.2f} against {names[best]})"


def tally(
    lines: Sequence[Line],
    part: str,
    budgets: Sequence[Any],
    names: Mapping[str, str],
    told: Mapping[str, str] = BOTH,
) -> str:
    """Return the verdicts of a part, in words, as far as its lines are there."""
    text = ""
    for key, what in told.items():
        found = list(_verdicts(lines, part, budgets, names, key))
        if found:
            text += f"{what}: " + "; ".join(words for _, words in found) + ".\n"
    return text


def optimizers_goal(lines: Sequence[Line]) -> str:
    """Return whether W of DessiLBI comes within 0.2 points of the best optimizer, by task."""
    told = []
    for task in ("fashion", "mnist"):
        own = [x for x in lines if x["part"] == "a" and x["task"] == task and x["trial"] is None]
        groups = {m: v for (m, _), v in _groups(own, "a", "test_accuracy").items()}
        ours = {m: v for m, v in groups.items() if m.startswith("dessilbi")}
        rivals = {m: v for m, v in groups.items() if m not in ours}
        if ours and rivals:
            _, best, ahead = compare(ours, rivals)
            met = "met" if ahead >= -GOAL_A else "missed"
            told.append(f"{task}: {ahead:+.2f} points against {best}, **{met}**")
    return f"Goal, W within {GOAL_A} points of the best: " + "; ".join(told) + ".\n" if told else ""


def early_goal(lines: Sequence[Line], name: str) -> str:
    """Return whether an early ticket comes within 0.3 points of dense, for the lines of a task."""
    dense = {x["seed"]: x["test_accuracy"] for x in lines if x["budget"] == "dense"}
    told = []
    for share in ("0.1", "0.25"):
        for density in (0.1, 0.05):
            gaps = [
                100 * (dense[x["seed"]] - x["test_accuracy"])
                for x in lines
                if x["change"] == share
                and x["budget"] == f"rewind {density}"
                and x["seed"] in dense
            ]
            if gaps:
                told.append(
                    (mean(gaps), f"{mean(gaps):.2f} (found at {share} of E, density {density})")
                )
    if not told:
        return ""
    met = "met" if min(told)[0] <= GOAL_D else "missed"
    listed = "; ".join(text for _, text in told)
    goal = f"{name}, goal of {GOAL_D} points below dense at most: **{met}**."
    return f"{goal} Points below dense: {listed}.\n"
