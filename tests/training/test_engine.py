# SPDX-License-Identifier: Apache-2.0
"""The engine in one process: devices, precision, compiled models, signals, random states."""

import json
import random
import shutil
import signal
import threading
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import QUICK, train_tiny
from torch import nn

from dessilbi import Path
from dessilbi.files.storage import read_json, read_lines
from dessilbi.training.engine import engine_for
from dessilbi.training.opening import compare
from dessilbi.training.randomness import random_states, seeded, set_random_states
from dessilbi.training.stopping import stoppable

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device='tpu' is not known: use one of auto, cpu"),
        pytest.param(
            {"device": "mps"},
            "device='mps' is not there: use cpu, or auto",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="has MPS"),
        ),
        ({"strategy": "ddp"}, "this is the only one: start several with torchrun"),
        ({"strategy": "zero"}, "strategy='zero' is not known: use one of ddp, fsdp2"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught, engine_for(**options):
        pass
    assert "\n" not in str(caught.value)


def test_fp16_and_fsdp2_do_not_go_together(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with (
        pytest.raises(ValueError, match="fp16 does not go with --strategy fsdp2: use bf16 or ddp"),
        engine_for("fp16", strategy="fsdp2", device="cpu"),
    ):
        pass


def test_one_process_needs_no_agreement():
    with engine_for("float32", device="cpu") as engine:
        assert (engine.rank, engine.world_size, engine.first, engine.sharded) == (0, 1, True, False)
        assert engine.any(True, False) == (True, False)
        assert engine.gather("x") == ["x"]
        assert engine.totals([1.0, 2]) == [1.0, 2]
        assert engine.on_first(lambda: 3) == 3
        assert engine.facts()["device"] == "cpu"


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_the_forward_pass_has_the_precision_and_the_weights_are_float32(precision, dtype):
    seen = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with engine_for(precision, device="cpu") as engine:
        module = engine.place(model)
        outputs = module(torch.ones(3, 4))
        engine.backward(outputs.sum())
        with engine.autocast():
            model(torch.ones(3, 4))
        assert (engine.scaler is not None) == (precision == "fp16")
    assert seen == [dtype, dtype]
    assert outputs.dtype == model[0].weight.dtype == model[0].weight.grad.dtype == torch.float32


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("quick") / "run", *QUICK)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_low_precision_run_is_close_to_the_full_one(tmp_path, quick, precision):
    run = train_tiny(tmp_path / "run", *QUICK, f"precision={precision}")
    left, right = (list(read_lines(r.metrics))[-1]["loss"] for r in (run, quick))
    assert left != right
    assert left == pytest.approx(right, rel=0.05)
    weights = safetensors.torch.load_file(run.model)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_pieces_of_a_batch_add_up_to_it(tmp_path, quick):
    run = train_tiny(tmp_path / "run", *QUICK, "accumulate=5")
    left, right = (safetensors.torch.load_file(r.model) for r in (run, quick))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(left[name], right[name]) for name in left)


def test_the_norm_of_the_gradient_is_clipped(tmp_path, quick):
    loose = train_tiny(tmp_path / "loose", *QUICK, "clip_norm=1e6")
    assert loose.model.read_bytes() == quick.model.read_bytes()
    tight = train_tiny(tmp_path / "tight", *QUICK, "clip_norm=1e-6")
    start, end = (safetensors.torch.load_file(f) for f in (tight.init, tight.model))
    biases = [name for name in start if name.endswith("bias")]  # which nothing decays
    for name in biases:
        assert 0 < (start[name] - end[name]).norm() < 1e-5


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_has_the_names_and_nearly_the_weights_of_a_plain_one(tmp_path, quick):
    run = train_tiny(tmp_path / "run", *QUICK, "compile=true")
    left, right = (safetensors.torch.load_file(r.model) for r in (run, quick))
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
    assert Path.load(run.folder).names == Path.load(quick.folder).names


def test_the_environment_tells_where_a_run_was_trained(quick):
    told = read_json(quick.environment)
    assert told["engine"]["device"] == "cpu"
    assert told["engine"]["threads"] == torch.get_num_threads()
    assert told["engine"]["strategy"] is None
    assert told["engine"]["kernel"] == "reference"
    assert told["data"] is None
    assert told["packages"]["lightning-fabric"]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_recipe_may_ask_for_the_fused_kernel_and_the_run_tells_which_it_was(
    tmp_path, base, built_kernel, quick
):
    run = train_tiny(tmp_path / "run", *QUICK, "optimizer.fused=true", f"optimizer.base={base}")
    assert read_json(run.environment)["engine"]["kernel"] == "fused-cpu"
    if base == "sgd":
        left, right = (safetensors.torch.load_file(r.model) for r in (run, quick))
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_going_on_with_another_kernel_is_told():
    then, now = {"threads": 1, "kernel": "reference"}, {"threads": 1, "kernel": "fused-cpu"}
    with pytest.warns(UserWarning, match=r"\(kernel reference -> fused-cpu\): its last digits"):
        compare(then, now)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(then, then)
        compare({"threads": 1}, now)  # an older checkpoint does not know


def draw():
    return (
        torch.rand(1).item(),
        np.random.rand(),  # noqa: NPY002
        random.random(),
        random.gauss(),
        np.random.randn(),  # noqa: NPY002
    )


def test_random_states_survive_json_and_come_back():
    draw()  # leaves half of a pair of Gaussians behind
    states = json.loads(json.dumps(random_states(CPU)))
    first = draw()
    assert draw() != first
    set_random_states(states, CPU)
    assert draw() == first


def test_a_seed_decides_and_leaves_no_trace():
    before = random_states(CPU)
    with seeded((3, 0), CPU):
        first = draw()
    with seeded((3, 1), CPU):
        assert draw() != first
    with seeded((3, 0), CPU):
        assert draw() == first
    assert random_states(CPU) == before


def test_the_first_signal_asks_and_is_passed_on_at_the_end():
    seen = []

    def interrupted():
        with stoppable() as stop:
            seen.append(stop.asked)
            signal.raise_signal(signal.SIGINT)
            seen.append(stop.asked)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_is_not_waited_for():
    reached = []

    def interrupted():
        with stoppable():
            for count in range(3):
                reached.append(count)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="twice"):
        interrupted()
    assert reached == [0, 1]


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable() as stop:
            signal.raise_signal(signal.SIGINT)
        assert not stop.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_nothing_is_heard_and_nothing_fails():
    heard = []

    def work():
        with stoppable() as stop:
            heard.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [False]
