# SPDX-License-Identifier: Apache-2.0
"""Lightning: the optimizer as any other, and a path that lives through Lightning's checkpoints."""

import warnings
from functools import cache
from importlib import import_module

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI, Path, param_groups

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say of each other at import
    pytest.importorskip("lightning_fabric")
    integration = pytest.importorskip("dessilbi.integrations.lightning", exc_type=ImportError)

PathCallback = integration.PathCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # its own call
    # A resumed fit here saves no checkpoints of its own.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]
EPOCHS = 4


@pytest.fixture(scope="module", params=integration.NAMES)
def lightning(request):
    """The library under each of its names; each has classes of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(request.param)


@cache
def net_of(name):
    class Net(import_module(name).LightningModule):
        def __init__(self, **options):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
            self.options = {"nu": 1.0, "lam": 0.6, "momentum": 0.9, **options}

        def training_step(self, batch):
            inputs, targets = batch
            return nn.functional.cross_entropy(self.net(inputs), targets)

        def configure_optimizers(self):
            groups = param_groups(self, {"net.0.weight": "neuron", "*": None})
            optimizer = DessiLBI(groups, lr=0.1, **self.options)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Net


class Batches:
    """Six batches, and which of them comes next: Lightning resumes within an epoch by this."""

    def __init__(self):
        self.next = 0

    def __len__(self):
        return 6

    def __iter__(self):
        self.next %= len(self)  # nobody asks an iterator of known length for what is behind its end
        while self.next < len(self):
            generator = torch.Generator().manual_seed(self.next)
            self.next += 1
            inputs = torch.randn(4, 6, generator=generator)
            yield inputs, inputs.argmax(1) % 3

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def trainer_in(folder, lightning, *callbacks, epochs=EPOCHS, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": epochs, "accelerator": "cpu", **quiet, **options}
    return lightning.Trainer(callbacks=list(callbacks), default_root_dir=folder, **options)


def fit(folder, lightning, *callbacks, ckpt_path=None, module=None, **options):
    module = net_of(lightning.__name__)() if module is None else module
    torch.manual_seed(2)
    trainer = trainer_in(folder, lightning, *callbacks, **options)
    trainer.fit(module, Batches(), ckpt_path=ckpt_path)
    return module, trainer


@pytest.fixture(scope="module")
def whole(lightning, tmp_path_factory):
    """A fit of all epochs, with a checkpoint in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("whole")
    saver = lightning.callbacks.ModelCheckpoint(
        dirpath=folder / "saved", every_n_train_steps=9, save_top_k=-1, filename="{step}"
    )
    callback = PathCallback(every=2)
    module, trainer = fit(folder, lightning, callback, saver)
    return folder, module, trainer, callback


def test_a_fit_records_the_path_beside_its_logs(whole):
    folder, _, trainer, callback = whole
    path = Path.load(folder)
    assert [point.step for point in path.points] == list(range(2, 25, 2))
    assert path.points == callback.path.points
    assert 0 < path.points[-1].density < 1
    assert path.ticket(density=0.5) == callback.path.ticket(density=0.5)
    assert path.time == pytest.approx(sum(6 * 0.1 * 0.9**epoch for epoch in range(EPOCHS)))
    assert isinstance(trainer.optimizers[0], DessiLBI)


@pytest.mark.parametrize("moved", [False, True], ids=["same folder", "another folder"])
def test_a_resumed_fit_is_the_uninterrupted_one_to_the_bit(whole, lightning, moved, tmp_path):
    folder, module, trainer, _ = whole
    if not moved:
        tmp_path.joinpath("path.jsonl").write_bytes((folder / "path.jsonl").read_bytes())
    callback = PathCallback(every=2)
    checkpoint = folder / "saved" / "step=9.ckpt"
    options = {"ckpt_path": checkpoint, "enable_checkpointing": False}
    other, resumed = fit(tmp_path, lightning, callback, **options)
    state, theirs = (t.optimizers[0].state_dict()["state"] for t in (trainer, resumed))
    for name, weight in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight)
    for key, values in state.items():
        assert values.keys() == theirs[key].keys()
        assert all(torch.equal(values[name], theirs[key][name]) for name in values)
    assert (tmp_path / "path.jsonl").read_bytes() == (folder / "path.jsonl").read_bytes()
    assert callback.path.entry()["net.0.weight"].ne(-1).any()


def test_the_path_of_another_fit_is_not_overwritten(whole, lightning, tmp_path):
    before = (whole[0] / "path.jsonl").read_bytes()
    (tmp_path / "path.jsonl").write_bytes(before)
    with pytest.raises(FileExistsError, match=r"path\.jsonl exists already"):
        fit(tmp_path, lightning, PathCallback(), epochs=1, enable_checkpointing=False)
    assert (tmp_path / "path.jsonl").read_bytes() == before


def test_a_checkpoint_made_without_the_callback_is_refused_with_it(lightning, tmp_path):
    fit(tmp_path / "without", lightning, epochs=1)
    (checkpoint,) = (tmp_path / "without").rglob("*.ckpt")
    options = {"epochs": 2, "ckpt_path": checkpoint, "enable_checkpointing": False}
    with pytest.raises(ValueError, match=r"step=6\.ckpt was made without PathCallback"):
        fit(tmp_path / "with", lightning, PathCallback(), **options)


def test_an_optimizer_that_was_not_configured_is_refused(lightning, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer=1\) is not allowed: 1 optimizers were"):
        fit(tmp_path, lightning, PathCallback(optimizer=1), epochs=1)


def test_before_the_fit_there_is_no_path():
    with pytest.raises(ValueError, match=r"made when trainer\.fit begins"):
        PathCallback().path  # noqa: B018


def test_the_trainer_of_either_name_takes_the_callback_for_one_of_its_own(lightning, tmp_path):
    trainer = lightning.Trainer(callbacks=PathCallback(), default_root_dir=tmp_path, logger=False)
    assert any(isinstance(callback, PathCallback) for callback in trainer.callbacks)
    assert isinstance(PathCallback(), lightning.Callback)


def test_a_trial_run_leaves_no_files(lightning, tmp_path):
    callback = PathCallback(folder=tmp_path)
    for _ in range(2):
        fit(tmp_path, lightning, callback, fast_dev_run=2)
    assert callback.path.step == 2
    assert not list(tmp_path.iterdir())


def test_what_a_test_loads_is_not_what_the_next_fit_goes_on_with(whole, lightning, tmp_path):
    class Tested(net_of(lightning.__name__)):
        def test_step(self, batch):
            self.training_step(batch)

    callback, module = PathCallback(every=2), Tested(lam=0.05)
    trainer = trainer_in(tmp_path, lightning, callback, epochs=1, enable_checkpointing=False)
    trainer.test(module, Batches(), whole[0] / "saved" / "step=9.ckpt", verbose=False)
    trainer.fit(module, Batches())
    assert [point.step for point in callback.path.points] == [2, 4, 6]
    assert Path.load(tmp_path).points == callback.path.points


def test_a_fit_after_a_fit_is_another_path(lightning, tmp_path):
    callback, module = PathCallback(every=2), net_of(lightning.__name__)(lam=0.05)
    options = {"module": module, "epochs": 1, "enable_checkpointing": False}
    _, trainer = fit(tmp_path, lightning, callback, **options)
    trainer.fit_loop.max_epochs = 2  # Lightning makes the optimizer anew
    with pytest.raises(FileExistsError, match="give the callback another folder, or resume"):
        trainer.fit(module, Batches())
    assert Path.load(tmp_path).points == callback.path.points
    assert callback.path.step == 6


class Adversaries:
    """Manual optimization: two optimizers in turns, one of which takes every other batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch)
        first, second = self.optimizers()
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            optimizer.step()

    def configure_optimizers(self):
        parts = ({"params": [(f"net.{i}.weight", self.net[i].weight)]} for i in (0, 2))
        return [
            DessiLBI([{**part, "structure": "neuron"}], lr=0.1, nu=1.0, lam=0.6) for part in parts
        ]


def test_each_of_several_optimizers_has_its_path(lightning, tmp_path):
    module = type("Both", (Adversaries, net_of(lightning.__name__)), {})()
    saver = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="last")
    paths = [PathCallback(optimizer=i, every=1, folder=tmp_path / f"{i}") for i in (0, 1)]
    fit(tmp_path, lightning, *paths, saver, module=module, epochs=2)
    assert [callback.path.step for callback in paths] == [12, 6]
    assert [callback.path.names for callback in paths] == [["net.0.weight"], ["net.2.weight"]]
    module = type("Both", (Adversaries, net_of(lightning.__name__)), {})()
    again = [PathCallback(optimizer=i, every=1, folder=tmp_path / f"a{i}") for i in (0, 1)]
    options = {"module": module, "epochs": 3, "enable_checkpointing": False}
    fit(tmp_path, lightning, *again, ckpt_path=tmp_path / "last.ckpt", **options)
    assert [callback.path.step for callback in again] == [18, 9]


def test_two_paths_in_one_folder_are_refused(lightning, tmp_path):
    module = type("Both", (Adversaries, net_of(lightning.__name__)), {})()
    paths = [PathCallback(optimizer=i) for i in (0, 1)]
    with pytest.raises(FileExistsError, match="give the callback another folder"):
        fit(tmp_path, lightning, *paths, module=module, epochs=1)


def test_clipped_and_accumulated_gradients_are_those_of_a_loop_of_ones_own(lightning, tmp_path):
    monitor = lightning.callbacks.LearningRateMonitor(log_momentum=True)
    logger = lightning.loggers.CSVLogger(tmp_path)
    callback = PathCallback(every=1)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "log_every_n_steps": 1}
    module = net_of(lightning.__name__)(lam=0.15)
    callbacks = (callback, monitor)
    _, trainer = fit(
        tmp_path, lightning, *callbacks, module=module, epochs=2, logger=logger, **options
    )
    assert trainer.callback_metrics["lr-DessiLBI/pg1"] == pytest.approx(0.09)
    assert Path.load(trainer.log_dir).points == callback.path.points

    own = net_of(lightning.__name__)(lam=0.15)
    (optimizer,), (scheduler,) = own.configure_optimizers()
    path, norms = Path(optimizer, every=1), []
    for _ in range(2):
        for number, batch in enumerate(Batches()):
            (own.training_step(batch) / 2).backward()
            if number % 2:
                norms.append(float(nn.utils.clip_grad_norm_(own.parameters(), 0.05)))
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    path.record()
    assert min(norms) > 0.05
    assert path.points == callback.path.points
    assert path.points[0].density < path.points[-1].density
    for name, weight in own.state_dict().items():
        assert torch.equal(module.state_dict()[name], weight)
