# SPDX-License-Identifier: Apache-2.0
"""The run folder: where its files lie, and that nothing in it is overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dessilbi.files import runs
from dessilbi.files.runs import SCHEMA_VERSION, BusyError, Run, create_run, free_path, locked
from dessilbi.files.sealing import unsealed


def test_every_file_of_a_run_lies_in_its_folder_under_a_name_of_its_own(tmp_path):
    run = Run(tmp_path)
    files = [
        *(run.recipe, run.environment, run.init, run.model, run.metrics),
        *(run.path, run.scores, run.tickets, run.family, run.status),
        *(run.times, run.checkpoints, run.tensorboard, run.lock),
    ]
    assert len(set(files)) == 14
    assert {file.parent for file in files} == {tmp_path}


def test_a_folder_may_be_given_as_text():
    assert Run("runs/x").model == Path("runs/x/model.safetensors")


def test_a_new_run_makes_its_folder_and_those_above(tmp_path):
    assert create_run(tmp_path / "a" / "b").folder.is_dir()


def test_an_empty_folder_is_used(tmp_path):
    assert create_run(str(tmp_path)).folder == tmp_path


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty: a run is never overwritten; name an"):
        create_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(FileExistsError, match="name another with --out"):
        create_run(tmp_path / "run")


def test_a_folder_below_a_file_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="Not a directory"):
        create_run(tmp_path / "file" / "run")


def test_the_status_is_what_was_set_last(tmp_path):
    run = Run(tmp_path)
    run.set_status("running")
    run.set_status("failed", reason="Γ", loss=float("inf"))
    expected = {"schema": SCHEMA_VERSION, "status": "failed", "reason": "Γ", "loss": "inf"}
    assert run.read_status() == expected
    assert unsealed(json.loads(run.status.read_text(encoding="utf-8"))) == expected


def test_a_folder_without_a_status_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Run(tmp_path).read_status()


def test_a_folder_without_a_recipe_is_not_a_run_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no recipe\.json; na"):
        Run(tmp_path).read_recipe()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"], ids=repr)
def test_a_damaged_recipe_is_refused_by_name(tmp_path, content):
    run = Run(tmp_path)
    run.recipe.write_bytes(content)
    with pytest.raises(ValueError, match=f"{run.recipe} is not a JSON object"):
        run.read_recipe()


def test_a_free_path_is_the_first_that_is_not_taken(tmp_path):
    assert free_path(tmp_path, "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").write_text("")
    assert free_path(str(tmp_path), "run") == tmp_path / "run-3"


def test_runs_can_be_named_without_loading_torch():
    code = "import sys, dessilbi.files.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_run_folder_appears_with_its_files(tmp_path):
    run = create_run(tmp_path / "run", {"recipe.json": b"{}", "status.json": b"{}"})
    assert names(run.folder) == ["recipe.json", "status.json"]
    assert names(tmp_path) == ["run"]
    (tmp_path / "usual").mkdir()
    assert run.folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_run_folder_that_cannot_be_filled_never_appears(tmp_path, monkeypatch):
    def full(path, content):
        assert path.parent.name.startswith(".run.")
        assert names(tmp_path) == [path.parent.name]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        create_run(tmp_path / "run", {"recipe.json": b"{}"})
    assert names(tmp_path) == []


def test_of_two_that_make_the_same_run_one_is_refused(tmp_path, monkeypatch):
    write = runs.write_atomic

    def slow(path, content):
        monkeypatch.setattr(runs, "write_atomic", write)
        create_run(tmp_path / "run", {"mine": b"x"})  # the other process
        write(path, content)

    monkeypatch.setattr(runs, "write_atomic", slow)
    with pytest.raises(FileExistsError, match="never overwritten"):
        create_run(tmp_path / "run", {"yours": b"x"})
    assert names(tmp_path / "run") == ["mine"]
    assert names(tmp_path) == ["run"]


def test_of_two_that_want_any_name_each_gets_one(tmp_path, monkeypatch):
    write = runs.write_atomic

    def slow(path, content):
        monkeypatch.setattr(runs, "write_atomic", write)
        create_run(tmp_path / "run", {"mine": b"x"}, or_next=True)
        write(path, content)

    monkeypatch.setattr(runs, "write_atomic", slow)
    run = create_run(tmp_path / "run", {"yours": b"x"}, or_next=True)
    assert run.folder == tmp_path / "run-2"
    assert names(tmp_path) == ["run", "run-2"]


LOCKS = """
import sys
from dessilbi.files.runs import Run, locked
with locked(Run(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_is_locked_for_other_processes_until_its_own_dies(tmp_path):
    run = Run(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCKS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match="in use by another process") as caught, locked(run):
            pass
        assert "\n" not in str(caught.value)
        holder.kill()
    with locked(run):
        pass


def test_a_lock_is_free_after_its_block(tmp_path):
    for _ in range(2):
        with locked(Run(tmp_path)):
            pass
