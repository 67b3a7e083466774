# SPDX-License-Identifier: Apache-2.0
"""compact, export and verify on the command line: numbers, exit codes, errors of one sentence."""

import copy
import json
import shutil

import pytest
import tiny
import torch
from commands import assert_failed, call
from tiny import QUICK, shared_run, train_tiny

from dessilbi import Ticket, close, load_compact
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.files.runs import Run
from dessilbi.files.storage import sha256_of
from dessilbi.models import build_model
from dessilbi.outcomes.compacting import example_of
from dessilbi.outcomes.tickets import Drawer, Wish
from dessilbi.training.data import DATA_SETS
from dessilbi.training.evaluation import masked
from dessilbi.training.finetune import load_trained

pytestmark = pytest.mark.usefixtures("command_line")

NUMBERS = (
    *("params_before", "params_after", "macs_before", "macs_after", "bytes_before", "bytes_after"),
    *("latency_ms_before", "latency_ms_after", "max_abs_diff"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a residual net with batch norm on a few images."""
    folder = tmp_path_factory.mktemp("resnet") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA_SETS, "few", tiny.FEW)
        return train_tiny(folder, "model=resnet8-small", *QUICK)


@pytest.fixture(scope="module")
def small(run, tmp_path_factory):
    """What compact prints for it, and the folder it made."""
    out = tmp_path_factory.mktemp("small") / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA_SETS, "few", tiny.FEW)
        result = call("compact", run.folder, "--density", 0.5, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), out


@pytest.fixture
def own(small, tmp_path):
    """A copy of the folder that a test may damage."""
    return shutil.copytree(small[1], tmp_path / "own")


# compact


def test_compact_tells_numbers_before_and_after(small, run):
    told, out = small
    for name in NUMBERS:
        assert isinstance(told[name], int | float), name
    assert told["folder"] == str(out)
    assert told["params_after"] < told["params_before"]
    assert told["macs_after"] < told["macs_before"]
    assert told["max_abs_diff"] < 1e-4
    model = build_model("resnet8-small", num_classes=10, in_channels=1)
    assert told["params_before"] == sum(p.numel() for p in model.parameters())
    loaded = load_compact(None, out)
    assert told["params_after"] == sum(p.numel() for p in loaded.parameters())


def test_what_compact_saves_is_the_masked_net_of_the_run_with_new_statistics(small, run):
    told, out = small
    trained = load_trained(run)
    ticket = Ticket.load(out / "ticket.safetensors")
    x = example_of(trained)
    chosen = Drawer(run).draw(Wish(density=0.5)).ticket  # as `dessilbi ticket` takes it
    assert ticket == close(chosen, trained.model, example_inputs=x)
    assert 0.25 < ticket.density <= 0.5
    big, loaded, test = (
        masked(trained.model, ticket, trained.data.train),
        load_compact(None, out),
        trained.data.test,
    )
    inputs, targets = next(iter(test.in_order(len(test))))
    with torch.no_grad():
        expected, found = big.eval()(inputs), loaded(inputs)
        stale = ticket.apply_(copy.deepcopy(trained.model)).eval()(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, stale, rtol=1e-2, atol=1e-2), "statistics do not matter here"
    assert told["same_predictions"] == told["predictions"] == len(targets)
    accuracy = float((expected.argmax(1) == targets).double().mean())
    assert told["accuracy_before"] == told["accuracy_after"] == accuracy


def test_compact_prints_a_table_and_takes_a_ticket_file(tmp_path):
    run = Run(shutil.copytree(shared_run().folder, tmp_path / "run"))
    assert call("ticket", run.folder, "--density", 0.3, "--out", "t.safetensors").exit_code == 0
    result = call("compact", run.folder, "--ticket", "t.safetensors", "--multiple-of", 4)
    assert result.exit_code == 0, result.output
    for word in ("parameters", "MACs", "latency ms", "max |difference|", "predictions identical"):
        assert word in result.stdout
    assert f"saved in {run.folder / 'compact' / 't'}" in result.stdout
    model = load_compact("dessilbi:lenet", run.folder / "compact" / "t")
    assert model.conv3.out_channels % 4 == 0
    again = call("compact", run.folder, "--ticket", "t.safetensors", "--json")
    assert json.loads(again.stdout)["folder"] == str(run.folder / "compact" / "t-2")


@pytest.mark.parametrize("options", [[], ["--density", 0.5, "--ticket", "t.safetensors"]])
def test_compact_asks_for_one_of_density_and_ticket(options):
    assert_failed(call("compact", shared_run().folder, *options), 2, "--density", "--ticket")


@pytest.mark.parametrize("density", ["0", "1.5", "nan"])
def test_compact_refuses_a_density_that_is_none(density):
    assert_failed(call("compact", shared_run().folder, "--density", density), 2, "(0, 1]")


def test_compact_refuses_what_is_no_run(tmp_path):
    assert_failed(call("compact", tmp_path, "--density", 0.5), 1, tmp_path)


def test_compact_refuses_a_ticket_of_another_model(tmp_path):
    spec = TensorSpec((4, 3), (1, None))
    Ticket({"fc.weight": torch.ones(4, 1, dtype=torch.bool)}, {"fc.weight": spec}).save("t.st")
    result = call("compact", shared_run().folder, "--ticket", "t.st", "--out", "small")
    assert_failed(result, 1, "another model", "fc.weight")
    assert not (tmp_path / "small").exists()


def test_compact_refuses_a_damaged_ticket(tmp_path):
    (tmp_path / "t.st").write_bytes(b"nonsense")
    result = call("compact", shared_run().folder, "--ticket", "t.st")
    assert_failed(result, 1, "not a readable ticket")


def test_compact_never_overwrites(own):
    before = (own / "manifest.json").read_bytes()
    result = call("compact", shared_run().folder, "--density", 0.5, "--out", own)
    assert_failed(result, 1, "nothing is ever overwritten")
    assert (own / "manifest.json").read_bytes() == before


def test_compact_says_when_single_weights_only_pay_in_sparse_storage(tmp_path):
    run = shared_run()
    weight = load_trained(run).model.fc1.weight
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert mask.any(dim=0).all()
    assert mask.any(dim=1).all()
    Ticket({"fc1.weight": mask}, {"fc1.weight": TensorSpec((84, 120), (1, 1))}).save("t.st")
    result = call("compact", run.folder, "--ticket", "t.st", "--out", "small")
    assert result.exit_code == 0, result.output
    assert "no tensor gets smaller" in result.stdout
    assert "only sparse storage" in result.stdout
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())["proof"]
    saved = 4 * 84 * 120 - (84 * 120 // 8 + 4 * int(mask.sum()))  # dense against bits and values
    assert saved > 0
    assert manifest["sparse_bytes"] == manifest["bytes_after"] - saved


# verify


def test_verify_computes_the_proof_again(small):
    told = json.loads(call("verify", small[1], "--json").stdout)
    assert told["holds"] is True
    assert told["relative_diff"] < told["tolerance"] == 1e-9
    for name in NUMBERS:
        assert name in told
    assert told["params_after"] == small[0]["params_after"]
    result = call("verify", small[1])
    assert result.exit_code == 0
    assert "the proof holds" in result.stdout


def test_verify_makes_the_masked_net_again_from_the_run(small, run):
    told = json.loads(call("verify", small[1], "--run", run.folder, "--json").stdout)
    assert told["holds"] is True
    assert told["tolerance"] == 1e-4
    assert told["relative_diff"] < 1e-4


def test_verify_refuses_another_run(small):
    result = call("verify", small[1], "--run", shared_run().folder)
    assert_failed(result, 1, "was not made from", shared_run().folder)


def test_verify_fails_on_a_changed_file(own):
    content = bytearray((own / "manifest.json").read_bytes())
    content[200] ^= 1
    (own / "manifest.json").write_bytes(content)
    assert_failed(call("verify", own), 1, own / "manifest.json", "was changed")


def test_verify_exits_with_1_when_the_proof_does_not_hold(own):
    import safetensors.torch
    from test_saving import rehash

    weights = safetensors.torch.load_file(own / "weights.safetensors")
    weights["fc.bias"][0] += 1e-3
    safetensors.torch.save_file(weights, own / "weights.safetensors")
    rehash(own, "weights.safetensors")
    result = call("verify", own)
    assert result.exit_code == 1
    assert "DOES NOT hold" in result.stdout
    told = json.loads(call("verify", own, "--json").stdout)
    assert told["holds"] is False
    assert abs(told["max_abs_diff"] - 1e-3) < 1e-6
    assert_failed(call("export", own, "--format", "pt2"), 1, "its answers are")


def test_verify_says_what_kind_of_folder_it_cannot_check(tmp_path):
    refused = call("verify", shared_run().folder, "--run", shared_run().folder)
    assert_failed(refused, 2, "is a run folder itself")
    assert_failed(call("verify", tmp_path), 1, "neither a run folder nor a smaller model")


# export


@pytest.mark.parametrize("word", ["pt2", "safetensors"])
def test_export_writes_beside_the_manifest_and_says_the_difference(word, own):
    told = json.loads(call("export", own, "--format", word, "--json").stdout)
    assert told["file"] == str(own / f"model.{word}")
    assert told["bytes"] == (own / f"model.{word}").stat().st_size
    assert told["max_abs_diff"] == 0
    before = sha256_of(own / f"model.{word}")
    assert "model-2" in call("export", own, "--format", word).stdout
    assert sha256_of(own / f"model.{word}") == before
    assert call("verify", own).exit_code == 0


def test_export_to_onnx(own, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    result = call("export", own, "--format", "onnx", "--out", tmp_path / "small.onnx")
    assert result.exit_code == 0, result.output
    assert "takes any batch" in result.stdout
    assert (tmp_path / "small.onnx").is_file()
    assert result.stderr == ""


def test_export_refuses_an_ending_that_is_another_format(own, tmp_path):
    result = call("export", own, "--format", "pt2", "--out", tmp_path / "small.onnx")
    assert_failed(result, 2, "--format pt2", "small.onnx")


def test_export_of_a_model_without_registered_name_says_how(own):
    from test_saving import rewrite, set_in

    rewrite(own, set_in("factory", value=None))
    assert_failed(call("export", own, "--format", "pt2"), 1, "load_compact")
