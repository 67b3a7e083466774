# SPDX-License-Identifier: Apache-2.0
"""The shell: what bash completes after the printed script, and a reader that stops reading."""

import os
import shutil
import subprocess
import sys

import pytest

from dessilbi.training.recipes import recipe_names

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash")

SCRIPT = """
_DESSILBI_COMPLETE=source_bash dessilbi > completion.bash
bash -n completion.bash || exit 1
source completion.bash
handler=$(complete -p dessilbi | sed 's/.*-F \\([^ ]*\\).*/\\1/')
while read -r -a COMP_WORDS; do
  [ "${COMP_WORDS[-1]}" = - ] && COMP_WORDS[-1]=""
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
  $handler dessilbi
  echo "${COMPREPLY[*]}"
done < lines
complete -p dessilbi
"""
LINES = {
    "a command": "dessilbi re",
    "a flag": "dessilbi train --de",
    "a recipe": "dessilbi train -",
    "a recipe to show": "dessilbi recipes show mnist",
    "a choice": "dessilbi export DIR --format o",
    "a folder": "dessilbi path run",
    "a flag behind no run": "dessilbi path nowhere --fig",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder, and an environment in which `dessilbi` is this one."""
    folder = tmp_path_factory.mktemp("shell")
    program = folder / "bin" / "dessilbi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dessilbi "$@"\n')
    program.chmod(0o755)
    return folder, {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}


def bash(here, script):
    folder, environment = here
    return subprocess.run(
        [BASH, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def completed(here):
    """What bash offers for each of the lines, and how it knows the command."""
    (here[0] / "lines").write_text("\n".join(LINES.values()) + "\n")
    done = bash(here, SCRIPT)
    assert (done.returncode, done.stderr) == (0, "")
    *offers, known = done.stdout.splitlines()
    return dict(zip(LINES, map(str.split, offers), strict=True)), known


@pytest.mark.parametrize(
    ("what", "offered"),
    [
        ("a command", ["recipes", "report", "retrain"]),
        ("a flag", ["--density", "--device"]),
        ("a recipe", recipe_names()),
        ("a recipe to show", [n for n in recipe_names() if n.startswith("mnist")]),
        ("a choice", ["onnx"]),
        ("a flag behind no run", ["--figure"]),
    ],
)
def test_bash_completes(completed, what, offered):
    assert offered
    assert sorted(completed[0][what]) == sorted(offered)


def test_where_a_run_is_asked_for_bash_completes_files(completed):
    offers, known = completed
    assert offers["a folder"] == []
    assert "-o default" in known  # bash's own, of files, where the command offers nothing


def test_a_reader_that_stops_reading_is_no_error(here):
    done = bash(here, "dessilbi recipes show digits-lenet | true; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == ("1\n", "")
