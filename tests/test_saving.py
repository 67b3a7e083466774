# SPDX-License-Identifier: Apache-2.0
"""A compact model comes back from its folder bit by bit, or is refused in one sentence."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from test_compaction import NETS, make, other_input
from torch import nn
from zoo import build

from dessilbi import compact, load_compact, save_compact
from dessilbi.blocks.ticket import Ticket
from dessilbi.files.sealing import checksum_of
from dessilbi.files.storage import as_json
from dessilbi.graph.inputs import LARGEST, FixedInput, TensorInput, describe, draw
from dessilbi.models.registry import build_registered
from dessilbi.saving.manifest import FILES, NAME, read_manifest
from dessilbi.saving.saving import open_compact
from dessilbi.testing import random_ticket


@functools.cache
def compacted(name):
    model, x, _ = make(name)
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    return compact(model, ticket, example_inputs=x), x


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved residual net; copy it to change anything."""
    return save_compact(compacted("residual")[0], tmp_path_factory.mktemp("saved") / "small")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def refused(folder, *words, factory=None, error=ValueError):
    with pytest.raises(error) as caught:
        load_compact(factory or NETS["residual"][0], folder)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message


def rewrite(folder, change):
    """Change the manifest as someone would who also writes the checksum."""
    told = json.loads((folder / NAME).read_text())
    change(told)
    told.pop("sha256")
    told["sha256"] = checksum_of(told)
    (folder / NAME).write_bytes(as_json(told))


def rehash(folder, name):
    import hashlib

    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    rewrite(folder, lambda told: told["files"].update({name: digest}))


# there and back


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("residual", "module"),
        ("depthwise", "module"),
        ("grouped", "module"),
        ("group norm", "module"),
        ("transposed", "module"),
        ("folded bias", "module"),
        ("carrier", "module"),
        ("gated embedding", "module"),
        ("grouped-query attention", "sized module"),
        ("shuffle", "program"),
        ("torch attention", "program"),
    ],
)
def test_what_is_loaded_computes_the_same_bit_by_bit(name, form, tmp_path):
    result, x = compacted(name)
    assert result.blueprint.form == form
    save_compact(result, tmp_path / "small")
    loaded = load_compact(NETS[name][0], tmp_path / "small")
    y = other_input(torch.cat([x, x]))
    with torch.no_grad():
        expected, found = result.model.eval()(y), loaded(y)
    assert torch.equal(expected, found)
    assert expected.std() > 0
    assert not loaded.training
    big = sum(p.numel() for p in NETS[name][0]().parameters())
    assert sum(p.numel() for p in loaded.parameters()) < big


def test_a_folded_model_comes_back_with_the_bias_it_was_given(tmp_path):
    result, _ = compacted("folded bias")
    assert result.blueprint.biases == ("2.bias",)
    save_compact(result, tmp_path / "small")
    loaded = load_compact(NETS["folded bias"][0], tmp_path / "small")
    assert torch.equal(loaded[2].bias, result.model[2].bias)
    assert loaded[2].bias.abs().max() > 0


def test_shared_tensors_are_written_once_and_stay_shared(tmp_path):
    result, _ = compacted("gated embedding")
    save_compact(result, tmp_path / "small")
    names = safetensors.torch.load_file(tmp_path / "small" / "weights.safetensors")
    assert "emb.weight" in names
    assert "head.weight" not in names
    loaded = load_compact(NETS["gated embedding"][0], tmp_path / "small")
    assert loaded.head.weight is loaded.emb.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_weights_comes_back(dtype, tmp_path):
    model, x = (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype),
        torch.ones(2, 6),
    )
    x = torch.randn_like(x).to(dtype)
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    result = compact(model, ticket, example_inputs=x)
    save_compact(result, tmp_path / "small")
    loaded = load_compact(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), tmp_path / "small"
    )
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(x), result.model(x))


def test_answers_that_are_the_same_tensor_twice_are_kept(tmp_path):
    class Twice(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return {"one": y, "two": y}

    def factory():
        return Twice(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    model, x = factory(), torch.randn(2, 6)
    result = compact(model, random_ticket(model, example_inputs=x, density=0.5), example_inputs=x)
    save_compact(result, tmp_path / "small")
    assert torch.equal(load_compact(factory, tmp_path / "small")(x)["two"], result.model(x)["two"])


@pytest.mark.parametrize("number", [1, 2])
def test_a_disk_that_fills_up_under_weights_or_answers_leaves_nothing(
    number, tmp_path, monkeypatch
):
    import dessilbi.files.storage

    seen, write = [], dessilbi.files.storage.write_atomic

    def full(path, data):
        seen.append(path)
        if len(seen) == number:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr("dessilbi.saving.saving.write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        save_compact(compacted("residual")[0], tmp_path / "small")
    assert len(seen) == number
    assert not list(tmp_path.iterdir())


def test_what_is_loaded_can_be_trained_on_and_does_not_follow_the_file(folder):
    loaded = load_compact(NETS["residual"][0], folder)
    before = loaded.fc.weight.clone()
    shutil.rmtree(folder)
    loaded.train()(compacted("residual")[1]).sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert not torch.equal(loaded.fc.weight, before)


def test_the_folder_holds_four_plain_files_without_pickle(saved):
    assert {file.name for file in saved.iterdir()} == {NAME, *FILES}
    for file in saved.iterdir():
        head = file.read_bytes()[:2]
        assert head not in (b"PK", b"\x80\x02", b"\x80\x04")
    json.loads((saved / NAME).read_text())
    assert Ticket.load(saved / "ticket.safetensors") == compacted("residual")[0].closed


def test_the_manifest_says_what_was_cut_and_proven(saved):
    result, x = compacted("residual")
    manifest = read_manifest(saved)
    assert manifest.model.endswith("test_compaction.Residual")
    assert manifest.proof == json.loads(json.dumps(result.proof.to_json()))
    assert manifest.ticket == result.closed.digest()
    again = manifest.blueprint()
    assert {n: [c.index.tolist() for c in own] for n, own in again.cuts.items()} == {
        n: [c.index.tolist() for c in own] for n, own in result.cuts.items()
    }
    assert manifest.described_inputs() == describe(x)


def test_a_folder_with_files_is_never_overwritten(folder):
    before = (folder / NAME).read_bytes()
    with pytest.raises(FileExistsError, match="nothing is ever overwritten"):
        save_compact(compacted("residual")[0], folder)
    assert (folder / NAME).read_bytes() == before


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dessilbi.saving.saving.write_manifest", full)
    with pytest.raises(OSError, match="No space"):
        save_compact(compacted("residual")[0], tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_changed_since_is_refused_unless_it_says_retrained(tmp_path):
    model, x, _ = make("residual")
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    result = compact(model, ticket, example_inputs=x)
    with torch.no_grad():
        result.model.fc.weight.mul_(1.01)
    with pytest.raises(ValueError, match="changed after compaction"):
        save_compact(result, tmp_path / "small")
    save_compact(result, tmp_path / "small", retrained=True)
    opened = open_compact(NETS["residual"][0], tmp_path / "small")
    assert opened.holds
    assert opened.manifest.retrained
    assert torch.equal(opened.model.fc.weight, result.model.fc.weight)


# damaged, changed, foreign


@pytest.mark.parametrize("name", [NAME, *FILES])
def test_any_bit_counts(name, folder):
    content = bytearray((folder / name).read_bytes())
    load_compact(NETS["residual"][0], folder)
    for position in np.linspace(0, len(content) - 1, 40).astype(int).tolist():
        for bit in (0, 5):
            content[position] ^= 1 << bit
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"changed|damaged"):
                read_manifest(folder)
            content[position] ^= 1 << bit


@pytest.mark.parametrize("name", [NAME, *FILES])
def test_a_truncated_file_is_refused(name, folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    refused(folder, name, "damaged")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    refused(folder, f"{name} is missing", error=FileNotFoundError)


@pytest.mark.parametrize("name", [NAME, *FILES])
def test_a_link_is_refused(name, folder, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(folder, name, "link")


def test_a_folder_without_manifest_is_named(tmp_path):
    refused(tmp_path, "not a saved compact model", error=FileNotFoundError)


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"\xff\x00", b'{"format": "npm"}', b"[" * 9000])
def test_a_foreign_manifest_is_refused(content, folder):
    (folder / NAME).write_bytes(content)
    refused(folder, "not a manifest of ours")


def test_a_newer_format_asks_for_an_upgrade(folder):
    rewrite(folder, lambda told: told.update(version=2))
    refused(folder, "format version 2", "reads 1", "upgrade")


def test_a_huge_manifest_is_not_read(folder):
    with (folder / NAME).open("ab") as file:
        file.truncate(65 << 20)
    refused(folder, "larger than 64 MiB")


def set_in(*path, value):
    def change(told):
        for step in path[:-1]:
            told = told[step]
        told[path[-1]] = value

    return change


FC = ("cuts", "fc.weight", 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("surprise", value=1), ["surprise"]),
        (set_in("form", value="pickle"), ["form"]),
        (set_in("files", "../weights.safetensors", value="0" * 64), ["files"]),
        (set_in("inputs", 0, "shape", value=[2**30, 2**30]), ["not allowed"]),
        (set_in("inputs", 0, "shape", value=[LARGEST + 1]), ["not allowed"]),
        (set_in("inputs", 0, "shape", value=[-1]), ["inputs"]),
        (set_in("inputs", 0, "dtype", value="object"), ["object"]),
        (set_in("inputs", 0, "mean", value="nan"), ["mean"]),
        (set_in("factor", value=-1.0), ["factor"]),
        (set_in(*FC, "size", value=2**40), ["size"]),
        (set_in(*FC, "size", value=2**30), ["cannot hold"]),
        (set_in(*FC, "kept", value="!!!!"), ["base64"]),
        (set_in(*FC, "kept", value="AAA="), ["leave nothing"]),
        (set_in(*FC, "groups", value=5), ["cannot hold"]),
        (set_in(*FC, "dim", value=7), ["dimension 7"]),
        (set_in(*FC, "dim", value=0), ["dimension 0"]),
        (set_in("cuts", "fc.extra", value=[]), ["no fc.extra"]),
        (set_in("biases", value=["fc.other.bias"]), ["fc.other.bias cannot be added"]),
        (set_in("biases", value=["fc.bias"]), ["fc.bias cannot be added"]),
        (
            set_in("sizes", value=[{"module": "fc", "attribute": "__class__", "old": 1, "new": 2}]),
            ["attribute"],
        ),
        (
            set_in("sizes", value=[{"module": "fc", "attribute": "forward", "old": 1, "new": 2}]),
            ["forward"],
        ),
        (
            set_in("sizes", value=[{"module": "no", "attribute": "size", "old": 1, "new": 2}]),
            ["no.size"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_manifest_with_fitting_checksums_and_wrong_content_is_refused(change, words, folder):
    rewrite(folder, change)
    refused(folder, *words)


def test_kept_indices_that_do_not_fit_the_weights_are_refused(folder):
    kept = json.loads((folder / NAME).read_text())["cuts"]["fc.weight"][0]["kept"]
    other = "/" + kept[1:] if kept[0] != "/" else "A" + kept[1:]
    rewrite(folder, set_in(*FC, "kept", value=other))
    refused(folder)


def test_weights_of_another_shape_are_refused(folder):
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    weights["fc.bias"] = torch.zeros(6)
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    rehash(folder, "weights.safetensors")
    refused(folder, "fc.bias is (5,), not (6,)")


def test_changed_weights_with_fitting_checksums_do_not_pass_the_answers(folder):
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    weights["fc.bias"][0] += 1e-3
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    rehash(folder, "weights.safetensors")
    refused(folder, "its answers are")
    assert not open_compact(NETS["residual"][0], folder).holds


def test_a_file_that_is_not_safetensors_is_refused(folder):
    (folder / "weights.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 100)
    rehash(folder, "weights.safetensors")
    refused(folder, "weights.safetensors cannot be read as safetensors")


# the factory


class Softened(NETS["residual"][0]):
    """The same tensors, another function."""

    def forward(self, x):
        return super().forward(x) * 1.001


def test_a_factory_with_the_same_tensors_and_another_function_is_refused(saved):
    refused(saved, "another model", "its answers are", factory=Softened)


def test_a_factory_of_another_model_is_refused(saved):
    refused(saved, "another model", factory=NETS["gate"][0])
    refused(saved, "another model", factory=lambda: nn.Linear(3, 4))


def test_a_program_of_another_model_is_refused(tmp_path):
    save_compact(compacted("shuffle")[0], tmp_path / "small")
    refused(tmp_path / "small", "another model", factory=NETS["gate"][0])


def test_a_factory_that_makes_no_module_is_refused(saved):
    refused(saved, "returned a int", factory=lambda: 3, error=TypeError)


def test_without_a_registered_name_a_factory_is_asked_for(saved):
    with pytest.raises(ValueError, match="give a factory"):
        load_compact(None, saved)


def test_an_import_path_in_a_manifest_is_never_executed(folder, monkeypatch):
    called = []
    monkeypatch.setattr("os.system", called.append)
    rewrite(folder, set_in("model", value="os.system"))
    load_compact(NETS["residual"][0], folder)
    rewrite(folder, set_in("factory", value={"name": "os:system", "options": {}}))
    with pytest.raises(ValueError, match="'os:system' is not a registered model"):
        load_compact(None, folder)
    assert called == []


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("dessilbi:resnet8-small", {"num_classes": 4, "in_channels": 1}, (1, 1, 28, 28)),
        ("torchvision:squeezenet1_1", {"num_classes": 7}, (1, 3, 64, 64)),
        ("timm:test_resnet", {"num_classes": 7}, (1, 3, 64, 64)),
        ("timm:test_vit", {"num_classes": 7}, (1, 3, 160, 160)),
    ],
)
def test_a_registered_name_builds_the_model_and_fetches_nothing(
    name, options, shape, tmp_path, monkeypatch
):
    library = name.partition(":")[0]
    if library != "dessilbi":
        pytest.importorskip(library)

    def no_network(*_, **__):
        raise AssertionError("something was fetched")

    monkeypatch.setattr("socket.socket.connect", no_network)
    torch.manual_seed(0)
    model, x = build_registered(name, options).eval(), torch.randn(shape)
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    result = compact(model, ticket, example_inputs=x)
    save_compact(result, tmp_path / "small", factory=name, options=options)
    for factory in (None, name):
        loaded = load_compact(factory, tmp_path / "small")
        with torch.no_grad():
            assert torch.equal(loaded(x), result.model.eval()(x))
        assert sum(p.numel() for p in loaded.parameters()) == result.proof.params_after


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "regnet_y_400mf", "densenet121", "mobilenet_v3_small", "efficientnet_b0"),
        *("shufflenet_v2_x1_0", "vit_b_16", "swin_t"),
    ],
)
def test_a_zoo_model_comes_back_bit_by_bit(name, tmp_path):
    model, x = build("torchvision", name), torch.randn(1, 3, 224, 224)
    ticket = random_ticket(model, example_inputs=x, density=0.5)
    result = compact(model, ticket, example_inputs=x)
    save_compact(result, tmp_path / "small", factory=f"torchvision:{name}")
    loaded = load_compact(None, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model.eval()(x))
    assert sum(p.numel() for p in loaded.parameters()) == result.proof.params_after


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dessilbi:nonet", {}, "dessilbi has no model 'nonet'"),
        ("torchvision:nonet", {}, "torchvision has no model 'nonet'"),
        ("timm:nonet", {}, "timm has no model 'nonet'"),
        ("timm:hf-hub:someone/model", {}, "is not a registered model"),
        ("timm:local-dir:../x", {}, "is not a registered model"),
        ("os.system", {}, "is not a registered model"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "'weights' of torchvision:resnet18"),
        ("torchvision:resnet18", {"weights_backbone": "DEFAULT"}, "is not allowed"),
        ("timm:test_resnet", {"pretrained": True}, "'pretrained'"),
        ("timm:test_resnet", {"checkpoint_path": "x"}, "'checkpoint_path'"),
        ("dessilbi:lenet", {"num_classes": 10**12}, "from 0 to 65,536"),
        ("dessilbi:lenet", {"num_classes": float("nan")}, "from 0 to 65,536"),
        ("dessilbi:lenet", {"num_classes": [1]}, "give a word or a number"),
        ("dessilbi:lenet", {"global_pool": "x" * 65}, "65 characters"),
        ("dessilbi:lenet", {"global_pool": "avg"}, "cannot be built"),
        ("dessilbi:lenet", {"in_channels": 3}, "1 channel"),
    ],
)
def test_a_name_or_option_that_is_not_allowed_is_refused(name, options, words):
    if name.startswith(("torchvision", "timm")):
        pytest.importorskip(name.partition(":")[0])
    with pytest.raises(ValueError, match=words) as caught:
        build_registered(name, options)
    assert "\n" not in str(caught.value)


def test_a_segmentation_model_does_not_fetch_its_backbone(monkeypatch):
    models = pytest.importorskip("torchvision").models
    given = {}
    monkeypatch.setattr(models, "get_model", lambda name, **options: given.update(options))
    build_registered("torchvision:fcn_resnet50", {"num_classes": 3})
    assert given == {"weights": None, "weights_backbone": None, "num_classes": 3}


def test_building_by_name_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    build_registered("dessilbi:lenet", {})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm.*dessilbi\[vision\]"):
        build_registered("timm:test_resnet", {})


# inputs


def test_drawn_inputs_are_the_same_everywhere():
    inputs = (
        TensorInput(None, (2,), "float64", mean=1.0, spread=2.0),
        TensorInput(None, (3,), "int64", low=3, high=9),
        TensorInput(None, (3,), "bool", mean=0.5),
        FixedInput(None, 7),
    )
    (x, ids, flags, seven), _ = draw(inputs, 1)[0]
    uniform = [0.5488135039273248, 0.7151893663724195]
    assert x.tolist() == [1.0 + 2.0 * 12**0.5 * (u - 0.5) for u in uniform]
    assert ids.tolist() == [7, 6, 5]
    assert flags.tolist() == [False, True, False]
    assert seven == 7


def test_drawn_inputs_have_the_kind_of_the_example():
    example = {"x": torch.randn(4, 500) * 3 + 5, "ids": torch.randint(2, 9, (4, 50)), "k": None}
    _, drawn = draw(describe(example), 1)[0]
    assert abs(drawn["x"].mean() - 5) < 0.5
    assert abs(drawn["x"].std() - 3) < 0.3
    assert set(drawn["ids"].unique().tolist()) == set(range(2, 9))
    assert drawn["k"] is None
    _, larger = draw(describe(example), 1, batch=7)[0]
    assert larger["x"].shape == (7, 500)


def test_example_inputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        describe(torch.tensor([1.0, float("nan")]))


def test_inputs_that_cannot_be_described_are_refused_before_anything_is_written(tmp_path):
    result, _ = compacted("residual")
    odd = dataclasses.replace(result.witness, inputs=(FixedInput(None, [torch.ones(1)]),))
    monstrous = dataclasses.replace(result, witness=odd)
    with pytest.raises(ValueError, match="a list, which cannot be described"):
        save_compact(monstrous, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_the_place_of_a_factory_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"a Sequential itself: give a function that builds"):
        load_compact(model, tmp_path)
