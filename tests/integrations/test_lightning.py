# SPDX-License-Identifier: Apache-2.0
"""Lightning: the optimizer as any other, and a path that lives through Lightning's checkpoints."""

import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from dessilbi import DessiLBI, Path, param_groups

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say of each other at import
    both = [n for n in ("pytorch_lightning", "lightning.pytorch") if find_spec(n.split(".")[0])]
    lightning = pytest.importorskip(both[0] if both else "pytorch_lightning")  # one library

from dessilbi.integrations.lightning import PathCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # its own call
    # A resumed fit here saves no checkpoints of its own.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]
EPOCHS = 4


class Net(lightning.LightningModule):
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


def fit(folder, *callbacks, epochs=EPOCHS, ckpt_path=None, **options):
    module = Net()
    torch.manual_seed(2)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, Batches(), ckpt_path=ckpt_path)
    return module, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A fit of all epochs, with a checkpoint in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("whole")
    saver = lightning.callbacks.ModelCheckpoint(
        dirpath=folder / "saved", every_n_train_steps=9, save_top_k=-1, filename="{step}"
    )
    callback = PathCallback(every=2)
    module, trainer = fit(folder, callback, saver)
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
def test_a_resumed_fit_is_the_uninterrupted_one_to_the_bit(whole, moved, tmp_path):
    folder, module, trainer, _ = whole
    if not moved:
        tmp_path.joinpath("path.jsonl").write_bytes((folder / "path.jsonl").read_bytes())
    callback = PathCallback(every=2)
    checkpoint = folder / "saved" / "step=9.ckpt"
    other, resumed = fit(tmp_path, callback, ckpt_path=checkpoint, enable_checkpointing=False)
    state, theirs = (t.optimizers[0].state_dict()["state"] for t in (trainer, resumed))
    for name, weight in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight)
    for key, values in state.items():
        assert values.keys() == theirs[key].keys()
        assert all(torch.equal(values[name], theirs[key][name]) for name in values)
    assert (tmp_path / "path.jsonl").read_bytes() == (folder / "path.jsonl").read_bytes()
    assert callback.path.entry()["net.0.weight"].ne(-1).any()


def test_the_path_of_another_fit_is_not_overwritten(whole, tmp_path):
    before = (whole[0] / "path.jsonl").read_bytes()
    (tmp_path / "path.jsonl").write_bytes(before)
    with pytest.raises(FileExistsError, match=r"path\.jsonl exists already"):
        fit(tmp_path, PathCallback(), epochs=1, enable_checkpointing=False)
    assert (tmp_path / "path.jsonl").read_bytes() == before


def test_a_checkpoint_made_without_the_callback_is_refused_with_it(tmp_path):
    fit(tmp_path / "without", epochs=1)
    (checkpoint,) = (tmp_path / "without").rglob("*.ckpt")
    options = {"epochs": 2, "ckpt_path": checkpoint, "enable_checkpointing": False}
    with pytest.raises(ValueError, match=r"step=6\.ckpt was made without PathCallback"):
        fit(tmp_path / "with", PathCallback(), **options)


def test_an_optimizer_that_was_not_configured_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer=1\) is not allowed: 1 optimizers were"):
        fit(tmp_path, PathCallback(optimizer=1), epochs=1)


def test_before_the_fit_there_is_no_path():
    with pytest.raises(ValueError, match=r"made when trainer\.fit begins"):
        PathCallback().path  # noqa: B018
