# SPDX-License-Identifier: Apache-2.0
"""Data in memory: the sets that need no file, their splits and their batches."""

import sys

import pytest
import torch
from torch.testing import assert_close

from dessilbi.training.data import DATA_SETS, Split, batches, load_data
from dessilbi.training.generated import digits, synthetic
from dessilbi.training.models import build_model


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

    def accuracy():
        return (model(data.test.inputs).argmax(1) == data.test.targets).float().mean()

    before = accuracy()
    for inputs, targets in batches(data.train, 50, generator=torch.Generator().manual_seed(0)):
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
    pixels = torch.cat([data.train.inputs, data.validation.inputs])
    assert abs(pixels.mean()) < 1e-3
    assert abs(pixels.std() - 1) < 1e-3


@pytest.mark.parametrize("name", ["digits", "synthetic-mnist"])
def test_sets_without_files_never_ask_torchvision(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert len(load(name, download=True).validation) == 10


def test_training_and_validation_are_disjoint_and_together_the_set():
    data = load("digits", validation=400)
    (images, _), _ = digits()
    parts = torch.cat([data.train.inputs, data.validation.inputs]).flatten(1)

    assert (len(data.train), len(data.validation)) == (1037, 400)
    assert len(parts.unique(dim=0)) == len(images)


def test_the_seed_decides_the_validation_part_and_nothing_else():
    first, same, other = (load("digits", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.validation.inputs, same.validation.inputs)
    assert torch.equal(first.train.targets, same.train.targets)
    assert not torch.equal(first.validation.inputs, other.validation.inputs)
    assert torch.equal(first.test.inputs, other.test.inputs)


def test_loading_and_shuffling_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(batches(load("synthetic-mnist").test, 100, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("validation", [-1, 0, 1437])
def test_a_validation_part_that_leaves_one_side_empty_is_refused(validation):
    with pytest.raises(ValueError, match=f"of {validation} samples .* from 1 to 1436"):
        load("digits", validation=validation)


@pytest.mark.parametrize("validation", [1, 1436])
def test_the_smallest_and_the_largest_validation_part_are_allowed(validation):
    assert len(load("digits", validation=validation).validation) == validation


def test_an_unknown_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="data set 'cifar' is unknown") as caught:
        load("cifar")
    assert all(name in str(caught.value) for name in DATA_SETS)


def test_a_split_needs_one_target_per_input():
    with pytest.raises(ValueError, match="a split of 3 inputs and 2 targets is not allowed"):
        Split(torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64))


def numbered(count):
    number = torch.arange(count)
    return Split(number.to(torch.float32).reshape(-1, 1, 1, 1), number)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("shuffled", [False, True])
def test_an_epoch_holds_each_sample_once_with_its_target(batch_size, shuffled):
    generator = torch.Generator().manual_seed(0) if shuffled else None
    inputs, targets = zip(*batches(numbered(10), batch_size, generator=generator), strict=True)

    assert {len(batch) for batch in targets[:-1]} <= {batch_size}
    assert_close(torch.cat(inputs).flatten().to(torch.int64), torch.cat(targets))
    assert torch.cat(targets).sort().values.tolist() == list(range(10))
    assert (torch.cat(targets).tolist() == list(range(10))) is not shuffled


def test_the_generator_decides_the_order_and_moves_on_with_each_epoch():
    def epochs(seed):
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.cat([targets for _, targets in batches(numbered(10), 4, generator=generator)])
            for _ in range(2)
        ]

    first, second = epochs(0)
    assert torch.equal(torch.stack(epochs(0)), torch.stack([first, second]))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epochs(1)[0])


def test_the_permutation_is_drawn_at_the_call():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    batches(numbered(10), 4, generator=generator)
    assert not torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(("count", "sizes"), [(10, [4, 4]), (8, [4, 4]), (4, [4])])
def test_a_smaller_last_batch_can_be_dropped(count, sizes):
    generator = torch.Generator().manual_seed(0)
    for order in (None, generator):
        found = [len(t) for _, t in batches(numbered(count), 4, generator=order, drop_last=True)]
        assert found == sizes


def test_batches_that_cannot_be_are_refused_at_the_call():
    with pytest.raises(ValueError, match="batches of 0 samples are not allowed: give 1 or more"):
        batches(numbered(3), 0, generator=None)
    with pytest.raises(ValueError, match=r"do not fit a split of 3 samples .* of at most 3"):
        batches(numbered(3), 4, generator=None, drop_last=True)
