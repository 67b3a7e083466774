# SPDX-License-Identifier: Apache-2.0
"""Studies: a ticket and its controls, several times, in one table."""

import json
import statistics
from pathlib import Path as FilePath

import pytest
import tiny
import torch
from commands import assert_failed, call
from safetensors.torch import load_file
from tiny import QUICK, train_tiny

from dessilbi import Path, Ticket
from dessilbi.files.runs import Run
from dessilbi.files.storage import read_json
from dessilbi.training import studying
from dessilbi.training.data import DATA_SETS

pytestmark = [
    pytest.mark.usefixtures("command_line"),
    pytest.mark.filterwarnings("ignore:layers that keep less"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few") / "run"
    return train_tiny(folder, *QUICK, "finetune.epochs=1")


def test_all_runs_the_ticket_and_its_controls_in_one_table(run, tmp_path):
    wanted = ("--density", 0.4, "--all", "--seeds", 2, "--epochs", 1, "--out", "s")
    result = call("retrain", run.folder, *wanted, "--json")
    assert result.exit_code == 0, result.output
    rows = {row["mode"]: row for row in json.loads(result.stdout)["rows"]}
    assert list(rows) == ["finetune", "rewind", "early-rewind", "reinit", "random", "dense"]
    for mode, row in rows.items():
        told = [Run(tmp_path / "s" / f"{mode}-{n}").read_status() for n in (0, 1)]
        assert {one["status"] for one in told} == {"finished"}
        accuracies = [one["accuracy"] for one in told]
        assert row["accuracy"] == statistics.mean(accuracies)
        assert row["std"] == statistics.stdev(accuracies)
        assert (row["before"] is not None) == (mode == "finetune")
        assert row["density"] == (1.0 if mode == "dense" else pytest.approx(row["density"]))
    densities = {mode: row["density"] for mode, row in rows.items()}
    assert densities["finetune"] == densities["rewind"] == densities["reinit"] < 0.4 + 1e-9
    assert read_json(tmp_path / "s" / "results.json")["rows"] == list(rows.values())
    shown = call("retrain", "--resume", "s").stdout  # all is there: only the table is made again
    assert "early-rewind" in shown
    assert "saved in s" in shown


def test_a_ticket_file_is_retrained_on_the_compacted_model(run):
    assert call("ticket", run.folder, "--density", 0.3, "--out", "t.safetensors").exit_code == 0
    result = call("retrain", run.folder, "--ticket", "t.safetensors", "--compact", "--out", "s")
    assert result.exit_code == 0, result.output
    assert "A ticket, trained again" in result.stdout
    dense = sum(p.numel() for p in load_file(run.model).values())
    row = read_json("s/results.json")["rows"][0]
    assert (row["mode"], row["repetitions"], row["std"]) == ("finetune", 1, None)
    assert row["params"] < dense
    assert Ticket.load("s/ticket.safetensors") == Ticket.load("t.safetensors")


def test_a_ticket_is_rewound_to_the_early_weights_of_the_run_by_command(run):
    wanted = ("--density", 0.4, "--mode", "early-rewind", "--epochs", 1, "--out", "s")
    result = call("retrain", run.folder, *wanted, "--json")
    assert result.exit_code == 0, result.output
    assert [row["mode"] for row in json.loads(result.stdout)["rows"]] == ["early-rewind"]
    began, ticket = Run(FilePath("s/early-rewind-0")), Ticket.load("s/ticket.safetensors")
    first, early, init = (load_file(f) for f in (began.init, run.early, run.init))
    for name in ticket:
        alive = ticket.mask_of(name)
        assert torch.equal(first[name][alive], early[name][alive])
        assert not torch.equal(early[name][alive], init[name][alive])
        assert not load_file(began.model)[name][~alive].any()
    assert began.read_status()["status"] == "finished"


def test_a_run_that_ended_before_its_weights_were_kept_says_so_and_what_to_do(tmp_path):
    run = train_tiny(tmp_path / "late", *QUICK, "rewind_at=3.0")
    assert not run.early.exists()
    wanted = ("--density", 0.4, "--epochs", 1, "--out", "s")
    result = call("retrain", run.folder, *wanted, "--mode", "early-rewind")
    assert_failed(result, 1, "has no early.safetensors", "rewind_at=3 lies behind", "2 epochs")
    assert not (tmp_path / "s").exists()
    result = call("retrain", run.folder, *wanted, "--all", "--json")
    modes = [row["mode"] for row in json.loads(result.stdout)["rows"]]
    assert modes == ["finetune", "rewind", "reinit", "random", "dense"]


def test_a_study_that_was_cut_goes_on_with_what_is_missing(run, monkeypatch):
    trained, calls = studying.loop.train, []

    def once(*args, **options):
        calls.append(args[1].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained(*args, **options)

    monkeypatch.setattr(studying.loop, "train", once)
    wanted = ("--density", 0.4, "--mode", "rewind", "--seeds", 3, "--epochs", 1, "--out", "s")
    assert call("retrain", run.folder, *wanted).exit_code == 130
    result = call("retrain", "--resume", "s", "--json")
    assert result.exit_code == 0, result.output
    assert calls == ["rewind-0", "rewind-1", "rewind-1", "rewind-2"]
    assert json.loads(result.stdout)["rows"][0]["repetitions"] == 3


def test_a_transfer_with_all_its_controls_trains_on_the_other_set(run, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "others", tiny.FEW)
    wanted = ("--density", 0.4, "--all", "--epochs", 1, "--data", "others", "--out", "s")
    result = call("retrain", run.folder, *wanted)
    assert result.exit_code == 0, result.output
    assert "on others, its head afresh" in result.stdout
    cells = read_json("s/results.json")["cells"]
    assert {cell["data"] for cell in cells} == {"others"}
    assert {cell["found_on"] for cell in cells} == {"few"}
    assert len(cells) == 6


def test_studies_without_a_name_lie_in_the_run(run):
    for _ in range(2):
        result = call("retrain", run.folder, "--density", 0.4, "--epochs", 1)
        assert result.exit_code == 0, result.output
    names = {folder.name for folder in run.retrained.iterdir()}
    assert {"density-0.4", "density-0.4-2"} <= names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["give either RUN or --resume DIR"]),
        (["RUN"], ["exactly one of --ticket and --density"]),
        (["RUN", "--density", 2], ["--density 2.0 is not allowed: it must be in (0, 1]"]),
        (["RUN", "--density", 0.5, "--ticket", "t"], ["exactly one of --ticket and --density"]),
        (["RUN", "--density", 0.5, "--all", "--mode", "rewind"], ["either --mode or --all"]),
        (["RUN", "--density", 0.5, "--data", "."], ["--data names a data set here", "--data-dir"]),
    ],
    ids=str,
)
def test_bad_usage_is_one_sentence(run, arguments, words):
    arguments = [run.folder if a == "RUN" else a for a in arguments]
    assert_failed(call("retrain", *arguments), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ticket", "none.safetensors"], ["there is no ticket file none.safetensors"]),
        (["--density", 0.4, "--data", "mnists"], ["data='mnists' is not known"]),
        (["--density", 0.4, "--data", "cifar10"], ["cifar10"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(run, tmp_path, arguments, words):
    result = call("retrain", run.folder, *arguments, "--out", "s")
    assert result.exit_code in (1, 2)
    assert_failed(result, result.exit_code, *words)
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_no_study_is_one_sentence(run, tmp_path):
    assert_failed(call("retrain", "--resume", run.folder), 1, "no folder of a retraining")
    (tmp_path / "study.json").write_text('{"run": 3}')
    assert_failed(call("retrain", "--resume", tmp_path), 1, "is damaged or not ours")


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").write_text("mine")
    result = call("retrain", run.folder, "--density", 0.4, "--out", "s")
    assert_failed(result, 1, "exists and is not an empty folder")
    assert [f.name for f in (tmp_path / "s").iterdir()] == ["mine"]


def test_list_shows_the_family_and_saves_nothing(run):
    before = list(run.tickets.iterdir()) if run.tickets.exists() else []
    result = call("ticket", run.folder, "--list")
    assert result.exit_code == 0, result.output
    assert "parameters" in result.stdout
    members = json.loads(call("ticket", run.folder, "--list", "--json").stdout)["members"]
    assert {"density", "params", "macs", "bytes", "accuracy", "step", "order"} <= set(members[0])
    assert members[0]["step"] == Path.load(run.folder).step
    assert (list(run.tickets.iterdir()) if run.tickets.exists() else []) == before
    assert_failed(call("ticket", run.folder, "--list", "--density", 0.5), 2, "--list shows all")
