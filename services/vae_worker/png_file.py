"""Writes PNG files fast: one filter for all rows, and run lengths with Huffman codes.

Choosing a filter for each row and searching for repeats is most of the time that a usual encoder
takes (`docs/decisions/0002-png-encoding.md`).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt
from PIL.PngImagePlugin import PngInfo

Pixels = npt.NDArray[np.uint8]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FILTER_NONE, _FILTER_UP = 0, 2
_BITS, _RGB = 8, 2
_MEMORY_LEVEL = 9


def write_png(pixels: Pixels, info: PngInfo) -> bytes:
    """Return a PNG file.

    Args:
        pixels: (height, width, 3), uint8.
        info: Texts that go into the file, as Pillow makes them.
    """
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, _BITS, _RGB, 0, 0, 0)
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, _MEMORY_LEVEL, zlib.Z_RLE)
    compressed = compressor.compress(_filtered(pixels).data) + compressor.flush()
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", header),
            *(_chunk(name, content) for name, content, *_ in info.chunks),
            _chunk(b"IDAT", compressed),
            _chunk(b"IEND", b""),
        )
    )


def _filtered(pixels: Pixels) -> Pixels:
    """Return each row less the one above it, with the number of that filter in front."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[0, 0], filtered[1:, 0] = _FILTER_NONE, _FILTER_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(name))
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
