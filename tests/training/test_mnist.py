# SPDX-License-Identifier: Apache-2.0
"""MNIST and its like from files: the idx format, the layout, downloads, the real sets."""

import gzip
import os
import struct
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dessilbi.training.data import DATA_SETS, load_data
from dessilbi.training.data.idx import read_idx
from dessilbi.training.data.mnist import FILES

NAMES = [name for pair in FILES for name in pair]
# Without a time stamp, so that every worker makes the same bytes.
pack_bytes = partial(gzip.compress, mtime=0)


def idx_bytes(array):
    """The format as its inventors describe it: 0, 0, type, rank, big-endian lengths, bytes."""
    lengths = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, 8, array.ndim)) + lengths + array.astype(np.uint8).tobytes()


def write_set(root, *, dataset="MNIST", num_train=30, num_test=10, pack=False):
    """Files in torchvision's layout; the first pixel of each image is its number in the set."""
    folder = root / dataset / "raw"
    folder.mkdir(parents=True)
    for (images_file, labels_file), count in zip(FILES, (num_train, num_test), strict=True):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28))
        images[:, 0, 0] = np.arange(count)
        for name, array in ((images_file, images), (labels_file, np.arange(count) % 10)):
            content = idx_bytes(array)
            path = folder / (f"{name}.gz" if pack else name)
            path.write_bytes(pack_bytes(content) if pack else content)
    return folder


def load(name="mnist", *, root=None, validation=10, seed=0, download=False):
    return load_data(name, root=root, validation=validation, seed=seed, download=download)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (0, 28, 28)])
def test_idx_bytes_are_read_back(tmp_path, shape, pack):
    array = np.random.default_rng(0).integers(0, 256, shape)
    path = tmp_path / ("file.gz" if pack else "file")
    path.write_bytes(pack_bytes(idx_bytes(array)) if pack else idx_bytes(array))

    read = read_idx(path, ndim=len(shape))

    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


WHOLE = idx_bytes(np.arange(60).reshape(3, 4, 5))
PACKED = pack_bytes(WHOLE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing instead of 00000803"),
        (b"\x89PNG\r\n", "starts with 89504e47 instead of 00000803"),
        (idx_bytes(np.arange(9)), "starts with 00000801 instead of 00000803"),
        (b"\0\0\x0d\3" + WHOLE[4:], "starts with 00000d03"),
        (WHOLE[:10], "truncated or damaged .it ends inside its header"),
        (WHOLE[:-1], "truncated or damaged .76 bytes by its header, 75 on the disk"),
        (WHOLE + b"\0", "truncated or damaged .76 bytes by its header, 77 on the disk"),
        (b"\0\0\x08\3" + b"\xff" * 12, r"damaged .\d{29} bytes by its header, 16 on the disk"),
    ],
    ids=["empty", "png", "labels", "floats", "header", "short", "long", "lying"],
)
def test_a_foreign_or_damaged_idx_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "some-images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"some-images is .*{message}"):
        read_idx(path, ndim=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PACKED[:-9], "its gzip packing is broken"),
        (PACKED[:-8] + bytes(8), "its gzip packing is broken"),
        (PACKED[:10] + b"\xff" * 20, "its gzip packing is broken"),
        (WHOLE, "its gzip packing is broken"),
        (pack_bytes(WHOLE[:-1]), "not the 76 bytes of its header"),
        (pack_bytes(WHOLE + b"\0"), "not the 76 bytes of its header"),
        (pack_bytes(b"\0\0\x08\3" + b"\xff" * 12), r"\d{29} bytes by its header"),
    ],
    ids=["cut", "checksum", "garbage", "not packed", "short", "long", "lying"],
)
def test_a_damaged_packed_idx_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "some-images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"some-images.gz is truncated or damaged .*{message}"):
        read_idx(path, ndim=3)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("name", "dataset", "mean", "std"),
    [("mnist", "MNIST", 0.1307, 0.3081), ("fashion-mnist", "FashionMNIST", 0.2860, 0.3530)],
)
def test_files_become_normalised_images_and_their_labels(tmp_path, name, dataset, mean, std, pack):
    write_set(tmp_path, dataset=dataset, pack=pack)

    data = load(name, root=tmp_path)

    assert (data.name, data.num_classes, data.in_channels) == (name, 10, 1)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 10, 10)
    for split in (data.train, data.validation, data.test):
        inputs, targets = split.examples(len(split))
        assert inputs.shape == (len(split), 1, 28, 28)
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        pixel = inputs[:, 0, 0, 0] * std + mean
        number = (pixel * 255).round().to(torch.int64)
        assert_close(number % 10, targets)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (10, 28, 28)))
    inputs, _ = data.test.examples(len(data.test))
    assert_close(inputs[:, 0, 1:], ((images / 255 - mean) / std)[:, 1:].to(torch.float32))


def test_a_plain_file_is_preferred_to_a_packed_one(tmp_path):
    folder = write_set(tmp_path)
    (folder / f"{NAMES[0]}.gz").write_bytes(b"never read")
    assert len(load(root=str(tmp_path)).train) == 20


def test_without_a_root_the_error_says_how_to_give_one_and_what_belongs_there():
    with pytest.raises(ValueError, match=r"--data DIR or set \$DESSILBI_DATA") as caught:
        load("fashion-mnist")
    assert all(f"FashionMNIST/raw/{name}" in str(caught.value) for name in NAMES)


def test_missing_files_are_named_with_their_folder_and_the_remedy(tmp_path):
    folder = write_set(tmp_path)
    (folder / NAMES[2]).unlink()
    with pytest.raises(FileNotFoundError, match="let --download fetch them") as caught:
        load(root=tmp_path)
    message = str(caught.value)
    assert str(folder) in message
    assert all(name in message for name in NAMES)
    assert f"where {NAMES[2]} cannot be found" in message


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (0, np.zeros((30, 32, 32)), "holds images of 32x32 pixels, not of 28x28"),
        (1, np.zeros(29), "holds 29 labels for 30 images"),
        (1, np.full(30, 11), "holds the label 11, and 0 to 9 are allowed"),
        (3, np.zeros(0), "holds 0 labels for 10 images"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_by_name(tmp_path, file, array, message):
    folder = write_set(tmp_path)
    (folder / NAMES[file]).write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=f"{NAMES[file]} {message}"):
        load(root=tmp_path)


def test_a_set_without_images_is_refused(tmp_path):
    write_set(tmp_path, num_test=0)
    with pytest.raises(ValueError, match="holds 0 labels for 0 images"):
        load(root=tmp_path)


def fake_torchvision(monkeypatch, mnist):
    module = types.ModuleType("torchvision.datasets")
    module.MNIST = mnist
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def test_a_download_is_left_to_torchvision_and_read_by_us(tmp_path, monkeypatch):
    calls = []

    def mnist(root, train, download):
        calls.append((root, download))
        write_set(tmp_path)

    fake_torchvision(monkeypatch, mnist)

    assert len(load(root=tmp_path, download=True).test) == 10
    load(root=tmp_path, download=True)
    assert calls == [(str(tmp_path), True)], "files that are there are not fetched again"


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST"])
def test_torchvision_finds_and_reads_the_same_files(tmp_path, dataset):
    datasets = pytest.importorskip("torchvision.datasets")
    write_set(tmp_path, dataset=dataset)
    name = {"MNIST": "mnist", "FashionMNIST": "fashion-mnist"}[dataset]

    # The very call of a download; with the files in place it fetches nothing.
    theirs = getattr(datasets, dataset)(root=str(tmp_path), train=False, download=True)

    source = DATA_SETS[name]
    pixels = load(name, root=tmp_path).test.examples(10)[0] * source.std + source.mean
    assert_close((255 * pixels).round().to(torch.uint8).squeeze(1), theirs.data)


def test_nothing_is_fetched_unless_asked_for(tmp_path, monkeypatch):
    fake_torchvision(monkeypatch, lambda **_: pytest.fail("a download was started"))
    with pytest.raises(FileNotFoundError):
        load(root=tmp_path)


def test_a_download_without_torchvision_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'dessilbi\[vision\]'"):
        load(root=tmp_path, download=True)


def test_a_failed_download_is_one_sentence_with_its_reason(tmp_path, monkeypatch):
    def mnist(**_):
        raise RuntimeError("Error downloading train:\nTried a mirror, got:\nno route\n")

    fake_torchvision(monkeypatch, mnist)
    with pytest.raises(OSError, match=r"could not be downloaded .*no route\): check the net"):
        load(root=tmp_path, download=True)


@pytest.mark.data
@pytest.mark.skipif("DESSILBI_DATA" not in os.environ, reason="$DESSILBI_DATA is not set")
@pytest.mark.parametrize(
    ("name", "first_labels"),
    [("mnist", [5, 0, 4, 1, 9]), ("fashion-mnist", [9, 0, 0, 3, 0])],
)
def test_the_real_files_are_the_known_set(name, first_labels):
    data = load(name, root=os.environ["DESSILBI_DATA"], validation=1, seed=7)

    train, validation = data.train, data.validation
    assert (len(train), len(validation), len(data.test)) == (59_999, 1, 10_000)
    inputs, targets = train.examples(len(train))
    assert targets[:5].tolist() == first_labels
    counts = targets.bincount() + validation.examples(1)[1].bincount(minlength=10)
    assert counts.sum() == 60_000
    assert data.test.examples(10_000)[1].bincount(minlength=10).min() >= 892
    assert abs(inputs.mean()) < 1e-3
    assert abs(inputs.std() - 1) < 1e-3
