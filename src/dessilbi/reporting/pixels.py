# SPDX-License-Identifier: Apache-2.0
"""Pixels: small images as PNG, written by hand; a picture library would be one more dependency."""

import base64
import struct
import zlib
from collections.abc import Sequence

Pixel = tuple[int, int, int, int]  # red, green, blue, opacity


def png(rows: Sequence[Sequence[Pixel]]) -> bytes:
    r"""Return rows of equal length as a PNG file with eight bits a channel.

    >>> png([[(255, 0, 0, 255)]])[:4]
    b'\x89PNG'
    """
    height, width = len(rows), len(rows[0])
    lines = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def data_url(rows: Sequence[Sequence[Pixel]]) -> str:
    """Return an image as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png(rows)).decode()
