# SPDX-License-Identifier: Apache-2.0
"""Data in memory: the sets that need no file, their splits and their batches."""

import sys

import pytest
import torch
from torch.testing import assert_close

from dessilbi.models import build_model
from dessilbi.training.data import DATA_SETS, load_data
from dessilbi.training.data.generated import digits, synthetic


def all_of(split):
    """Inputs and targets of a whole split."""
    return split.examples(len(split))


def load(name, *, validation=10, seed=0, download=False):
    return load_data(name, root=None, validation=validation, seed=seed, download=download)


def test_digits_are_all_there_and_their_test_part_is_stratified():
    (images, labels), (test_images, test_labels) = digits()
    counts = labels.bincount() + test_labels.bincount()

    assert (len(images), len(test_images)) == (1437, 360)
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (test_labels.bincount() - counts * 360 / 1797).abs().max() <= 1
    assert (images.min(), images.max()) == (0, 1)


def test_no_digit_is_in_training_and_test():
    (images, _), (test_images, _) = digits()
    both = torch.cat([images, test_images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797


def test_an_enlarged_digit_is_still_the_small_one():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    pixels, _ = sklearn_datasets.load_digits(return_X_y=True)
    (images, _), (test_images, _) = digits()
    # The mean of a bilinear enlargement is, but for the border, the mean of the image.
    means = torch.cat([images, test_images]).mean(dim=(1, 2, 3)).sort().values
    expected = torch.from_numpy(pixels.mean(axis=1) / 16).float().sort().values
    assert expected.std() > 0.02
    assert_close(means, expected, rtol=0, atol=0.02)


def test_generated_images_are_reproducible_balanced_and_not_repeated():
    (images, labels), (test_images, test_labels) = synthetic()
    (again, _), _ = synthetic()

    assert images.shape == (2000, 1, 28, 28)
    assert test_images.shape == (500, 1, 28, 28)
    assert labels.bincount().tolist() == [200] * 10
    assert test_labels.bincount().tolist() == [50] * 10
    assert torch.equal(images, again)
    assert len(torch.cat([images, test_images]).flatten(1).unique(dim=0)) == 2500


def test_a_net_learns_the_generated_images_in_one_epoch():
    data = load("synthetic-mnist", validation=200)
    model = build_model("lenet", num_classes=10, in_channels=1, seed=0)
    parameters = list(model.parameters())

    test_images, test_labels = all_of(data.test)

    def accuracy():
        return (model(test_images).argmax(1) == test_labels).float().mean()

    before = accuracy()
    for inputs, targets in data.train.batches(0, batch_size=50, seed=0):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient

    assert before < 0.3
    assert accuracy() > 0.8


@pytest.mark.parametrize("name", ["digits", "synthetic-mnist"])
def test_training_pixels_have_mean_0_and_deviation_1(name):
    data = load(name)
    pixels = torch.cat([all_of(data.train)[0], all_of(data.validation)[0]])
    assert abs(pixels.mean()) < 1e-3
    assert abs(pixels.std() - 1) < 1e-3


@pytest.mark.parametrize("name", ["digits", "synthetic-mnist"])
def test_sets_without_files_never_ask_torchvision(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert len(load(name, download=True).validation) == 10


def test_training_and_validation_are_disjoint_and_together_the_set():
    data = load("digits", validation=400)
    (images, _), _ = digits()
    parts = torch.cat([all_of(data.train)[0], all_of(data.validation)[0]]).flatten(1)

    assert (len(data.train), len(data.validation)) == (1037, 400)
    assert len(parts.unique(dim=0)) == len(images)


def test_the_seed_decides_the_validation_part_and_nothing_else():
    first, same, other = (load("digits", seed=seed) for seed in (1, 1, 2))
    for part in ("train", "validation"):
        mine, again, others = (all_of(getattr(data, part)) for data in (first, same, other))
        assert all(map(torch.equal, mine, again))
        assert not torch.equal(mine[0], others[0])
    assert all(map(torch.equal, all_of(first.test), all_of(other.test)))


def test_loading_and_shuffling_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(load("synthetic-mnist").test.batches(0, batch_size=100, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("validation", [-1, 0, 1437])
def test_a_validation_part_that_leaves_one_side_empty_is_refused(validation):
    with pytest.raises(ValueError, match=f"of {validation} samples .* from 1 to 1436"):
        load("digits", validation=validation)


@pytest.mark.parametrize("validation", [1, 1436])
def test_the_smallest_and_the_largest_validation_part_are_allowed(validation):
    assert len(load("digits", validation=validation).validation) == validation


@pytest.mark.parametrize("name", ["cifar", "text:", "generated:", "generated:cifar", "mnist:3", ""])
def test_an_unknown_set_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"data='.*' is not known: use one of digits, ") as caught:
        load(name)
    assert all(known in str(caught.value) for known in (*DATA_SETS, "imagenet", "tinyshakespeare"))


def test_a_slip_of_the_pen_is_understood():
    with pytest.raises(ValueError, match=r"did you mean cifar10\?"):
        load("cifar-10")


@pytest.mark.parametrize("field", ["image_size", "length"])
def test_a_wish_that_means_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}=9 does not apply to digits, .*: leave it out"):
        load_data("digits", root=None, validation=10, seed=0, **{field: 9})


@pytest.mark.parametrize("told", ["x", "0", "-1", ""])
def test_a_number_of_generated_samples_that_is_none_is_refused(told):
    if not told:
        assert len(load("generated:mnist:").train) == 490
        return
    with pytest.raises(ValueError, match="does not end in a number of samples of 1 or more"):
        load(f"generated:mnist:{told}")


@pytest.mark.parametrize(
    ("name", "options", "shape", "num_classes"),
    [
        ("generated:mnist:30", {}, (1, 28, 28), 10),
        ("generated:cifar10:30", {}, (3, 32, 32), 10),
        ("generated:cifar100:30", {}, (3, 32, 32), 100),
        ("generated:imagenet:30", {"image_size": 16}, (3, 16, 16), 1000),
        ("generated:imagenet:30", {}, (3, 224, 224), 1000),
        ("generated:folder:30", {"image_size": 16}, (3, 16, 16), 10),
        ("generated:tinyshakespeare:30", {"length": 16}, (16,), 19),
    ],
)
def test_every_set_can_be_made_up_in_its_shape(name, options, shape, num_classes):
    data = load_data(name, root=None, validation=10, seed=0, **options)
    inputs, targets = next(data.train.batches(0, batch_size=10, seed=0))
    assert (len(data.train), len(data.validation)) == (20, 10)
    assert len(data.test) > 0
    assert inputs.shape == (10, *shape)
    assert data.blank(10).shape == inputs.shape
    assert data.blank(10).dtype == inputs.dtype
    assert data.num_classes == num_classes
    assert targets.max() < num_classes
    assert inputs.flatten(1).unique(dim=0).shape[0] == 10
