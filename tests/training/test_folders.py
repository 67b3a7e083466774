# SPDX-License-Identifier: Apache-2.0
"""Folders of images: found, decoded by workers, the same however they are read."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dessilbi.training.data import load_data

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight and two pictures of each colour, with noise, of various sizes; png keeps pixels."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for name, colour in COLOURS.items():
            place = root / part / name
            place.mkdir(parents=True)
            for number in range(count):
                size = (20 + 3 * number, 40 - 2 * number, 3)
                pixels = np.clip(colour + noise.integers(-60, 60, size), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    (root / "train" / "red" / "notes.txt").write_text("no image")
    return root


def load(root, name="folder", *, validation=6, image_size=16, seed=0, **more):
    return load_data(
        name, root=root, validation=validation, seed=seed, image_size=image_size, **more
    )


def same(left, right):
    pairs = zip(left, right, strict=True)
    return len(left) > 0 and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs
    )


def test_folders_are_classes_and_validation_is_taken_from_train(folder):
    data = load(folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 6, 6)
    assert (data.num_classes, data.in_channels, data.side) == (3, 3, 16)
    images, labels = data.test.examples(6)
    assert images.shape == (6, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.mean((2, 3)).argmax(1).tolist() == [2, 2, 1, 1, 0, 0]  # blue, green, red
    both = torch.cat([data.train.indices, data.validation.indices])
    assert sorted(both.tolist()) == list(range(24))
    assert not torch.equal(data.train.indices, load(folder, seed=1).train.indices)


def test_images_in_order_are_the_middle_of_the_shorter_side_resized(folder):
    from torchvision.transforms import v2

    path = folder / "val" / "red" / "1.png"
    image = Image.open(path)
    expected = v2.Compose([v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor()])(image)
    found, _ = load(folder, normalise=False).test.examples(6)
    assert torch.equal(found[5], expected / 255)
    mean = torch.tensor((0.485, 0.456, 0.406)).reshape(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).reshape(3, 1, 1)
    assert torch.equal(load(folder).test.examples(6)[0][5], (expected / 255 - mean) / std)


@pytest.fixture(scope="module")
def epoch(folder):
    """One epoch read in this process."""
    return list(load(folder).train.batches(1, batch_size=6, seed=3))


def test_workers_other_starts_and_other_ranks_give_the_same_images(folder, epoch):
    torch.manual_seed(9)
    batches = partial(load(folder, workers=2).train.batches, 1, batch_size=6, seed=3)
    halves = [list(batches(rank=rank, world_size=2)) for rank in (0, 1)]
    joined = [
        (torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*halves, strict=True)
    ]
    assert same(list(batches(start=1)), epoch[1:])
    assert same(joined, epoch)


def test_images_are_cropped_anew_in_every_epoch_unless_that_is_not_wanted(folder, epoch):
    one = torch.cat([images for images, _ in epoch])
    other = torch.cat([i for i, _ in load(folder).train.batches(2, batch_size=6, seed=3)])
    assert len(torch.cat([one, other]).flatten(1).unique(dim=0)) == 36
    plain = load(folder, augment=False).train.batches(2, batch_size=6, seed=3)
    expected, _ = load(folder).train.examples(18)
    found = torch.cat([images for images, _ in plain]).flatten(1)
    assert torch.equal(found.unique(dim=0), expected.flatten(1).unique(dim=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_random_state_alone(folder, workers):
    before = torch.get_rng_state()
    list(load(folder, workers=workers).train.batches(0, batch_size=6, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_before_the_start_are_not_decoded(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr("torchvision.datasets.folder.pil_loader", decoded.append)
    with pytest.raises(TypeError):  # what is not decoded cannot be cropped
        list(load(folder).train.batches(0, batch_size=6, seed=0, start=2))
    assert len(decoded) == 1
    assert not list(load(folder).train.batches(0, batch_size=6, seed=0, start=3))
    assert len(decoded) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "foreign", "cut"])
def test_a_damaged_image_is_named_in_one_sentence(tmp_path, folder, workers, content):
    for part in ("train", "val"):
        for name in ("a", "b"):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for number in range(2):
                good = (folder / "val" / "red" / "0.png").read_bytes()
                place.joinpath(f"{number}.png").write_bytes(good)
    bad = tmp_path / "val" / "b" / "1.png"
    bad.write_bytes(good[: len(good) // 2] if content is None else content)
    data = load(tmp_path, validation=1, workers=workers)
    with pytest.raises(ValueError, match=f"{bad} cannot be read as an image .* take it") as caught:
        data.test.examples(4)
    assert "\n" not in str(caught.value)


def make(root, *files):
    for file in files:
        place = root / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"")


def test_what_is_missing_is_told_with_its_place(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/1.png")
    with pytest.raises(FileNotFoundError, match=r"folder needs folders of images train/CLASS/\*"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}, where val cannot be found"):
        load(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=f"needs images in {tmp_path / 'val'}/CLASS .Could"):
        load(tmp_path)
    make(tmp_path, "val/a/1.png", "val/c/1.png")
    with pytest.raises(ValueError, match=r"same folders of classes .b is in one only.: give both"):
        load(tmp_path)
    (tmp_path / "val" / "b").mkdir()
    (tmp_path / "val" / "c" / "1.png").unlink()
    (tmp_path / "val" / "c").rmdir()
    with pytest.raises(FileNotFoundError, match=r"needs images in .*no valid file .*: put them"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path / 'flowers'}, where train and val"):
        load(tmp_path, "folder:flowers")
    with pytest.raises(ValueError, match=r"folder that holds train/CLASS/\*.jpg and val/CLASS"):
        load(None)


def test_a_folder_below_the_data_folder_and_its_test_part_are_found(tmp_path):
    make(tmp_path, *(f"mine/{part}/{c}/1.png" for part in ("train", "test", "val") for c in "ab"))
    make(tmp_path, "mine/test/a/2.png")
    data = load(tmp_path, "folder:mine", validation=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (1, 1, 3)


def test_imagenet_needs_its_thousand_classes(tmp_path):
    make(tmp_path, *(f"imagenet/{part}/{c}/1.png" for part in ("train", "val") for c in "ab"))
    with pytest.raises(ValueError, match=r"imagenet has 1000 classes, and 2 folders .*=folder:im"):
        load(tmp_path, "imagenet", validation=1)


def test_folders_have_no_length(folder):
    with pytest.raises(ValueError, match="length=5 does not apply to folder, which is no text: l"):
        load(folder, length=5)


def test_without_torchvision_folders_say_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"folder is decoded with torchvision.*\[vision\]'"):
        load(folder)
