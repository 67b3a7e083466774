# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ run, in smoke size, and stay short."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
named = pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, *arguments):
        monkeypatch.setattr("sys.argv", [script.name, "--smoke", *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@named
def test_an_example_is_short_and_says_how_to_run_it(script):
    text = script.read_text()
    assert len(text.splitlines()) < 60
    assert f"python examples/{script.name} [--smoke]" in text


@pytest.mark.parametrize(
    "script", [s for s in EXAMPLES if "resume" not in s.name], ids=lambda script: script.stem
)
def test_an_example_runs(script, run):
    if "onnx" in script.name:
        pytest.importorskip("onnxruntime")
    assert run(script)


def test_the_loop_that_was_cut_goes_on_where_it_was_saved(run, tmp_path, capsys):
    script = next(s for s in EXAMPLES if s.stem == "resume_own_loop")
    with pytest.raises(SystemExit, match="crashed at step 15"):
        run(script, tmp_path)
    assert "from step 0" in capsys.readouterr().out
    told = run(script, tmp_path)
    assert "from step 10" in told
    assert "done: 30 points" in told
