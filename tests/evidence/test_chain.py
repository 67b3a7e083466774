# SPDX-License-Identifier: Apache-2.0
"""The evidence from plan to page, at a tiny size: `make evidence-smoke`."""

import json

import pytest
from benchmarks.evidence import page, run
from benchmarks.evidence.bench import Bench, Job, MissingError
from benchmarks.evidence.plan import planned
from benchmarks.evidence.verdicts import compare, early_goal


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Everything run once."""
    folder = tmp_path_factory.mktemp("evidence")
    bench = Bench(folder / "lines.jsonl", folder / "work", None, smoke=True)
    run.work(bench, planned(smoke=True), minutes=10)
    return bench


def test_the_whole_chain_runs_and_tells_every_cell(smoke):
    jobs = planned(smoke=True)
    assert {job.part for job in jobs} == set("abcdefhi")
    wanted = {name for job in jobs for name in run.cells(job)}
    told = [line["cell"] for line in smoke.lines()]
    assert wanted <= set(told)
    assert len(told) == len(set(told))


def test_trials_never_read_the_test_part(smoke):
    trials = [line for line in smoke.lines() if line["trial"] is not None]
    assert trials
    for line in trials:
        assert not [key for key in line if "test" in key]
        assert "val_accuracy" in line


def test_a_run_that_was_cut_short_goes_on(smoke, tmp_path):
    lines = smoke.lines()
    job = next(j for j in planned(smoke=True) if (j.part, j.method) == ("b", "iterative"))
    own = [line for line in lines if line["cell"] in run.cells(job)]
    assert len(own) > 2
    kept = [line for line in lines if line["cell"] not in run.cells(job)] + own[:2]
    bench = Bench(tmp_path / "lines.jsonl", smoke.work, None, smoke=True)
    bench.results.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert run.run_job(job, bench) == len(own) - 2
    again = {line["cell"]: line["test_accuracy"] for line in bench.lines()[len(kept) :]}
    assert again == {line["cell"]: line["test_accuracy"] for line in own[2:]}
    run.work(bench, [job], minutes=1)
    assert len(bench.lines()) == len(lines)


def test_a_job_waits_for_its_trials(tmp_path):
    bench = Bench(tmp_path / "none.jsonl", tmp_path, None, smoke=True)
    with pytest.raises(MissingError, match="0 of 1 trials"):
        run.run_job(Job("b", "fashion", "one-shot", 0, (0.3,)), bench)


def test_the_page_shows_what_is_there_and_leaves_the_rest_empty(smoke):
    text = page.text_of(smoke.lines())
    line = next(x for x in smoke.lines() if x["cell"] == "b fashion gradual 0 @ 0.3")
    row = next(r for r in text.splitlines() if r.startswith("| gradual magnitude"))
    assert row == f"| gradual magnitude | {100 * line['test_accuracy']:.2f} (1) |  |  |  |"
    assert "| ResNet-20 | | | | |" in text


def test_the_committed_page_is_the_one_of_the_committed_lines():
    assert page.RESULTS.is_file()
    text = page.RESULTS.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert page.PAGE.read_text(encoding="utf-8") == page.text_of(lines)


def test_every_method_has_as_many_trials_as_its_rivals():
    from benchmarks.evidence.settings import TRIALS

    for part, offered in TRIALS.items():
        for method, tried in offered.items():
            varied = [key for key in tried[0] if len({setting[key] for setting in tried}) > 1]
            assert len(tried) == (4 if len(varied) == 2 else 3), (part, method)


def test_level_is_a_difference_within_the_spread_of_the_seeds():
    close = {"a": [90.0, 91.0]}, {"b": [90.1, 91.5]}
    assert compare(*close)[0] == "level"
    assert compare({"a": [90.0, 90.1]}, {"b": [92.0, 92.1]})[0] == "lost"


def test_the_goal_of_early_tickets_compares_each_seed_with_its_own_dense_net():
    def line(budget, change, seed, accuracy):
        return {"budget": budget, "change": change, "seed": seed, "test_accuracy": accuracy}

    lines = [line("dense", "", 0, 0.90), line("dense", "", 1, 0.80)]
    lines += [line("rewind 0.1", "0.25", 0, 0.899), line("rewind 0.1", "0.25", 1, 0.797)]
    assert "**met**" in early_goal(lines, "digits")
    assert "0.20 (found at 0.25 of E, density 0.1)" in early_goal(lines, "digits")
    assert "**missed**" in early_goal([*lines[:3], line("rewind 0.1", "0.25", 1, 0.78)], "digits")
