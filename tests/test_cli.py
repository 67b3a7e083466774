# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, its exit codes, and errors of one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import tiny
import torch
from commands import assert_failed, call
from tiny import QUICK, own_copy, shared_run

from dessilbi import Path, Ticket, __version__, close
from dessilbi.cli.tour import DENSITIES
from dessilbi.files.runs import Run, locked
from dessilbi.outcomes.compacting import example_of
from dessilbi.training.data import DATA_SETS
from dessilbi.training.finetune import load_trained
from dessilbi.training.recipes import load_recipe, recipe_names


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(tiny.TOML)
    return file


def quick(recipe, *more):
    return ["train", recipe, *(a for s in QUICK for a in ("--set", s)), *more]


# train


def test_train_makes_a_run_and_says_where(recipe, tmp_path):
    result = call(*quick(recipe, "--out", tmp_path / "run"))
    assert result.exit_code == 0
    assert Run(tmp_path / "run").read_status()["status"] == "finished"
    assert f"The run is in {tmp_path / 'run'}" in result.stdout
    assert result.stderr.count("step ") >= 2  # plain lines, as this is no terminal


def test_train_json_is_strict_json_and_nothing_else(recipe):
    result = call(*quick(recipe, "--json"))
    told = json.loads(result.stdout)
    assert (told["status"], told["steps"], told["run"]) == ("finished", 4, "runs/tiny")


def test_runs_without_a_name_never_meet(recipe):
    (recipe.parent / "runs" / "tiny").mkdir(parents=True)
    assert json.loads(call(*quick(recipe, "--json")).stdout)["run"] == "runs/tiny-2"


def test_a_warning_is_one_line(recipe, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = call(*quick(recipe, "--out", tmp_path / "r", "--set", "optimizer.lam=1e6"))
    assert result.exit_code == 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 0 or "no block can enter" in lines[0]


def test_a_finished_run_is_not_trained_again(tmp_path):
    run = own_copy(tmp_path)
    result = call("train", "--resume", run.folder)
    assert result.exit_code == 0
    assert result.stderr == f"{run.folder} is finished: there is nothing to resume\n"
    assert f"The run is in {run.folder}" in result.stdout


def test_a_run_goes_on_where_it_was_cut(recipe, tmp_path):
    run = Run(call_run(recipe, tmp_path))
    run.set_status("interrupted")
    model = run.model.read_bytes()
    run.model.unlink()
    told = json.loads(call("train", "--resume", run.folder, "--json").stdout)
    assert (told["status"], told["run"]) == ("finished", str(run.folder))
    assert run.model.read_bytes() == model


def call_run(recipe, tmp_path):
    assert call(*quick(recipe, "--out", tmp_path / "run")).exit_code == 0
    return tmp_path / "run"


def test_a_run_in_use_is_one_sentence(tmp_path):
    run = own_copy(tmp_path)
    run.set_status("running")
    with locked(run):
        result = call("train", "--resume", run.folder)
    assert_failed(result, 1, run.folder, "in use by another process", "wait")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["either a recipe to train or --resume RUN"]),
        (["digits-lenet", "--resume", "run"], ["either a recipe to train or --resume RUN"]),
        (["--resume", "run", "--set", "epochs=3"], ["leave out --out and all settings"]),
        (["--resume", "run", "--out", "other"], ["leave out --out and all settings"]),
    ],
    ids=str,
)
def test_a_resumed_run_stays_as_it_is(arguments, words):
    assert_failed(call("train", *arguments), 2, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strategy", "ddp"], ["ddp", "torchrun --nproc-per-node N -m dessilbi train"]),
        (["--device", "cuda"], ["device='cuda' is not there", "auto"]),
    ],
    ids=str,
)
def test_hardware_that_is_not_there_is_one_sentence(recipe, options, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_failed(call(*quick(recipe, *options)), 1, *words)


def test_tensorboard_curves_lie_in_the_run(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = call(*quick(recipe, "--out", tmp_path / "run", "--tensorboard"))
    assert result.exit_code == 0, result.stderr
    events = EventAccumulator(str(Run(tmp_path / "run").tensorboard)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "accuracy/train", "accuracy/accuracy", "accuracy/gamma_accuracy"} <= tags
    assert {"density", "density/conv1.weight", "coupling", "path_time", "lr"} <= tags
    path = Path.load(tmp_path / "run")
    assert [e.step for e in events.Scalars("density")] == [p.step for p in path.points]
    assert events.Scalars("coupling")[-1].value > 0


def test_tensorboard_that_is_missing_is_one_sentence(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = call(*quick(recipe, "--out", tmp_path / "run", "--tensorboard"))
    assert_failed(result, 1, "pip install 'dessilbi[tensorboard]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lenett"], ["no recipe 'lenett'", "digits-lenet"]),
        (["gone.toml"], ["no recipe file gone.toml"]),
        (["digits-lenet", "--set", "optimizer.nu=-1"], ["optimizer.nu=-1", "greater than 0"]),
        (["digits-lenet", "--set", "optimizer.mu=1"], ["optimizer.mu is not a field"]),
        (["digits-lenet", "--set", "nonsense"], ["key=value"]),
    ],
    ids=str,
)
def test_a_bad_recipe_is_bad_usage(arguments, words):
    assert_failed(call("train", *arguments), 2, *words)


@pytest.mark.parametrize("assignment", ["model=alexnet", "data=cifar", "structure.fc9=element"])
def test_a_bad_value_is_bad_usage_wherever_it_is_found(recipe, assignment):
    assert_failed(call(*quick(recipe, "--set", assignment)), 2)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--nonsense"], ["fly"], ["ticket", "run", "--density", "much"]],
    ids=str,
)
def test_bad_usage_exits_with_2(arguments):
    result = call(*arguments)
    assert result.exit_code == 2


def test_missing_data_are_named_with_the_files_expected(tmp_path):
    result = call("train", "mnist-lenet", "--data", tmp_path, "--out", tmp_path / "run")
    assert_failed(result, 1, tmp_path, "train-images-idx3-ubyte", "--download")
    assert not (tmp_path / "run").exists()


def test_the_data_folder_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DESSILBI_DATA", str(tmp_path / "here"))
    assert_failed(call("train", "mnist-lenet"), 1, tmp_path / "here")


def test_without_a_data_folder_the_error_says_how_to_give_one():
    assert_failed(call("train", "mnist-lenet"), 1, "--data", "DESSILBI_DATA")


def test_an_output_that_cannot_be_written_is_one_sentence(recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = call(*quick(recipe, "--out", tmp_path / "file" / "run"))
    assert_failed(result, 1, tmp_path / "file" / "run", "Not a directory", "--out")


def test_a_run_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    assert_failed(call(*quick(recipe, "--out", tmp_path / "run")), 1, "never overwritten", "--out")


def test_a_full_disk_is_one_sentence_and_keeps_the_path(recipe, tmp_path, monkeypatch):
    from dessilbi.path import history

    append, calls = history.append_line, []

    def full(path, value):
        calls.append(value)
        if len(calls) > 3:
            raise OSError(28, "No space left on device", str(path))
        append(path, value)

    monkeypatch.setattr(history, "append_line", full)
    result = call(*quick(recipe, "--out", tmp_path / "run"))
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: could not read or write ")
    assert "No space left on device; what was saved is kept, go on with: dessilbi train" in last
    assert len(Path.load(tmp_path / "run").points) == 1


def test_a_loss_that_is_not_finite_is_one_sentence(recipe, tmp_path):
    more = ["--out", tmp_path / "run", "--set", "optimizer.lr=1e6", "--set", "epochs=30"]
    result = call(*quick(recipe, *more))
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the loss is ")
    assert "lower optimizer.lr" in last


# A real process per command and real signals; but torch, whose import takes many seconds, is
# loaded once, before the forks.
REAL = """
import os, pathlib, signal, sys, time
import torch._dynamo, dessilbi.training.loop
from dessilbi.cli import main

# A shell that starts this in the background leaves SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
place, recipe = pathlib.Path(sys.argv[1]), sys.argv[2]
endless = ["--set", "epochs=10000", "--set", "points=10000"]
for name, sent in (("SIGINT", signal.SIGINT), ("SIGTERM", signal.SIGTERM), ("unknown", None)):
    folder, child = place / name, os.fork()
    if child == 0:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(place / f"{name}.{kind}", os.O_CREAT | os.O_WRONLY), number)
        sys.argv = ["dessilbi", "train", recipe, "--out", str(folder), *endless]
        if sent is None:
            sys.argv = ["dessilbi", "train", "lenett"]
        main()
    if sent is not None:
        path, end = folder / "path.jsonl", time.monotonic() + 120
        while time.monotonic() < end:
            if path.exists() and path.read_bytes().count(b"\\n") >= 2:
                break
            time.sleep(0.02)
        os.kill(child, sent)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (place / f"{name}.code").write_text(str(code))
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with stdout, stderr and exit code of real processes, and their runs."""
    if os.name == "nt":
        pytest.skip("needs POSIX signals")
    place = tmp_path_factory.mktemp("real")
    recipe = place / "tiny.toml"
    recipe.write_text(tiny.TOML)
    result = python("-c", REAL, str(place), str(recipe))
    assert result.returncode == 0, result.stderr
    return place


@pytest.mark.parametrize(
    ("name", "code", "word"), [("SIGINT", "130", "interrupted"), ("SIGTERM", "143", "terminated")]
)
def test_a_signal_ends_a_real_training_with_its_code_and_keeps_the_path(real, name, code, word):
    run = Run(real / name)
    err = (real / f"{name}.err").read_text()
    assert (real / f"{name}.code").read_text() == code
    assert (real / f"{name}.out").read_text() == ""
    assert err.splitlines()[-1] == f"error: {word}; what was already written is kept"
    assert "Traceback" not in err
    told = run.read_status()
    assert told["status"] == "interrupted"
    saved = f"saved after step {told['step']}; go on with: dessilbi train --resume {run.folder}"
    assert err.splitlines()[-2] == saved
    assert (run.checkpoints / f"step-{told['step']:010d}").is_dir()
    assert len(Path.load(run.folder).points) >= 1


def test_an_error_of_a_real_process_is_one_line_and_no_traceback(real):
    err = (real / "unknown.err").read_text()
    assert (real / "unknown.code").read_text() == "2"
    assert (real / "unknown.out").read_text() == ""
    assert err.startswith("error: there is no recipe 'lenett'")
    assert err.count("\n") == 1


def test_an_interrupt_anywhere_in_a_command_exits_with_130(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dessilbi.cli.training.recipe_names", interrupt)
    assert_failed(call("recipes"), 130, "interrupted")


# path


def test_path_shows_a_table_that_fits_80_columns():
    result = call("path", shared_run().folder)
    assert result.exit_code == 0
    assert "4 of 4 points" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_path_json_has_exactly_the_promised_keys_and_is_strict():
    def refuse(word):
        raise AssertionError(word)

    result = call("path", shared_run().folder, "--json")
    told = json.loads(result.stdout, parse_constant=refuse)
    assert set(told) == {"points"}
    assert len(told["points"]) == 4
    for point in told["points"]:
        assert set(point) == {
            *("step", "epoch", "time", "density", "accuracy", "ticket_accuracy"),
            *("gamma_accuracy", "val_accuracy", "val_ticket_accuracy", "layers"),
        }
        assert all(0 <= density <= 1 for density in point["layers"].values())
        assert len(point["layers"]) == 5


def test_path_draws_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    assert call("path", shared_run().folder, "--figure", tmp_path / "x.svg").exit_code == 0
    assert (tmp_path / "x.svg").stat().st_size > 1000


@pytest.mark.parametrize("command", [["path"], ["ticket", "--density", "0.5"]], ids=str)
@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_folder_that_is_no_run_is_one_sentence(command, place):
    assert_failed(call(command[0], place, *command[1:]), 1, "is not a run folder")


@pytest.mark.parametrize("command", [["path"], ["ticket", "--density", "0.5"]], ids=str)
@pytest.mark.parametrize("content", [b"", b"foreign\n", b'{"format": "dessilbi.path"'], ids=str)
def test_a_damaged_path_is_one_sentence(tmp_path, command, content):
    run = own_copy(tmp_path)
    run.path.write_bytes(content)
    result = call(command[0], run.folder, *command[1:])
    assert_failed(result, 1, run.path, "is not a", "from a copy or train again")


def test_a_path_that_was_cut_off_is_shown_up_to_there(tmp_path):
    run = own_copy(tmp_path)
    content = run.path.read_bytes()
    run.path.write_bytes(content[: len(content) * 2 // 3])
    told = json.loads(call("path", run.folder, "--json").stdout)
    assert 1 <= len(told["points"]) < 4


# ticket


def test_ticket_saves_the_ticket_of_the_path():
    run = shared_run()
    result = call("ticket", run.folder, "--density", 0.25, "--out", "t.safetensors")
    assert result.exit_code == 0
    assert "saved as t.safetensors" in result.stdout
    trained = load_trained(run)
    model, example = trained.model, example_of(trained)
    expected = Path.load(run.folder).ticket(density=0.25, model=model, example_inputs=example)
    assert Ticket.load("t.safetensors") == expected
    assert "chosen: the largest ticket with density <= 0.25" in result.stdout


def test_ticket_takes_a_step_or_an_order():
    run = shared_run()
    trained, path = load_trained(run), Path.load(run.folder)
    model, example = trained.model, example_of(trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that layers are empty yet
        assert call("ticket", run.folder, "--step", 9, "--out", "s").exit_code == 0
    assert Ticket.load("s") == close(path.ticket(step=9), model, example_inputs=example)
    wanted = ["--density", 0.1, "--order", "weight", "--out", "w"]
    assert call("ticket", run.folder, *wanted).exit_code == 0
    assert Ticket.load("w") == path.ticket(
        density=0.1, order="weight", model=model, example_inputs=example
    )


def test_tickets_without_a_name_lie_in_the_run_and_never_meet(tmp_path):
    run = own_copy(tmp_path)
    for _ in range(3):
        assert call("ticket", run.folder, "--density", 0.1).exit_code == 0
    files = list(run.tickets.iterdir())
    assert len(files) == 3
    assert run.tickets / "density-0.1.safetensors" in files
    assert len({str(Ticket.load(file)) for file in files}) == 1


def test_every_ticket_file_ends_in_safetensors(tmp_path):
    run = own_copy(tmp_path)
    for _ in range(2):
        call("ticket", run.folder, "--density", 0.1)
    assert {file.suffix for file in run.tickets.iterdir()} == {".safetensors"}


def test_ticket_never_overwrites(tmp_path):
    (tmp_path / "mine").write_text("mine")
    result = call("ticket", shared_run().folder, "--density", 0.1, "--out", tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"
    assert_failed(result, 1, tmp_path / "mine")


def test_ticket_json_says_where_it_came_from():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that layers are empty yet
        result = call("ticket", shared_run().folder, "--step", 9, "--out", "t", "--json")
    told = json.loads(result.stdout)
    chosen = Ticket.load("t")
    assert (told["density"], told["layers"]) == (chosen.density, chosen.densities())
    assert (told["kind"], told["step"], told["file"]) == ("entered", 9, "t")


def test_ticket_json_has_the_density_of_the_ticket():
    result = call("ticket", shared_run().folder, "--density", 0.1234567, "--out", "t", "--json")
    assert json.loads(result.stdout)["density"] == Ticket.load("t").density != 0.1234567


@pytest.mark.parametrize(
    "options",
    [[], ["--density", "0.5", "--params", "3"], ["--early", "--step", "3"], ["--order", "dual"]],
    ids=str,
)
def test_ticket_needs_one_budget_or_one_moment_or_one_of_each(options):
    result = call("ticket", shared_run().folder, *options)
    assert_failed(result, 2, "exactly one of")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--density", "1e-9"], "the smallest ticket of this run has"),
        (["--params", "7"], "the smallest ticket of this run has"),
        (["--latency-ms", "1e-9"], "1e-09"),
        (["--epoch", "99"], "is not on this path, which ends at epoch"),
        (["--density", "0.5", "--step", "3"], "has no checkpoint of step 3 (kept are"),
        (["--early"], "never settled"),
        (["--step", "0"], "its first step is 3"),
    ],
    ids=str,
)
def test_a_ticket_that_cannot_be_had_is_one_sentence(options, word):
    assert_failed(call("ticket", shared_run().folder, *options), 1, word)


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--density", "1.5"], "(0, 1]"), (["--density", "0"], "(0, 1]")],
    ids=str,
)
def test_a_bad_option_of_ticket_is_bad_usage(options, word):
    assert_failed(call("ticket", shared_run().folder, *options), 2, word)


def test_a_ticket_of_a_run_without_scores_is_one_sentence(tmp_path):
    run = own_copy(tmp_path)
    run.scores.unlink()
    result = call("ticket", run.folder, "--density", 0.1)
    assert_failed(result, 1, "left no final scores", "take a ticket by step")


@pytest.mark.parametrize("length", [0, 7, 100])
def test_truncated_scores_are_one_sentence(tmp_path, length):
    run = own_copy(tmp_path)
    run.scores.write_bytes(run.scores.read_bytes()[:length])
    result = call("ticket", run.folder, "--density", 0.1)
    assert_failed(result, 1, run.scores, "cannot be read as safetensors")


def test_a_ticket_file_in_a_folder_that_is_not_there_is_named(tmp_path):
    file = tmp_path / "no" / "t.safetensors"
    result = call("ticket", shared_run().folder, "--density", 0.1, "--out", file)
    assert_failed(result, 1, f" {file}:")


# the others


def test_recipes_lists_every_recipe_with_its_summary():
    lines = [line for line in call("recipes").stdout.splitlines() if line[0] != " "]
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 3 for line in lines)


def test_recipes_show_prints_a_file_of_ones_own(recipe, tmp_path):
    result = call("recipes", "show", "digits-lenet", "--set", "optimizer.nu=12")
    assert result.exit_code == 0
    (tmp_path / "own.toml").write_text(result.stdout)
    assert load_recipe(str(tmp_path / "own.toml")) == load_recipe(
        "digits-lenet", ["optimizer.nu=12"]
    )
    assert call("recipes", "show", recipe).exit_code == 0


def test_recipes_show_refuses_what_is_no_recipe():
    assert_failed(call("recipes", "show", "lenett"), 2, "no recipe 'lenett'; choose one of")
    assert_failed(call("recipes", "show", "digits-lenet", "--set", "x=1"), 2, "x is not a field")


def test_doctor_says_what_there_is(monkeypatch):
    few = {"few": tiny.FEW, "mnist": DATA_SETS["mnist"]}
    monkeypatch.setattr("dessilbi.reporting.doctor.DATA_SETS", few)
    result = call("doctor")
    assert result.exit_code == 0
    for word in ("torch", "kernels", "few: ready", "mnist: ", "writable", "--data DIR"):
        assert word in result.stdout


def test_version_is_that_of_the_package():
    assert call("--version").stdout == f"dessilbi {__version__}\n"


@pytest.fixture
def quick_demo(monkeypatch, recipe):
    """The demo with both recipes on a few images."""
    lenet = load_recipe(str(recipe), QUICK)
    few = ("data=few", "validation=100", "epochs=2", "points=2")
    resnet = load_recipe("digits-resnet", few)
    rules = {
        p: {**r, "lam": 0.1} if isinstance(r, dict) else r for p, r in resnet.structure.items()
    }
    # A fixed lambda, so that blocks enter in 14 steps.
    resnet = resnet.model_copy(update={"structure": rules, "density": None})
    recipes = {"digits-lenet": lenet, "digits-resnet": resnet}
    monkeypatch.setattr("dessilbi.cli.tour.load_recipe", recipes.__getitem__)


def test_demo_prints_path_tickets_and_a_smaller_model(quick_demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = call("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert "from simple to complex (2 of 2 points" in result.stdout
    assert "at once" in result.stdout
    assert f"The run folder is {tmp_path / 'demo'}" in result.stdout
    family = json.loads(Run(tmp_path / "demo").family.read_text())
    found = [t["density"] for t in family["tickets"]]
    assert all(0 <= wanted - got < 0.02 for wanted, got in zip(DENSITIES, found, strict=True))
    assert "50 of 50 predictions identical" in result.stdout
    assert "onnxruntime, ms" not in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Skipped")]
    assert "dessilbi[export]" in line
    small = tmp_path / "demo-resnet" / "compact" / "density-0.25"
    assert f"dessilbi verify {small}" in result.stdout
    assert call("verify", small).exit_code == 0
    again = call("verify", small, "--run", tmp_path / "demo-resnet")
    assert_failed(again, 1, "was fine-tuned")


def test_the_demo_measures_onnx_files_where_the_packages_are(quick_demo, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("dessilbi.cli.tour._family", lambda folder: None)
    result = call("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    rows = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    before, after = (int(n.replace(",", "")) for n in rows["ONNX file, bytes"][3:5])
    assert after < before
    file = tmp_path / "demo-resnet" / "compact" / "density-0.25" / "model.onnx"
    assert file.stat().st_size == after
    assert "onnxruntime, ms" in rows


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_python_m_dessilbi_is_the_command_line():
    result = python("-m", "dessilbi", "--help")
    assert result.returncode == 0
    for command in ("demo", "plan", "train", "path", "ticket", "compact", "export", "verify"):
        assert command in result.stdout


LOADS_NO_TORCH = """
import sys
from dessilbi.cli import main
sys.modules["torch"] = None  # importing it is an error from here on
sys.argv[1:] = {arguments}
main()
"""

pytestmark = pytest.mark.usefixtures("command_line")


def test_the_help_of_a_command_loads_no_torch():
    result = python("-c", LOADS_NO_TORCH.format(arguments=["train", "--help"]))
    assert result.returncode == 0
    assert "--download" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"), [(["recipes"], 0), (["train", "lenett"], 2)], ids=str
)
def test_what_needs_no_torch_loads_none(arguments, code):
    assert python("-c", LOADS_NO_TORCH.format(arguments=arguments)).returncode == code


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupt_while_torch_loads_exits_with_130(tmp_path):
    (tmp_path / "torch.py").write_text("import time; open('loading', 'w').close(); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-m", "dessilbi", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background leaves SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not (tmp_path / "loading").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1
