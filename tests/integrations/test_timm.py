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
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.scheduler.scheduler import Scheduler  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler  # noqa: E402

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
    assert (small.proof.form, small.proof.relative_diff < 1e-9) == ("sized module", True)
    attention = small.model.blocks[0].attn
    assert attention.qkv.weight.shape == (3 * 8 * alive, 32)
    assert (attention.num_heads, attention.head_dim) == (alive, 8)
    before = attention.qkv.weight.detach().clone()
    step(small.model, small.optimizer)
    assert not torch.equal(attention.qkv.weight, before)
    (heads,) = [g for g in small.optimizer.param_groups if g["structure"] == "head:8+8+8"]
    assert small.optimizer.state[heads["params"][0]]["v"].shape == (3 * 8 * alive, 32)


CLASSES = torch.tensor([0, 1, 2, 0])
UPDATES, EPOCHS = 3, 6  # per epoch; of the schedule


def images(update):
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(update))


class Training:
    """What timm's train script holds, in the order in which it makes it."""

    def __init__(self, folder, *, per_epoch=False, clip_mode="norm"):
        self.model, self.clip_mode = cnn(), clip_mode
        self.optimizer = timm.optim.create_optimizer_v2(
            self.model, "dessilbi", lr=0.1, momentum=0.9, weight_decay=0.0, nu=1.0, lam=0.35
        )
        name_parameters(self.optimizer, self.model)
        self.average = ModelEmaV3(self.model, decay=0.9)
        self.scaler = NativeScaler(device="cpu")
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            "cosine",
            num_epochs=EPOCHS,
            warmup_epochs=2,
            warmup_lr=0.01,
            min_lr=0.001,
            step_on_epochs=per_epoch,
            updates_per_epoch=UPDATES,
        )
        folder.mkdir(exist_ok=True)
        self.folder, self.path, self.rates = folder, None, []
        self.saver = CheckpointSaver(
            self.model,
            self.optimizer,
            model_ema=self.average,
            amp_scaler=self.scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
        )

    def resume(self, position):
        last = str(self.folder / "last.pth.tar")
        start = timm.models.resume_checkpoint(self.model, last, self.optimizer, self.scaler)
        timm.models.load_checkpoint(self.average.module, last, use_ema=True)
        if self.scheduler.t_in_epochs:
            self.scheduler.step(start)
        else:
            self.scheduler.step_update(start * UPDATES)
        self.path = Path(self.optimizer, file=self.folder / "path.jsonl", resume=position)
        return start

    def run(self, epochs):
        if self.path is None:
            self.path = Path(self.optimizer, every=1, file=self.folder / "path.jsonl")
        for epoch in epochs:
            for update in range(epoch * UPDATES, (epoch + 1) * UPDATES):
                self.rates.append(self.optimizer.param_groups[0]["lr"])
                loss = torch.nn.functional.cross_entropy(self.model(images(update)), CLASSES)
                self.scaler(
                    loss,
                    self.optimizer,
                    clip_grad=0.05,
                    clip_mode=self.clip_mode,
                    parameters=timm.models.model_parameters(
                        self.model, exclude_head="agc" in self.clip_mode
                    ),
                )
                self.optimizer.zero_grad()
                self.average.update(self.model, step=update)
                self.scheduler.step_update(num_updates=update + 1)
            self.scheduler.step(epoch + 1)
            self.saver.save_checkpoint(epoch, metric=float(epoch))
        return self


@pytest.mark.parametrize("per_epoch", [False, True], ids=["per update", "per epoch"])
def test_resumed_in_the_surroundings_of_its_train_script_it_is_the_whole_run(per_epoch, tmp_path):
    whole = Training(tmp_path / "whole", per_epoch=per_epoch)
    whole.run(range(whole.epochs))
    half = Training(tmp_path / "parts", per_epoch=per_epoch).run(range(3))
    resumed = Training(tmp_path / "parts", per_epoch=per_epoch)
    start = resumed.resume(half.path.state_dict())
    resumed.run(range(start, resumed.epochs))

    assert start == 3
    assert half.rates + resumed.rates == whole.rates
    for one, other in ((whole.model, resumed.model), (whole.average, resumed.average)):
        theirs = other.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())
    states = zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True)
    for state, theirs in states:
        assert state.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in state.items())
    files = [training.folder / "path.jsonl" for training in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert 0 < resumed.path.points[-1].density < 1


@pytest.mark.parametrize("clip_mode", ["norm", "value", "agc"])
def test_the_path_counts_the_rates_that_its_scheduler_writes(clip_mode, tmp_path):
    training = Training(tmp_path, clip_mode=clip_mode).run(range(EPOCHS))
    rates = training.rates
    assert len(rates) == training.path.step == EPOCHS * UPDATES
    assert rates[0] == 0.01 < rates[1] < max(rates)  # warmed up
    assert rates[-1] < max(rates)
    assert training.path.time == pytest.approx(sum(rates))
    weights = dict(training.model.named_parameters())
    ticket = training.path.ticket(density=0.3)
    ticket.apply_(training.average.module)
    for name in ticket:
        kept = training.average.module.get_parameter(name) != 0
        assert 0 < int(kept.sum()) < weights[name].numel()


class Falling(Scheduler):
    """A schedule on timm's base, which writes any option of the groups."""

    def _get_lr(self, t):
        return [value / 2**t for value in self.base_values]


@pytest.mark.parametrize("option", ["momentum", "weight_decay"])
def test_a_scheduler_may_write_other_options_than_the_rate(option):
    weights, times = [], []
    for how in ("scheduler", "by hand", "constant"):
        model, options = cnn(), {"momentum": 0.8, "weight_decay": 0.02}
        optimizer = DessiLBI(param_groups(model), lr=0.05, nu=1.0, lam=0.1, **options)
        path = Path(optimizer, every=1)
        scheduler = Falling(optimizer, option) if how == "scheduler" else None
        for number in range(4):
            if scheduler is not None:
                scheduler.step(number)
            for group in optimizer.param_groups if how == "by hand" else ():
                group[option] = options[option] / 2**number
            step(model, optimizer)
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
        times.append(path.time)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert times == [pytest.approx(4 * 0.05)] * 3
