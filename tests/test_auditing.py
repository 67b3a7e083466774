# SPDX-License-Identifier: Apache-2.0
"""verify RUN: every file against its checksums, in a run at any stage."""

import json
import shutil
import signal

import pytest
from tiny import QUICK, Recorder, own_copy, shared_run, train_tiny
from typer.testing import CliRunner

from dessilbi import Path
from dessilbi.cli import app
from dessilbi.files.runs import Run
from dessilbi.files.sealing import check_sealed, close_seal, read_seal, reopen_seal
from dessilbi.files.storage import DamagedFileError
from dessilbi.outcomes.auditing import FAULTS, audit


@pytest.fixture
def run(tmp_path):
    return Run(shutil.copytree(shared_run().folder, tmp_path / "run"))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run that was interrupted inside an epoch."""

    class Cut(Recorder):
        def update(self, step, facts):
            if step == 4:
                signal.raise_signal(signal.SIGINT)

    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(KeyboardInterrupt):
        train_tiny(folder, *QUICK, "epochs=3", "points=6", reporter=Cut())
    return Run(folder)


@pytest.fixture
def under_way(cut, tmp_path):
    return Run(shutil.copytree(cut.folder, tmp_path / "run"))


def states(run):
    return {finding.file: finding.state for finding in audit(run.folder)}


def verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def everything(run):
    return sorted(f for f in run.folder.rglob("*") if f.is_file() and f != run.lock)


def test_every_file_of_a_sound_run_is_good(run):
    found = states(run)
    assert set(found.values()) == {"good"}
    names = {str(f.relative_to(run.folder)).split("/step-")[0] for f in everything(run)}
    assert {name.split("/step-")[0] for name in found} == names


def test_a_flipped_bit_in_any_file_of_a_finished_run_is_found(run):
    files = everything(run)
    assert len(files) >= 12
    for file in files:
        before = file.read_bytes()
        flip(file)
        faults = [f for f in audit(run.folder) if f.state in FAULTS]
        assert [f.file for f in faults if str(file.relative_to(run.folder)).startswith(f.file)]
        file.write_bytes(before)
    assert set(states(run).values()) == {"good"}


def test_a_flipped_bit_in_any_file_of_an_interrupted_run_is_found(under_way):
    files = everything(under_way)
    assert len(files) >= 10
    for file in files:
        before = file.read_bytes()
        flip(file)
        faults = [f.file for f in audit(under_way.folder) if f.state in FAULTS]
        assert [name for name in faults if str(file.relative_to(under_way.folder)).startswith(name)]
        file.write_bytes(before)
    assert set(states(under_way).values()) == {"good"}


def test_a_missing_file_is_told(run):
    run.scores.unlink()
    assert states(run)["scores.safetensors"] == "missing"


def test_lines_that_a_log_lost_are_found_in_a_run_under_way(under_way):
    lines = under_way.metrics.read_bytes().splitlines(keepends=True)
    under_way.metrics.write_bytes(b"".join(lines[:-1]))
    assert states(under_way)["metrics.jsonl"] == "damaged"


def test_files_of_others_are_told_and_do_no_harm(run):
    (run.folder / "notes.txt").write_text("mine")
    assert states(run)["notes.txt"] == "extra"
    assert verify(run.folder).exit_code == 0


def test_what_was_made_from_a_run_is_checked_as_well(run):
    run.tickets.mkdir()
    ticket = run.tickets / "density-0.3.safetensors"
    Path.load(run.folder).ticket(density=0.3).save(ticket)
    assert states(run)["tickets/density-0.3.safetensors"] == "good"
    flip(ticket)
    assert states(run)["tickets/density-0.3.safetensors"] == "damaged"


def test_a_run_inside_of_a_run_is_checked_as_well(run):
    inner = Run(shutil.copytree(shared_run().folder, run.folder / "retrained" / "ticket"))
    assert states(run)["retrained/ticket/model.safetensors"] == "good"
    flip(inner.model)
    assert states(run)["retrained/ticket/model.safetensors"] == "damaged"


def test_a_run_of_an_older_release_is_said_to_have_no_checksums(tmp_path):
    run = own_copy(tmp_path)
    found = states(run)
    assert found["checksums.json"] == "unchecked"
    assert found["model.safetensors"] == found["recipe.json"] == "unchecked"
    assert found["path.jsonl"] == "good"
    result = verify(run.folder)
    assert result.exit_code == 0
    assert "this run was made by an older release" in result.stdout


def test_verify_prints_a_table_and_fails_where_a_file_is_damaged(run):
    assert verify(run.folder).stdout.splitlines()[-1] == f"{run.folder}: sound"
    flip(run.model)
    result = verify(run.folder)
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("model.safetensors")]
    assert "damaged" in line
    assert result.stdout.splitlines()[-1].endswith("are damaged or missing")


def test_verify_as_json(run):
    told = json.loads(verify(run.folder, "--json").stdout)
    assert told["sound"] is True
    assert {"file", "state", "detail"} == set(told["files"][0])
    run.model.unlink()
    result = verify(run.folder, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["sound"] is False


def test_what_reads_a_run_refuses_a_damaged_file(run):
    flip(run.scores)
    with pytest.raises(DamagedFileError, match=r"scores.safetensors does not match its checksum"):
        Path.load(run.folder)


def test_the_list_is_closed_at_the_end_and_opened_before_anything_changes(run):
    seal = read_seal(run.folder)
    assert set(seal.final) == {file.name for file in run.final_files}
    never_changes = {"recipe.json", "environment.json", "init.safetensors", "early.safetensors"}
    assert set(seal.constant) == never_changes
    reopen_seal(run.folder)
    assert read_seal(run.folder).final is None
    check_sealed(run.model)  # nothing is claimed of it any more
    close_seal(run.folder, run.final_files)
    assert read_seal(run.folder) == seal
