# SPDX-License-Identifier: Apache-2.0
"""A model becomes one file for a runtime, which answers as the model does, or nothing is left."""

import logging
import sys
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from test_compaction import make
from torch import nn

from dessilbi import compact, export
from dessilbi.exporting import open_session, run_session
from dessilbi.testing import random_ticket

onnx_only = pytest.mark.skipif(
    any(
        not __import__("importlib").util.find_spec(n) for n in ("onnx", "onnxscript", "onnxruntime")
    ),
    reason="needs the extra export",
)


@pytest.fixture(scope="module")
def net():
    """A compact net with batch norm, in train mode as compaction left it."""
    model, x, _ = make("plain")
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    return compact(model.train(), ticket, example_inputs=x).model, x


@pytest.fixture(scope="module")
def onnx_file(net, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, x = net
    return export(model, tmp_path_factory.mktemp("onnx") / "small.onnx", example_inputs=x)


def refused(folder, model, name, *words, x, error=ValueError):
    before = sorted(folder.iterdir())
    with pytest.raises(error) as caught:
        export(model, folder / name, example_inputs=x)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert sorted(folder.iterdir()) == before, "something was left behind"


# .onnx


def test_onnx_answers_as_the_model_does_on_any_batch(onnx_file, net):
    model, _ = net
    assert onnx_file.dynamic_batch
    assert onnx_file.max_abs_diff < 1e-5
    session = open_session(onnx_file.file)
    for size in (1, 3, 8):
        y = torch.randn(size, 3, 9, 9)
        with torch.no_grad():
            expected = model.eval()(y)
        (found,) = run_session(session, ((y,), {}))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0
    model.train()


def test_onnx_is_one_file_without_names_from_this_machine(onnx_file):
    assert [file.name for file in onnx_file.file.parent.iterdir()] == ["small.onnx"]
    content = onnx_file.file.read_bytes()
    assert onnx_file.bytes == len(content)
    assert b"test_compaction" not in content
    assert b"site-packages" not in content


def test_the_result_is_plain_values(onnx_file):
    told = onnx_file.to_json()
    assert told["file"] == str(onnx_file.file)
    assert list(told) == ["file", "bytes", "max_abs_diff", "dynamic_batch", "notes"]


@onnx_only
def test_a_fixed_batch_and_weights_beside_the_file_are_said(tmp_path, monkeypatch, capfd):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 64)

        def forward(self, x):
            return self.fc(x).reshape(2, 8, 8)

    monkeypatch.setattr("dessilbi.exporting.ONNX_LIMIT", 0)
    done = export(Fixed(), tmp_path / "fixed.onnx", example_inputs=torch.randn(2, 3))
    assert not done.dynamic_batch
    assert any("another batch" in note for note in done.notes)
    assert any("fixed.onnx.data" in note for note in done.notes)
    assert {f.name for f in tmp_path.iterdir()} == {"fixed.onnx", "fixed.onnx.data"}
    assert done.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    (found,) = run_session(open_session(done.file), ((torch.ones(2, 3),), {}))
    assert found.shape == (2, 8, 8)
    assert capfd.readouterr() == ("", ""), "torch's exporter talked"


@onnx_only
def test_a_file_that_answers_differently_is_not_kept(tmp_path, monkeypatch):
    def off(session, probe):
        return [torch.full_like(x, 0.5) for x in run_session(session, probe)]

    monkeypatch.setattr("dessilbi.exporting.run_session", off)
    refused(tmp_path, nn.Linear(3, 2), "a.onnx", "answers differently", x=torch.ones(2, 3))


@onnx_only
def test_what_onnxruntime_cannot_run_is_refused(tmp_path):
    model, x = nn.Linear(3, 2).bfloat16(), torch.ones(2, 3, dtype=torch.bfloat16)
    refused(tmp_path, model, "a.onnx", "cannot be written as ONNX", x=x)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    x, words = torch.ones(1, 3), (missing, "dessilbi[export]")
    refused(tmp_path, nn.Linear(3, 2), "a.onnx", *words, x=x, error=ImportError)


# .pt2 and .safetensors


def test_pt2_answers_as_the_model_does_on_any_batch(net, tmp_path):
    model, x = net
    done = export(model, tmp_path / "small.pt2", example_inputs=x)
    assert done.dynamic_batch
    assert done.max_abs_diff == 0
    loaded, y = torch.export.load(done.file).module(), torch.randn(5, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(y), model.eval()(y))
    model.train()


def test_pt2_holds_no_example_inputs_and_no_paths(tmp_path):
    done = export(nn.Linear(3, 2), tmp_path / "a.pt2", example_inputs=torch.full((2, 3), 0.123))
    secret = torch.full((1,), 0.123).numpy().tobytes()
    with zipfile.ZipFile(done.file) as archive:
        parts = [archive.read(name) for name in archive.namelist()]
    assert any(b"linear" in part for part in parts)
    assert not any(secret in part or b".py" in part for part in parts)


def test_safetensors_holds_weights_and_buffers(net, tmp_path):
    model, x = net
    done = export(model, tmp_path / "small.safetensors", example_inputs=x)
    assert done.max_abs_diff == 0
    found = safetensors.torch.load_file(done.file)
    assert set(found) == set(model.state_dict())
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_a_rewritten_program_is_exported_as_well(tmp_path):
    model, x, _ = make("shuffle")
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    result = compact(model, ticket, example_inputs=x)
    assert result.proof.form == "program"
    done = export(result.model, tmp_path / "small.pt2", example_inputs=x)
    assert done.dynamic_batch
    assert done.max_abs_diff == 0


def test_several_inputs_by_name_and_plain_values(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x, scale=None, flag=True):
            y = self.fc(x) if flag else x
            return {"b": y if scale is None else y * scale, "a": (y,)}

    x, scale = torch.randn(2, 3), torch.rand(2, 1)
    for number, inputs in enumerate([(x, None), (x, scale, True), {"x": x, "scale": scale}]):
        done = export(Two(), tmp_path / f"{number}.pt2", example_inputs=inputs)
        assert done.dynamic_batch
        assert done.max_abs_diff == 0


def test_the_model_and_its_mode_stay_as_they_are(net, tmp_path):
    model, x = net
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "small.safetensors", example_inputs=x)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# refusals


@pytest.mark.parametrize("name", ["model.pt", "model", "model.ONNX"])
def test_an_unknown_ending_is_refused(name, tmp_path):
    words = (".onnx, .pt2, .safetensors",)
    refused(tmp_path, nn.Linear(3, 2), name, *words, x=torch.ones(1, 3))


@pytest.mark.parametrize("name", ["a.onnx", "a.pt2", "a.safetensors", "b.onnx"])
def test_nothing_is_ever_overwritten(name, tmp_path):
    taken = tmp_path / (name if name != "b.onnx" else "b.onnx.data")
    taken.write_bytes(b"mine")
    words = (str(taken), "exists")
    refused(tmp_path, nn.Linear(3, 2), name, *words, x=torch.ones(1, 3), error=FileExistsError)
    assert taken.read_bytes() == b"mine"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export(nn.Linear(3, 2), tmp_path / "no" / "a.pt2", example_inputs=torch.ones(1, 3))


@pytest.mark.parametrize("name", ["a.pt2", "a.safetensors"])
def test_nan_weights_are_refused(name, tmp_path):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, float("nan"))
    refused(tmp_path, model, name, "weight has values that are not finite", x=torch.ones(1, 3))


def test_example_inputs_of_the_wrong_shape_are_refused(tmp_path, capfd):
    for name in ("a.pt2", "a.safetensors"):
        refused(tmp_path, nn.Linear(3, 2), name, "example inputs", x=torch.ones(1, 4))
    assert capfd.readouterr() == ("", "")


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x) if bool(x.sum() > 0) else x


def test_a_model_that_does_not_trace_is_refused(tmp_path):
    refused(tmp_path, Branching(), "a.pt2", "Branching cannot be read", x=torch.ones(1, 3))


def test_a_disk_that_fills_up_under_safetensors_is_an_os_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_model", full)
    words = ("a.safetensors could not be written", "No space left on device")
    x = torch.ones(1, 3)
    refused(tmp_path, nn.Linear(3, 2), "a.safetensors", *words, x=x, error=OSError)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    words = ("No space",)
    refused(tmp_path, nn.Linear(3, 2), "a.pt2", *words, x=torch.ones(1, 3), error=OSError)


def test_warnings_of_the_caller_stay_as_they_were(tmp_path):
    export(nn.Linear(3, 2), tmp_path / "a.safetensors", example_inputs=torch.ones(1, 3))
    with pytest.raises(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)


def test_what_compact_returned_is_exported_as_its_model(tmp_path):
    model, x, _ = make("plain")
    small = compact(model, random_ticket(model, example_inputs=x, density=0.5), example_inputs=x)
    written = [
        export(it, tmp_path / f"{number}.safetensors", example_inputs=x).file.read_bytes()
        for number, it in enumerate((small, small.model))
    ]
    assert written[0] == written[1]


@onnx_only
def test_where_torchvision_is_missing_the_exporter_does_not_say_so(tmp_path, monkeypatch, capfd):
    export_onnx = torch.onnx.export

    def talking(*args, **kwargs):
        logger = logging.getLogger("torch.onnx._internal.exporter._registration")
        logger.warning("torchvision is not installed. Skipping torchvision::nms")
        return export_onnx(*args, **kwargs)

    monkeypatch.setattr("torch.onnx.export", talking)
    export(nn.Linear(3, 2), tmp_path / "small.onnx", example_inputs=torch.ones(2, 3))
    assert "torchvision" not in capfd.readouterr().err
