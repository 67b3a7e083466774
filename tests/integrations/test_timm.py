# SPDX-License-Identifier: Apache-2.0
"""timm: its own factory makes DessiLBI, and heads of its packed qkv go."""

import sys
from functools import partial
from math import inf

import pytest
import torch

from dessilbi import DessiLBI, Path, close, compact, param_groups, plan

timm = pytest.importorskip("timm")
from selecting import halve, unlike  # noqa: E402

from dessilbi.integrations.timm import main, name_parameters  # noqa: E402  # registers the name

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit():
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=3
    )


def cnn():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3)


def step(model, optimizer):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(X), torch.tensor([0, 2])).backward()
    optimizer.step()


def test_the_factory_of_timm_makes_it():
    model = cnn()
    optimizer = timm.optim.create_optimizer_v2(
        model, "dessilbi", lr=0.1, weight_decay=1e-3, nu=2.0, lam=0.05
    )
    assert isinstance(optimizer, DessiLBI)
    told = {(g["structure"], g["weight_decay"]) for g in optimizer.param_groups}
    assert told == {(None, 0.0), ("filter", 1e-3), ("element", 1e-3)}
    assert {g["momentum"] for g in optimizer.param_groups} == {0.9}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len([*model.parameters()])
    for group in optimizer.param_groups:
        assert all((p.dim() == 4) == (group["structure"] == "filter") for p in group["params"])


def test_tokens_and_positions_of_a_vit_stay_without_structure():
    model = vit()
    optimizer = timm.optim.create_optimizer_v2(model, "dessilbi")
    (plain,) = [g for g in optimizer.param_groups if g["structure"] is None]
    assert {id(model.cls_token), id(model.pos_embed)} <= {id(p) for p in plain["params"]}


def test_named_afterwards_it_has_a_path():
    model = cnn()
    optimizer = timm.optim.create_optimizer_v2(model, "dessilbi", lr=0.1, nu=1.0, lam=0.05)
    with pytest.raises(ValueError, match="have no names"):
        Path(optimizer)
    name_parameters(optimizer, model)
    path = Path(optimizer, every=1)
    step(model, optimizer)
    assert path.names
    assert set(path.names) <= {name for name, _ in model.named_parameters()}


def test_names_of_another_model_are_refused():
    optimizer = timm.optim.create_optimizer_v2(cnn(), "dessilbi")
    with pytest.raises(ValueError, match=r"a parameter of shape .* that is not of this"):
        name_parameters(optimizer, cnn())


def test_its_train_script_may_say_opt_dessilbi(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, timm.optim\n"
        "made = timm.optim.create_optimizer_v2(torch.nn.Linear(2, 2), sys.argv[2], lr=0.1)\n"
        "print(type(made).__name__, *sys.argv[1:])\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["timm", str(script), "--opt", "dessilbi"])
    main()
    assert capsys.readouterr().out == "DessiLBI --opt dessilbi\n"


def test_a_script_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["timm", "no.py"])
    with pytest.raises(SystemExit, match=r"there is no file no\.py: give timm's train\.py"):
        main()


@pytest.fixture(scope="module")
def trained():
    """A ViT trained some steps, with its path; heads are blocks in three parts of qkv."""
    model = vit()
    rules = plan(model, example_inputs=X).rules({"head": {}, "neuron": {}})
    groups = partial(param_groups, rules=rules, example_inputs=X)
    optimizer = timm.optim.create_optimizer_v2(
        model, "dessilbi", lr=0.1, nu=1.0, lam=inf, param_group_fn=groups
    )
    unlike(optimizer)
    path = Path(optimizer, every=1)
    for number in range(8):
        step(model, optimizer)
        if number == 6:  # lambda does not matter before the first block enters
            halve(optimizer)
    return model, optimizer, path


def test_heads_of_packed_qkv_enter_one_by_one(trained):
    _, optimizer, path = trained
    heads, gamma = path.support(step=8)["blocks.0.attn.qkv.weight"], optimizer.gamma()
    assert 0 < int(heads.sum()) < 4
    rows = gamma["blocks.0.attn.qkv.weight"].reshape(3, 4, 8, 32)
    assert torch.equal(rows.abs().sum((0, 2, 3)) > 0, heads.reshape(-1))
    assert (rows.abs().sum((2, 3))[:, heads.reshape(-1)] > 0).all()  # in q, k and v


def test_dead_heads_really_go_and_training_goes_on(trained):
    model, optimizer, path = trained
    ticket = path.ticket(step=8)
    assert 0 < int(ticket["blocks.0.attn.qkv.weight"].sum()) < 4
    path.close()
    closed = close(ticket, model, example_inputs=X)
    small = compact(model, closed, example_inputs=X, optimizer=optimizer)
    alive = int(ticket["blocks.0.attn.qkv.weight"].sum())
    assert (small.proof.form, small.proof.relative_diff < 1e-9) == ("module", True)
    attention = small.model.blocks[0].attn
    assert attention.qkv.weight.shape == (3 * 8 * alive, 32)
    assert (attention.num_heads, attention.head_dim) == (alive, 8)
    before = attention.qkv.weight.detach().clone()
    step(small.model, small.optimizer)
    assert not torch.equal(attention.qkv.weight, before)
    (heads,) = [g for g in small.optimizer.param_groups if g["structure"] == "head:8+8+8"]
    assert small.optimizer.state[heads["params"][0]]["v"].shape == (3 * 8 * alive, 32)
