# SPDX-License-Identifier: Apache-2.0
"""Feeding: order, shares, resuming, augmentation, all without memory."""

import pytest
import torch

from dessilbi.training.data.images import Images, crop_and_flip
from dessilbi.training.feeding import InMemory, Split


def numbered(count, chosen=None):
    """Samples that carry their number as input and target."""
    number = torch.arange(count)
    return Split(InMemory(number.to(torch.float32).reshape(-1, 1, 1, 1), number), chosen)


def pictures(count=40, size=8):
    """Augmented images of random bytes, no two alike."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    moments = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    return Split(Images(pixels, torch.arange(count), augment=crop_and_flip, **moments))


def epoch_of(split, epoch=0, *, batch_size=4, seed=0, **more):
    return list(split.batches(epoch, batch_size=batch_size, seed=seed, **more))


def targets_of(batches):
    return [targets.tolist() for _, targets in batches]


def same(left, right):
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_an_epoch_holds_whole_batches_and_no_sample_twice():
    inputs, targets = zip(*epoch_of(numbered(11)), strict=True)
    assert [len(batch) for batch in targets] == [4, 4]
    assert torch.equal(torch.cat(inputs).flatten(), torch.cat(targets).float())
    assert torch.cat(targets).unique().numel() == 8
    assert torch.cat(targets).tolist() != sorted(torch.cat(targets).tolist())


def test_no_sample_is_dropped_for_ever():
    seen = {t for epoch in range(20) for b in targets_of(epoch_of(numbered(11), epoch)) for t in b}
    assert seen == set(range(11))


def test_seed_and_epoch_decide_the_order_and_nothing_else():
    torch.manual_seed(1)
    first = targets_of(epoch_of(numbered(40), 3, seed=5))
    torch.manual_seed(2)
    assert targets_of(epoch_of(numbered(40), 3, seed=5)) == first
    assert targets_of(epoch_of(numbered(40), 4, seed=5)) != first
    assert targets_of(epoch_of(numbered(40), 3, seed=6)) != first


@pytest.mark.parametrize("seeds", [(0, 1), (0, 2**32), (1, 2**62)])
def test_seeds_that_share_low_bits_are_different_seeds(seeds):
    one, two = (targets_of(epoch_of(numbered(40), seed=seed)) for seed in seeds)
    assert one != two


@pytest.mark.parametrize("start", [0, 1, 7, 10])
def test_a_later_start_gives_the_same_batches_to_the_bit(start):
    split = pictures()
    whole = epoch_of(split, 2, seed=3)
    assert len(whole) == 10
    assert same(epoch_of(split, 2, seed=3, start=start), whole[start:])


def test_batches_before_the_start_are_not_read():
    class Watched(InMemory):
        def read(self, plan, device):
            plan = list(plan)
            read.extend(plan)
            return super().read(plan, device)

    read = []
    split = Split(Watched(torch.zeros(40), torch.arange(40)))
    assert len(epoch_of(split, start=8)) == len(read) == 2


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_batches_of_one_to_the_bit(world_size):
    split = pictures()
    whole = epoch_of(split, 1, batch_size=8)
    shares = [
        epoch_of(split, 1, batch_size=8, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [
        (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
        for parts in zip(*shares, strict=True)
    ]
    assert {len(labels) for share in shares for _, labels in share} == {8 // world_size}
    assert same(joined, whole)


def test_a_split_reads_its_own_samples_only():
    split = numbered(20, chosen=torch.tensor([3, 5, 7, 11]))
    assert len(split) == 4
    assert targets_of(split.in_order(3)) == [[3, 5, 7], [11]]
    assert sorted(targets_of(epoch_of(split))[0]) == [3, 5, 7, 11]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_in_order_every_sample_comes_once_over_all_processes(batch_size, world_size):
    found = [
        target
        for rank in range(world_size)
        for batch in targets_of(numbered(10).in_order(batch_size, rank=rank, world_size=world_size))
        for target in batch
    ]
    assert found == list(range(10))


def test_in_order_stops_at_the_limit():
    assert targets_of(numbered(10).in_order(4, limit=6)) == [[0, 1, 2, 3], [4, 5]]
    assert targets_of([numbered(10).examples(3)]) == [[0, 1, 2]]
    assert targets_of([numbered(3).examples(9)]) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch of 0 samples .* of 10: give a batch_size from 1 to 10"),
        ({"batch_size": 11}, "batch of 11 samples .* of 10: give a batch_size from 1 to 10"),
        ({"batch_size": 4, "world_size": 3}, "of 4 .* equally by 3 processes: .* multiple of 3"),
        ({"batch_size": 4, "start": 3}, "start=3 is not allowed: an epoch has 2 batches"),
        ({"batch_size": 4, "start": -1}, "start=-1 is not allowed"),
    ],
)
def test_batches_that_cannot_be_are_refused_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        numbered(10).batches(0, seed=0, **options)


def test_in_order_batches_of_nothing_are_refused():
    with pytest.raises(ValueError, match="batches of 0 samples are not allowed: give 1 or more"):
        numbered(3).in_order(0)


def test_a_split_needs_one_target_per_input():
    with pytest.raises(ValueError, match="a split of 3 inputs and 2 targets is not allowed"):
        InMemory(torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64))


def test_images_are_normalised_channel_by_channel():
    split = pictures()
    images, _ = split.examples(40)
    pixels = images * torch.tensor([0.2, 0.3, 0.4]).reshape(3, 1, 1)
    pixels = (pixels + torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1)) * 255
    assert images.dtype == torch.float32
    assert (pixels - pixels.round()).abs().max() < 1e-3
    assert (pixels.round().min(), pixels.round().max()) == (0, 255)


def test_a_shuffled_batch_is_cropped_and_mirrored_and_its_targets_are_not():
    split = pictures(200)
    plain, _ = split.examples(200)
    mean, std = (torch.tensor(m).reshape(3, 1, 1) for m in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    black = (0 - mean) / std
    seen = set()
    for images, targets in epoch_of(split, batch_size=20):
        for image, target in zip(images, targets.tolist(), strict=True):
            padded = black.repeat(1, 16, 16)
            padded[:, 4:12, 4:12] = plain[target]
            crops = {
                (row, column, mirrored): crop.flip(-1) if mirrored else crop
                for row in range(9)
                for column in range(9)
                for mirrored in (False, True)
                for crop in [padded[:, row : row + 8, column : column + 8]]
            }
            # An image that is shifted out of sight but for a corner may fit twice.
            found = [place for place, crop in crops.items() if torch.equal(crop, image)]
            assert found
            seen.add(found[0])
    assert {row for row, _, _ in seen} == {column for _, column, _ in seen} == set(range(9))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_every_batch_and_epoch_is_augmented_anew():
    split = Split(pictures(1).source, torch.zeros(12, dtype=torch.int64))  # 12 times one picture
    images = [image for epoch in range(3) for batch, _ in epoch_of(split, epoch) for image in batch]
    assert len(torch.stack(images).flatten(1).unique(dim=0)) > 25


def test_in_order_images_are_as_they_are():
    split = pictures()
    assert same(list(split.in_order(40)), [split.examples(40)])
    assert torch.equal(split.examples(40)[1], torch.arange(40))
