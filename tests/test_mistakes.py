# SPDX-License-Identifier: Apache-2.0
"""What a stranger gives to the command line by mistake is answered in one sentence, at once."""

import shutil

import pytest
from commands import assert_failed, call
from rich.cells import cell_len
from tiny import own_copy, shared_run

pytestmark = pytest.mark.usefixtures("command_line")

# What a folder is -> what is said of it.
KINDS = {
    "nowhere": "it does not exist",
    "file": "it is a file",
    "empty": "it has no recipe.json",
    "smaller": "it is a smaller model, for `dessilbi export` and `dessilbi verify`",
    "study": "it is a retraining",
}


@pytest.fixture
def folders(tmp_path):
    """Folders of every kind but the one that is asked for."""
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "smaller", "study", "retrained"):
        (tmp_path / name).mkdir()
    (tmp_path / "smaller" / "manifest.json").write_text("{}")
    (tmp_path / "study" / "study.json").write_text("{}")
    shutil.copy(shared_run().recipe, tmp_path / "retrained")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "command",
    [
        ["path"],
        ["report"],
        ["ticket", "--density", 0.5],
        ["retrain", "--density", 0.5],
        ["compact", "--density", 0.5],
        ["filters", "--layer", "conv1"],
        ["train", "--resume"],
    ],
    ids=lambda command: command[0],
)
def test_what_is_no_run_is_told_for_what_it_is(folders, command, kind):
    rest = [*command[1:], kind] if command[0] == "train" else [kind, *command[1:]]
    result = call(command[0], *rest)
    assert_failed(result, 1, f"{kind} is not a run folder", KINDS[kind], "`dessilbi train`")


@pytest.mark.parametrize("command", [["path"], ["ticket", "--density", 0.5]], ids=str)
def test_a_retrained_run_has_no_path_and_says_why(folders, command):
    result = call(command[0], "retrained", *command[1:])
    assert_failed(result, 1, "has no path.jsonl, for nothing in it was to become sparse")


@pytest.mark.parametrize("kind", ["nowhere", "file", "empty", "study"])
def test_what_cannot_be_verified_is_told_for_what_it_is(folders, kind):
    told = KINDS[kind].replace("recipe.json", "manifest.json")
    assert_failed(call("verify", kind), 1, "neither a run folder nor a smaller model", told)


def test_a_run_is_no_smaller_model_and_no_retraining(folders):
    run = shared_run().folder
    assert_failed(call("export", run, "--format", "pt2"), 1, "it is a run folder")
    assert_failed(call("retrain", "--resume", run), 1, "it is a run folder")


@pytest.mark.parametrize("name", ["file", "empty"])
def test_what_is_there_but_no_recipe_is_told_apart_from_a_misspelt_name(folders, name):
    assert_failed(call("train", name), 2, f"{name} is no recipe", "ends in .toml")


PLACES = {
    "ticket": ["--density", 0.5, "--out"],
    "prune-curve": ["--layers", "conv1", "--out"],
    "filters": ["--layer", "conv1", "--out"],
    "path": ["--figure"],
    "report": ["--out"],
}


@pytest.mark.parametrize("command", PLACES)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    folders, command, monkeypatch, tmp_path
):
    def busy(*_, **__):
        raise AssertionError("it began to work")

    places = ("outcomes.tickets.Drawer", "path.path.Path.load", "reporting.summary.summarise")
    for name in places:
        monkeypatch.setattr(f"dessilbi.{name}", busy)
    for place in ("nowhere/x.png", "file/x.png"):
        result = call(command, shared_run().folder, *PLACES[command], place)
        assert_failed(result, 1, f"there is no folder for {place}")
    (tmp_path / "mine.png").write_text("mine")
    result = call(command, shared_run().folder, *PLACES[command], "mine.png")
    assert_failed(result, 1, "mine.png exists", "never overwritten")
    assert (tmp_path / "mine.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["x", "x.docx", "png"])
def test_a_figure_says_by_its_name_what_it_is(name):
    result = call("path", shared_run().folder, "--figure", name)
    assert_failed(result, 2, f"{name} is no image", ".png, .svg, .pdf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nonsense"], ["--nonsense", "see dessilbi --help"]),
        (["fly"], ["fly", "see dessilbi --help"]),
        (["ticket"], ["RUN", "see dessilbi ticket --help"]),
        (["ticket", "run", "--density", "much"], ["--density", "see dessilbi ticket --help"]),
        (["filters", "run"], ["--layer"]),
        (["path", "run", "extra"], ["extra"]),
        (["recipes", "shoe"], ["shoe", "see dessilbi recipes --help"]),
        (["export", "run", "--format", "tiff"], ["--format", "tiff"]),
        (["compact", "run", "--density", "1", "--multiple-of", "0"], ["--multiple-of"]),
        (["prune-curve", "run", "--layers", "c", "--no-finetune", "--epochs", "3"], ["leave it"]),
    ],
    ids=str,
)
def test_a_misspelt_command_is_one_sentence_and_no_box(arguments, words, tmp_path, monkeypatch):
    tmp_path.joinpath("run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert_failed(call(*arguments), 2, *words)


def test_without_a_command_there_is_the_help():
    result = call()
    assert result.exit_code == 2
    assert "Usage" in result.stdout + result.stderr
    assert "error" not in result.stderr


def test_a_step_larger_than_any_tensor_holds_is_refused_like_any_behind_the_end():
    result = call("ticket", shared_run().folder, "--step", 10**25, "--json", "--out", "t")
    assert result.exit_code == 1
    assert "is not on this path, which ends at step" in result.output


@pytest.mark.parametrize(
    "name", ["mit Leerzeichen", "层 и Γ", "tab\tnew\nline", "[bold]", "x" * 200]
)
def test_a_run_may_be_called_anything(tmp_path, name):
    run = own_copy(tmp_path).folder.rename(tmp_path / name)
    for command in (["path"], ["path", "--json"], ["verify"]):
        result = call(command[0], run, *command[1:])
        assert result.exit_code == 0, result.output
    told = call("path", run).stdout.splitlines()
    assert max(map(cell_len, told)) <= 80
