# SPDX-License-Identifier: Apache-2.0
"""`dessilbi train` under torchrun: several gloo ranks equal one process on the same batches."""

import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path as FilePath
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
import torch.multiprocessing as mp
from tiny import FEW, TOML, Recorder, tiny_recipe
from torch import nn
from torch.testing import assert_close

from dessilbi import Path
from dessilbi.files.runs import BusyError, Run, TrainingError, locked
from dessilbi.files.storage import read_json, read_lines, to_json
from dessilbi.models import IMAGE_MODELS, MODELS
from dessilbi.training import engine, loop
from dessilbi.training.data import DATA_SETS
from dessilbi.training.engine import engine_for
from dessilbi.training.finetune import load_trained
from dessilbi.training.recipes import RecipeError
from dessilbi.training.retraining import Wish, data_for, retraining
from dessilbi.training.session import Session

# 5 steps an epoch; no batch statistics, which differ among ranks by nature.
SHORT = (
    *("data=few", "model=wide", "validation=99", "batch_size=20", "epochs=2", "points=10"),
    *("optimizer.lam=0.05", "optimizer.nu=0.5", "judged=3", "accumulate=5", "clip_norm=0.5"),
    *('structure={"1.weight" = "filter"}',),
)


class Wide(nn.Sequential):
    """A small net in float64."""

    def __init__(self, num_classes, in_channels):
        super().__init__(nn.Flatten(), nn.Linear(784, 9), nn.Tanh(), nn.Linear(9, num_classes))
        self.double()

    def forward(self, x):
        return super().forward(x.double())


@pytest.fixture(autouse=True, scope="module")
def _wide_model():
    with (
        patch.dict(MODELS, wide=Wide),
        patch.dict(IMAGE_MODELS, wide=Wide),
        patch.dict(DATA_SETS, few=FEW),
    ):
        yield


def on_rank(rank, size, port, job, folder, arguments):
    os.environ.update(
        {name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GROUP_RANK="0",
    )
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
    job(FilePath(folder), *arguments)


def spawn(job, size, folder, *arguments):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(
        on_rank, (size, port, job, str(folder), arguments), nprocs=size, start_method="fork"
    )


class Cut(Recorder):
    """Sends a signal at a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def update(self, step, facts):
        if step == self.step:
            signal.raise_signal(signal.SIGINT)


def train(folder, strategy=None, cut=None, *more):
    recipe_folder = FilePath(folder) / f"recipe-{os.environ.get('RANK', '0')}"
    recipe_folder.mkdir(exist_ok=True)
    recipe = tiny_recipe(recipe_folder, *SHORT, *more)
    reporter = None if cut is None else Cut(cut)
    try:
        loop.train(recipe, FilePath(folder) / "run", strategy=strategy, reporter=reporter)
    except KeyboardInterrupt:
        assert cut is not None


def resume(folder, strategy=None):
    loop.resume(FilePath(folder) / "run", strategy=strategy, trust_checkpoint=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(folder)
    return Run(folder / "run")


def lines_of(run):
    """The metrics but for the health check, which sharded runs cannot make."""
    return [{k: v for k, v in x.items() if k != "dead_units"} for x in read_lines(run.metrics)]


def assert_same_run(left, right):
    ours, theirs = (safetensors.torch.load_file(run.model) for run in (left, right))
    assert_close(ours, theirs, rtol=0, atol=1e-9)
    for run in (left, right):
        assert run.read_status()["status"] == "finished"
    paths = [Path.load(run.folder) for run in (left, right)]
    assert [p.step for p in paths[0].points] == [p.step for p in paths[1].points]
    for one, other in zip(paths[0].points, paths[1].points, strict=True):
        assert paths[0].support(step=one.step) == paths[1].support(step=other.step)
        assert_close(one.metrics, other.metrics)
    lines = [lines_of(run) for run in (left, right)]
    assert_close(lines[0], lines[1], rtol=0, atol=1e-9)
    assert 0 < paths[0].points[-1].density < 1


@pytest.mark.parametrize(
    ("strategy", "piece"),
    [("ddp", 0), ("fsdp2", 50), ("fsdp2", 1000)],
    ids=["ddp", "fsdp2 layer by layer", "fsdp2 in one"],
)
def test_two_ranks_equal_one_process(tmp_path, alone, strategy, piece, monkeypatch):
    monkeypatch.setattr(engine, "PIECE", piece)
    spawn(train, 2, tmp_path, strategy)
    run = Run(tmp_path / "run")
    assert read_json(run.environment)["engine"]["world_size"] == 2
    assert_same_run(run, alone)


STEERED = ("density=0.4", "optimizer.nu=auto", "optimizer.R=4")


def steered(folder, strategy=None, calibrate="track"):
    finish = Session.finish

    def finish_alike(session):
        told = session.engine.gather(to_json(session.setting.steering.state_dict()))
        assert len(set(told)) == 1
        assert len(told) == (2 if strategy else 1)
        return finish(session)

    with patch.object(Session, "finish", finish_alike):
        train(folder, strategy, None, *STEERED, f"calibrate={calibrate}")


@pytest.mark.parametrize(
    ("strategy", "calibrate"), [("ddp", "track"), ("fsdp2", "track"), ("fsdp2", "late")]
)
def test_ranks_find_the_lambda_that_one_process_finds(tmp_path, strategy, calibrate):
    (tmp_path / "alone").mkdir()
    steered(tmp_path / "alone", None, calibrate)
    spawn(steered, 2, tmp_path, strategy, calibrate)
    runs = [Run(folder / "run") for folder in (tmp_path, tmp_path / "alone")]
    assert_same_run(*runs)
    assert 0 < lines_of(runs[0])[-1]["lam"] < 10


@pytest.mark.parametrize(
    ("before", "then"), [("ddp", None), ("fsdp2", None), ("ddp", "fsdp2"), ("fsdp2", "fsdp2")]
)
@pytest.mark.filterwarnings("ignore:this run goes on under other conditions")
def test_a_run_saved_on_two_ranks_goes_on_on_one_or_two(tmp_path, alone, before, then):
    spawn(train, 2, tmp_path, before, 8)
    run = Run(tmp_path / "run")
    assert run.read_status() == {"schema": 1, "status": "interrupted", "step": 8}
    if then is None:
        resume(tmp_path)
    else:
        spawn(resume, 2, tmp_path, then)
    assert_same_run(run, alone)


STOP = ("epochs=3", "points=15", "judged=1", "stop={window=4, tolerance=1.0, gain=1.0, gap=1.0}")


def test_ranks_stop_early_at_the_point_at_which_one_process_stops(tmp_path):
    (tmp_path / "alone").mkdir()
    train(tmp_path / "alone", None, None, *STOP)
    spawn(train, 2, tmp_path, "ddp", None, *STOP)
    runs = [Run(folder / "run") for folder in (tmp_path, tmp_path / "alone")]
    assert_same_run(*runs)
    ended = [run.read_status() for run in runs]
    assert ended[0]["settled"]["step"] == ended[1]["settled"]["step"] == ended[0]["steps"] < 15


def retrain(folder, searched, strategy=None):
    run = Run(searched)
    trained, wish = load_trained(run), Wish(mode="rewind", epochs=1)
    ticket = Path.load(run.folder).ticket(density=0.8, order="weight")
    recipe, start = retraining(run, trained, ticket, wish, data_for(trained, wish, root=None))
    loop.train(recipe, folder / "run", strategy=strategy, start=start)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_ticket_retrained_on_two_ranks_is_the_one_retrained_on_one(tmp_path, alone, strategy):
    retrain(tmp_path / "alone", alone.folder)
    spawn(retrain, 2, tmp_path, alone.folder, strategy)
    runs = [Run(folder / "run") for folder in (tmp_path, tmp_path / "alone")]
    ours, theirs = (safetensors.torch.load_file(run.model) for run in runs)
    assert_close(ours, theirs, rtol=0, atol=1e-9)
    dead, weight = theirs["1.weight"].abs().sum(1) == 0, theirs["1.weight"]
    assert 0 < int(dead.sum()) < len(weight)
    began = safetensors.torch.load_file(alone.init)["1.weight"]
    assert not torch.equal(weight[~dead], began[~dead])  # something was trained


def refused(folder):
    with pytest.raises(BusyError if os.environ["RANK"] == "0" else SystemExit):
        resume(folder)


def test_a_run_in_use_ends_all_ranks(tmp_path, alone):
    with locked(alone), patch.object(Run, "read_status", lambda _: {"status": "running"}):
        spawn(refused, 2, alone.folder.parent)


def disagree(_):
    with engine_for("float32", device="cpu") as made:
        assert made.any(made.rank == 1, False) == (True, False)
        assert made.gather(made.rank) == [0, 1]
        assert made.on_first(lambda: made.rank) == 0
        assert made.total(torch.tensor([1.0 + made.rank])).tolist() == [3.0]


def test_ranks_agree(tmp_path):
    spawn(disagree, 2, tmp_path)


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    spawn(uneven, 3, tmp_path)
    assert not (tmp_path / "run").exists()


def uneven(folder):
    with pytest.raises(RecipeError, match="20 samples cannot be shared equally by 3 processes"):
        train(folder)


def diverge(folder):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+: lower"):
        train(folder, "ddp", None, "optimizer.lr=1e300", "clip_norm=1e300", "points=1")


def test_a_loss_that_is_not_finite_ends_all_ranks_and_is_never_saved(tmp_path):
    spawn(diverge, 2, tmp_path)
    run = Run(tmp_path / "run")
    assert run.read_status()["status"] == "failed"
    assert not run.checkpoints.exists()


class Frail(Wide):
    """Gives NaN in one step, on one rank only."""

    seen = 0

    def forward(self, x):
        out = super().forward(x)
        if self.training and torch.is_grad_enabled():
            Frail.seen += 1
            # 5 pieces a step: the third piece of the fourth step.
            if Frail.seen == 18 and os.environ.get("RANK", "0") == "1":
                out = out * math.nan
        return out


def pass_over(folder, strategy):
    with patch.dict(MODELS, wide=Frail), patch.dict(IMAGE_MODELS, wide=Frail):
        train(folder, strategy, None, "on_nan=skip")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_ranks_pass_over_a_step_that_is_not_finite_on_one(tmp_path, strategy):
    spawn(pass_over, 2, tmp_path, strategy)
    run = Run(tmp_path / "run")
    assert [line["skipped"] for line in read_lines(run.metrics)] == [1, 0]
    weights = safetensors.torch.load_file(run.model).values()
    assert all(t.isfinite().all() for t in weights)
    assert Path.load(run.folder).step == 9


@pytest.mark.full
def test_a_rank_that_is_killed_under_torchrun_comes_back_and_the_run_ends_as_planned(tmp_path):
    """The command is the same for all attempts; the second finds the run and goes on."""
    file = tmp_path / "tiny.toml"
    file.write_text(TOML)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    options = ["--device", "cpu", "--set", "epochs=4", "--set", "checkpoint_every=0.5"]

    def call(name, *more):
        run = [str(file), *options, "--out", str(tmp_path / name)]
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *more, "train", *run]
        environment = {**os.environ, "KILLED_MARK": str(tmp_path / "mark")}
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done, Run(tmp_path / name)

    done, run = call("killed", "--max-restarts", "1", str(script))
    assert (tmp_path / "mark").exists()
    assert "resuming" in done.stderr
    _, whole = call("whole", "-m", "dessilbi")
    for name in ("model", "path", "metrics", "scores", "init"):
        assert getattr(run, name).read_bytes() == getattr(whole, name).read_bytes(), name


# The command line, in which the second rank is killed once, after some steps.
KILLED = """
import os, signal
from pathlib import Path
from dessilbi.cli import main
from dessilbi.training import loop

taken, mark, count = loop.step, Path(os.environ["KILLED_MARK"]), 0

def step(session, inputs, targets):
    global count
    taken(session, inputs, targets)
    count += 1
    if os.environ["RANK"] == "1" and count == 8 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

loop.step = step
main()
"""


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchrun_trains_on_two_ranks_and_one_goes_on(tmp_path, strategy):
    def call(*command):
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done

    file = tmp_path / "tiny.toml"
    file.write_text(TOML)
    run = ["dessilbi", "train", str(file), "--device", "cpu", "--out", str(tmp_path / "run")]
    done = call(
        "torch.distributed.run", "--nproc-per-node", "2", "-m", *run, "--strategy", strategy
    )
    assert done.stdout.count("The run is in") == 1
    assert "error" not in done.stderr
    assert Run(tmp_path / "run").read_status()["status"] == "finished"
    again = call("dessilbi", "train", "--resume", str(tmp_path / "run"))
    assert "is finished: there is nothing to resume" in again.stderr
