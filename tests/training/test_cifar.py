# SPDX-License-Identifier: Apache-2.0
"""CIFAR from its pickles, and what no pickle may do."""

import hashlib
import io
import os
import pickle
import struct
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dessilbi.training.data import DATA_SETS, load_data
from dessilbi.training.data.cifar import CIFAR10, CIFAR100, read_cifar
from dessilbi.training.data.pickles import read_pickle


def old_pickle(images, labels, key):
    """What Python 2 and an old numpy wrote: byte strings, protocol 2, numpy.core.

    Opcodes: PROTO 2, EMPTY_DICT, MARK, key, value, ..., SETITEMS, STOP.
    """

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    shape = b"".join(map(number, images.shape))
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    array += number(0) + b"\x85" + text(b"b") + b"\x87R("
    array += number(1) + b"(" + shape + b"t" + dtype + b"\x89" + text(images.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + listed + b"u."


def batch(count, seed):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), list(range(count))


def write_set(root, layout, *, content=old_pickle, count=10):
    """Small files in torchvision's layout, and the layout with their MD5 sums."""
    (root / layout.folder).mkdir(parents=True)

    def written(files):
        for number, (file, _) in enumerate(files):
            made = content(*batch(count, number), layout.labels)
            (root / layout.folder / file).write_bytes(made)
            yield file, hashlib.md5(made).hexdigest()

    return replace(layout, train=tuple(written(layout.train)), test=tuple(written(layout.test)))


@pytest.mark.parametrize("layout", [CIFAR10, CIFAR100], ids=lambda layout: layout.dataset)
def test_files_become_images_and_labels_in_their_order(tmp_path, layout):
    mine = write_set(tmp_path, layout)
    train, test = read_cifar(tmp_path, False, name="cifar", layout=mine)

    for (images, labels), files in ((train, layout.train), (test, layout.test)):
        expected = np.concatenate([batch(10, number)[0] for number in range(len(files))])
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        np.testing.assert_array_equal(images.numpy(), expected.reshape(-1, 3, 32, 32))
        assert labels.tolist() == list(range(10)) * len(files)


def test_a_set_is_normalised_by_channel_and_augmented_for_training_only(tmp_path, monkeypatch):
    mine = write_set(tmp_path, CIFAR10)
    known = replace(DATA_SETS["cifar10"], read=partial(read_cifar, name="cifar10", layout=mine))
    monkeypatch.setitem(DATA_SETS, "cifar10", known)
    load = partial(load_data, "cifar10", root=tmp_path, validation=10, seed=0)
    data, plain = load(), load(augment=False, normalise=False)

    images, _ = plain.train.examples(40)
    normalised, _ = data.train.examples(40)
    mean = torch.tensor((0.4914, 0.4822, 0.4465)).reshape(3, 1, 1)
    std = torch.tensor((0.2023, 0.1994, 0.2010)).reshape(3, 1, 1)
    assert (images.min(), images.max()) == (0, 1)
    assert_close(normalised, (images - mean) / std)
    assert (data.in_channels, data.side, data.num_classes) == (3, 32, 10)

    def shuffled(split):
        return torch.cat([inputs for inputs, _ in split.batches(0, batch_size=20, seed=0)])

    ordered = {image.numpy().tobytes() for image in images}
    assert {image.numpy().tobytes() for image in shuffled(plain.train)} == ordered
    changed = {image.numpy().tobytes() for image in shuffled(data.train)}
    kept = changed & {image.numpy().tobytes() for image in normalised}
    assert len(changed) == 40
    assert len(kept) < 4


def test_missing_files_are_named_with_their_place(tmp_path):
    layout = write_set(tmp_path, CIFAR10)
    (tmp_path / CIFAR10.folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"cifar10 needs data_batch_1, .*10-batches-py, w"):
        read_cifar(tmp_path, False, name="cifar10", layout=layout)
    with pytest.raises(FileNotFoundError, match="where data_batch_3 cannot be found"):
        read_cifar(tmp_path, False, name="cifar10", layout=layout)


def test_without_a_data_folder_the_files_are_named():
    with pytest.raises(ValueError, match=r"give --data DIR .* cifar-100-python/train, cifar-100-p"):
        load_data("cifar100", root=None, validation=1, seed=0)


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_file_is_refused_by_its_sum(tmp_path, damage):
    layout = write_set(tmp_path, CIFAR10)
    path = tmp_path / CIFAR10.folder / "test_batch"
    content = path.read_bytes()
    changed = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    path.write_bytes({"truncated": content[:-9], "changed": changed, "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"{path} is damaged or not the original file .*fetch it"):
        read_cifar(tmp_path, False, name="cifar10", layout=layout)


@pytest.mark.parametrize(
    "content",
    [
        lambda images, labels, key: old_pickle(images[:, :3000], labels, key),
        lambda images, labels, key: old_pickle(images, labels[1:], key),
        lambda images, labels, key: old_pickle(images, [*labels[1:], 10], key),
        lambda images, labels, key: old_pickle(images, labels, b"coarse"),
        lambda images, labels, key: pickle.dumps({b"data": [1], key: labels}),
    ],
    ids=["size", "fewer labels", "label", "key", "no array"],
)
def test_a_file_of_other_things_is_refused_even_if_its_sum_fits(tmp_path, content):
    layout = write_set(tmp_path, CIFAR10, content=content)
    with pytest.raises(ValueError, match="does not hold images of 3072 bytes and as many labels"):
        read_cifar(tmp_path, False, name="cifar10", layout=layout)


@pytest.mark.data
@pytest.mark.skipif("DESSILBI_DATA" not in os.environ, reason="$DESSILBI_DATA is not set")
def test_the_real_files_are_cifar10():
    data = load_data("cifar10", root=os.environ["DESSILBI_DATA"], validation=5000, seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    _, labels = data.test.examples(10_000)
    assert labels.bincount().tolist() == [1000] * 10
    assert labels[:5].tolist() == [3, 8, 8, 0, 6]  # a cat, two ships, a plane, a frog
    images, _ = data.train.examples(20_000)
    # The authors' deviations are means over images of those within one, and so too small.
    assert images.mean((0, 2, 3)).abs().max() < 0.02
    assert_close(images.std((0, 2, 3)), torch.tensor([1.22, 1.22, 1.30]), atol=0.01, rtol=0)


# What a pickle may hold


def read(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    return read_pickle(path)


@pytest.mark.parametrize("protocol", [3, 4])
def test_plain_values_and_arrays_of_bytes_are_read_from_todays_pickles(tmp_path, protocol):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    values = {"a": [1, 2.5, None, True], b"b": (b"x", {"y": 3}), "data": array}
    found = read(tmp_path, pickle.dumps(values, protocol))
    np.testing.assert_array_equal(found.pop(b"data"), array)
    assert found == {b"a": [1, 2.5, None, True], b"b": (b"x", {"y": 3})}


class Harmful:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "harmful",
    [
        Harmful(os.system, "touch harmed"),
        Harmful(eval, "open('harmed', 'w')"),
        Harmful(exec, "open('harmed', 'w')"),
        Harmful(getattr, "x", "upper"),
        Harmful(io.open, "harmed", "w"),
        Harmful(np.load, "harmed"),
        Harmful(np.ndarray, (2**40,)),
        np.array([object()], dtype=object),
        np.zeros(3, dtype=np.float64),
        np.float64(1.0),
        torch.zeros(2),
        pickle.Unpickler,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pickle_that_names_anything_else_is_refused_and_runs_nothing(
    tmp_path, monkeypatch, harmful
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not a pickle of plain values and bytes") as caught:
        read(tmp_path, pickle.dumps({"data": harmful}, protocol=2))
    assert "\n" not in str(caught.value)
    assert {file.name for file in tmp_path.iterdir()} == {"file"}


@pytest.mark.parametrize("shape", [(2, 7), (-1, -6), (2**40, 2**40), (6.0,), ()])
def test_an_array_whose_shape_does_not_fit_its_bytes_is_refused(tmp_path, shape):
    class Lying:
        def __reduce_ex__(self, protocol):
            array = np.arange(6, dtype=np.uint8)
            function, arguments, state = array.__reduce__()
            return function, arguments, (state[0], shape, *state[2:])

    with pytest.raises(ValueError, match="bytes are not an array of"):
        read(tmp_path, pickle.dumps({"data": Lying()}, protocol=3))


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"\x80\x02}", b"garbage\n.", pickle.dumps([1]), pickle.dumps({"a": 1})[:-4]],
)
def test_a_damaged_or_foreign_pickle_is_refused_in_one_sentence(tmp_path, content):
    with pytest.raises(ValueError, match="is not a pickle of plain values and bytes") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_every_cut_and_every_changed_byte_is_read_or_refused(tmp_path):
    content = old_pickle(*batch(1, 0), b"labels")
    head = content[:60]
    rest = content[60:]
    assert read(tmp_path, content)[b"data"].shape == (1, 3072)
    refused = 0
    for place in range(60):
        for value in (0x00, 0x28, 0x52, 0x62, 0x7F, 0xFF):
            changed = head[:place] + bytes([value]) + head[place + 1 :]
            for candidate in (changed + rest, changed):
                try:
                    read(tmp_path, candidate)
                except ValueError as error:
                    refused += "is not a pickle" in str(error)
    assert refused > 300
