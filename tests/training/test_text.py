# SPDX-License-Identifier: Apache-2.0
"""Texts as samples of characters."""

import os
from functools import partial

import pytest
import torch

from dessilbi.training.data import load_data

TEXT = "".join(chr(ord("a") + (7 * i * i + i // 3) % 26) for i in range(2000))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def load(folder, name="text:mine.txt", *, validation=10, length=10, **more):
    return load_data(name, root=folder, validation=validation, seed=0, length=length, **more)


def decoded(data, codes):
    return "".join(data.vocabulary[code] for code in codes.tolist())


def test_parts_are_cut_by_position_and_share_no_character(folder):
    data = load(folder)
    train, validation, test = (
        decoded(data, split.examples(len(split))[0].flatten())
        for split in (data.train, data.validation, data.test)
    )
    assert TEXT.startswith(train)
    assert len(train) == 1690
    assert validation == TEXT[1699:1799]  # its last sample needs one more character as target
    assert test == TEXT[1800:1990]
    assert (data.num_classes, data.vocabulary) == (len(set(TEXT)), "".join(sorted(set(TEXT))))


def test_targets_are_the_next_characters(folder):
    data = load(folder)
    for batches in (data.train.in_order(7), data.train.batches(0, batch_size=7, seed=0)):
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (len(inputs), 10)
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            for line in torch.cat([inputs, targets[:, -1:]], dim=1):
                assert decoded(data, line) in TEXT[:1700]


def test_shuffled_samples_begin_at_every_place_in_time(folder):
    data = load(folder)
    batches = partial(data.train.batches, batch_size=169, seed=0)
    begun = {decoded(data, x[:10]) for epoch in range(100) for xs, _ in batches(epoch) for x in xs}
    every = {TEXT[i : i + 10] for i in range(1690)}
    assert begun <= every
    assert len(begun) > 0.99 * len(every)
    assert {TEXT[:10], TEXT[1688:1698]} <= begun  # the last that has a character after it


def test_shares_and_late_starts_are_the_same_batches(folder):
    batches = partial(load(folder).train.batches, 3, batch_size=8, seed=5)
    whole = [torch.stack(batch) for batch in batches()]
    halves = [[torch.stack(b) for b in batches(rank=rank, world_size=2)] for rank in (0, 1)]
    joined = [torch.cat(pair, dim=1) for pair in zip(*halves, strict=True)]
    late = [torch.stack(batch) for batch in batches(start=15)]
    assert all(map(torch.equal, joined, whole))
    assert all(map(torch.equal, late, whole[15:]))
    assert len(late) == len(whole) - 15 > 0


def test_characters_outside_ascii_are_characters(tmp_path):
    text = "\N{GREEK SMALL LETTER ALPHA}\N{GRINNING FACE}e\N{COMBINING ACUTE ACCENT}\n" * 100
    (tmp_path / "x.txt").write_text(text, encoding="utf-8", newline="")
    data = load(tmp_path, "text:x.txt")
    assert data.vocabulary == "".join(sorted(set(text)))
    assert decoded(data, data.test.examples(1)[0][0]) == text[450:460]


@pytest.mark.parametrize(
    ("content", "options", "error", "message"),
    [
        (b"ab" * 50, {"length": 100}, ValueError, "has 100 characters, too few for .* length=2"),
        (b"a" * 999, {}, ValueError, "has 1 different characters: give a longer text"),
        (b"", {}, ValueError, "has 0 different characters"),
        (b"ab\xff" * 99, {}, ValueError, "x.txt is not UTF-8 text .invalid start byte.: convert"),
        (b"ab" * 500, {"validation": 89}, ValueError, "of 89 samples .* from 1 to 88"),
        (b"ab" * 500, {"validation": 0}, ValueError, "of 0 samples .* from 1 to 88"),
        (b"ab" * 500, {"image_size": 32}, ValueError, "image_size=32 does not apply to text:x.txt"),
    ],
)
def test_what_cannot_be_cut_is_refused(tmp_path, content, options, error, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(error, match=message):
        load(tmp_path, "text:x.txt", **options)


@pytest.mark.parametrize("characters", range(1000, 1012))
def test_the_largest_validation_part_leaves_one_sample_to_train(tmp_path, characters):
    (tmp_path / "x.txt").write_text(TEXT[:characters])
    with pytest.raises(ValueError, match=r"give a number from 1 to \d+") as caught:
        load(tmp_path, "text:x.txt", validation=999)
    largest = int(str(caught.value).split()[-1])
    data = load(tmp_path, "text:x.txt", validation=largest)
    assert (len(data.train), len(data.validation)) == (1, largest)


def test_a_missing_text_and_a_missing_folder_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs the text file .*tinyshakespeare/input.txt"):
        load(tmp_path, "tinyshakespeare")
    with pytest.raises(ValueError, match=r"folder that holds tinyshakespeare/input.txt"):
        load(None, "tinyshakespeare")


@pytest.mark.data
@pytest.mark.skipif("DESSILBI_DATA" not in os.environ, reason="$DESSILBI_DATA is not set")
def test_the_real_text_is_tiny_shakespeare():
    data = load(os.environ["DESSILBI_DATA"], "tinyshakespeare", validation=400, length=128)
    assert data.num_classes == 65
    assert decoded(data, data.train.examples(1)[0][0]).startswith("First Citizen:\nBefore we")
    assert (len(data.train), len(data.validation), len(data.test)) == (7442, 400, 871)
