# SPDX-License-Identifier: Apache-2.0
"""Damaged images, images that claim to be huge, and folders with hostile names."""

import struct
import zlib

import numpy as np
import pytest
from mutations import Memory, mutations, outcome
from typer.testing import CliRunner

from dessilbi.cli import app
from dessilbi.training.data import load_data

pytest.importorskip("torchvision")
KINDS = ("png", "jpg", "gif", "bmp", "webp", "tiff")


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    drawn = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "pictures" / part / label
            folder.mkdir(parents=True)
            for kind in KINDS:
                pixels = drawn.integers(0, 256, (12, 12, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"image.{kind}")
    return tmp_path


def first(root):
    """Decode all training images, in order."""
    data = load_data("folder:pictures", root=root, validation=2, seed=0, image_size=8)
    return [inputs.shape for inputs, _ in data.validation.in_order(2)] + [
        inputs.shape for inputs, _ in data.train.in_order(20)
    ]


@pytest.mark.parametrize(
    "count", [pytest.param(12, id="short"), pytest.param(400, marks=pytest.mark.full, id="long")]
)
def test_damaged_images_are_refused_by_name_or_decoded(pictures, count):
    refused = 0
    for kind in KINDS:
        file = pictures / "pictures" / "train" / "cat" / f"image.{kind}"
        original = file.read_bytes()
        with Memory():
            for name, content in mutations(original, count, kind):
                file.write_bytes(content)
                found = outcome(lambda: first(pictures), f"{kind}, {name}")
                refused += found.error is not None
                assert found.error is None or str(file) in str(found.error)
        file.write_bytes(original)
    assert refused


def test_an_image_that_claims_to_be_huge_is_refused(pictures):
    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 1 << 30, 1 << 30, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")
    file = pictures / "pictures" / "train" / "cat" / "image.png"
    file.write_bytes(content)
    with Memory():
        found = outcome(lambda: first(pictures), "huge")
    assert "cannot be read as an image (Image size" in str(found.error)


@pytest.mark.parametrize("label", ["a\nb", "\x1b[2Jcat", "..cat", "-rf", "x" * 200, "ß\u202e"])
def test_a_hostile_name_of_a_folder_stays_one_printable_line(pictures, label):
    (pictures / "pictures" / "train" / "cat").rename(pictures / "pictures" / "train" / label)
    arguments = ["train", "folder-resnet18", "--data", str(pictures), "--set", "validation=2"]
    told = CliRunner().invoke(app, [*arguments, "--set", "data=folder:pictures"])
    assert told.exit_code == 1
    assert told.stderr.count("\n") == 1
    assert told.stderr.rstrip("\n").isprintable()
    assert "do not have the same folders of classes" in told.stderr
