# SPDX-License-Identifier: Apache-2.0
"""The Summary and every table of the terminal, word by word, on records that never change.

expected.py says how to renew the files in golden/.
"""

import io
import json

import pytest
import records
from commands import call
from expected import GOLDEN, assert_golden
from rich.cells import cell_len
from rich.console import Console

from dessilbi.cli.terminal import console
from dessilbi.columns import SPELLED
from dessilbi.outcomes.auditing import Finding
from dessilbi.reporting import tables
from dessilbi.reporting.summary import summarise
from dessilbi.training.finetune import Outcome

OUTCOMES = [Outcome(d, d + 0.01, 0.5 + d / 2, 0.9 + d / 10) for d in (0.5, 0.1, 0.02)]
SHIPPED = records.SimpleNamespace(
    bytes_before=247000, bytes_after=88000, latency_ms_before=0.512, latency_ms_after=0.25
)


def shown(table):
    if isinstance(table, str):
        return f"{table}\n"
    console = Console(width=80, file=io.StringIO(), markup=False, emoji=False, highlight=False)
    console.print(table)
    return console.file.getvalue()


TABLES = {
    "path": lambda: tables.path_table(summarise(GOLDEN / "run")),
    "family": lambda: tables.family_table(records.members(), "dual"),
    "family-large": lambda: tables.family_table(records.members(10**5), "weight"),
    "study": lambda: tables.study_table(records.studied(), None),
    "study-large": lambda: tables.study_table(records.studied(10**5), "fashion-mnist"),
    "curve": lambda: tables.curve_table(records.curve(), ["conv3.weight", "fc1.weight"], 0.99),
    "outcome": lambda: tables.outcome_table(OUTCOMES, 0.99, 5),
    "size": lambda: tables.size_table(records.shrunk(), SHIPPED, 0.98),
    "growth": lambda: tables.growth_table(records.rounds()),
    "filters": lambda: tables.filter_table(records.filters()),
    "plan": lambda: str(records.plan()),
    "proof": lambda: tables.proof_text(records.proof()),
}


def test_the_summary_of_a_run_stays_what_it_was():
    told = summarise(GOLDEN / "run").to_json()
    assert_golden("summary.json", json.dumps(told, indent=1) + "\n")


def test_this_version_writes_a_run_with_the_same_summary(tmp_path):
    made = records.make_run(tmp_path / "run")
    assert summarise(made.folder).rows == summarise(GOLDEN / "run").rows


@pytest.mark.parametrize("name", TABLES)
def test_a_table_stays_what_it_was_and_fits_80_columns(name):
    text = shown(TABLES[name]())
    assert_golden(f"{name}.txt", text)
    assert max(map(len, text.splitlines())) <= 80


def test_a_terminal_that_knows_ascii_alone_shows_the_same_columns():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=SPELLED)
    Console(width=80, file=stream, markup=False, highlight=False).print(TABLES["path"]())
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert_golden("path-ascii.txt", text)
    assert [len(line) for line in text.splitlines()] == [
        len(line) for line in (GOLDEN / "path.txt").read_text(encoding="utf-8").splitlines()
    ]
    assert "?" not in text


FOUND = [
    ("python", "3.11.7 on Linux"),
    ("lightning-fabric", "2.6.6"),
    ("data", "no folder given: use --data DIR or set $DESSILBI_DATA"),
    ("", "mnist: not there, and this is told in a sentence that is longer than one line has room"),
]
FINDINGS = [
    Finding("recipe.json", "good"),
    Finding("path.jsonl", "damaged", "its checksum is another: restore it from a copy of the run"),
    Finding("retrained/density-0.1/finetune-0/checkpoints/step-0000000858", "unchecked", "old"),
]


@pytest.mark.usefixtures("command_line")
def test_recipes_doctor_and_verify_print_what_they_printed(monkeypatch):
    monkeypatch.setattr(
        "dessilbi.cli.training.recipe_names", lambda: ["digits-lenet", "cifar10-resnet50-lasso"]
    )
    monkeypatch.setattr("dessilbi.reporting.doctor.findings", lambda _: FOUND)
    monkeypatch.setattr("dessilbi.outcomes.auditing.audit", lambda _: FINDINGS)
    told = [call("recipes"), call("doctor"), call("verify", GOLDEN / "run")]
    text = "\n".join(each.stdout for each in told).replace(str(GOLDEN), "GOLDEN")
    assert_golden("recipes-doctor-verify.txt", text)
    assert max(map(len, text.splitlines())) <= 80


NAMES = {
    "long": "features.denseblock4.denselayer16.transition." * 6 + "conv{}.weight",
    "markup": "[bold red]conv[/nothing][link=x]{}[/]" * 3,
    "escapes": "conv\x1b[31m\x1b[2J\r\n\t\x07{}\x00\u202e",
    "wide": "层" * 60 + "{}",
    "emoji": ":smile:🙂\u0301" * 15 + "{}",
    "blanks": "  a  " * 30 + "{}",
}


@pytest.mark.parametrize("kind", NAMES)
def test_no_name_breaks_a_line_or_reaches_past_80_columns(kind, tmp_path):
    names = [NAMES[kind].replace("{}", str(k)) for k in range(3)]
    run = records.make_run(tmp_path / "run", names, recipe=names[0])
    for table in (
        tables.path_table(summarise(run.folder)),
        tables.curve_table(records.curve(), names, 0.99),
        tables.study_table(records.studied(), names[0]),
        tables.growth_table(records.rounds(names)),
        tables.filter_table(records.filters(names[0], names[1])),
        str(records.plan(names[0])),
        tables.proof_text(records.proof(names[0])),
    ):
        text = shown(table)
        assert max(map(cell_len, text.splitlines())) <= 80
        assert all(c.isprintable() or c == "\n" for c in text)


def test_names_that_are_alike_stay_apart_where_they_are_shortened():
    names = [f"stage.{i}.block.{i}.branch.deep.inside.conv.weight" for i in range(12)]
    text = shown(tables.growth_table(records.rounds(names)))
    told = [line.split()[0] for line in text.split("to its end\n")[1].splitlines()[:12]]
    assert len(set(told)) == 12
    assert max(map(len, told)) <= tables.NAME


def test_a_net_of_many_layers_says_how_many_are_left_out(tmp_path):
    names = [f"layer{i}.0.conv{i}.weight" for i in range(57)]
    text = shown(tables.path_table(summarise(records.make_run(tmp_path / "run", names).folder)))
    assert "... and 37 more layers; --json has them all" in text
    assert max(map(len, text.splitlines())) <= 80


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "coloured"),
    [
        (Terminal, {"TERM": "xterm-256color"}, True),
        (Terminal, {"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {"TERM": "xterm-256color", "FORCE_COLOR": "1"}, False),
    ],
    ids=["terminal", "NO_COLOR", "dumb", "pipe"],
)
def test_there_is_colour_on_a_terminal_that_wants_it_alone(
    stream, variables, coloured, monkeypatch
):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", found := stream())
    console().print(TABLES["path"]())
    monkeypatch.undo()
    assert "from simple to complex" in found.getvalue()
    assert ("\x1b[" in found.getvalue()) == coloured


@pytest.mark.usefixtures("command_line")
def test_json_is_never_coloured(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = call("path", GOLDEN / "run", "--json")
    assert len(json.loads(result.stdout)["points"]) == records.NUM_POINTS
    assert "\x1b" not in result.stdout
