"""PNG and TIFF written by hand, for what Pillow does not write: 16 bits of colour, planes, odd depths."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    samples: NDArray[Any],
    colour_type: int,
    depth: int = 8,
    *,
    interlaced: bool = False,
    before: Sequence[tuple[bytes, bytes]] = (),
    after: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Return a PNG of samples (H, W) or (H, W, channels), with chunks `before` and `after` the pixels."""
    planes = samples.reshape(*samples.shape[:2], -1)
    height, width = planes.shape[:2]
    passes = (
        [planes[top::down, left::across] for top, left, down, across in _ADAM7] if interlaced else [planes]
    )
    raw = b"".join(_png_rows(part, depth) for part in passes if part.size)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(raw)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def _png_rows(planes: NDArray[Any], depth: int) -> bytes:
    rows = planes.reshape(len(planes), -1)
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = (rows[:, :, None] >> np.arange(depth)[::-1]) & 1
        packed = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]
    return b"".join(b"\0" + row for row in packed)


def tiff(
    samples: NDArray[Any],
    photometric: int,
    order: str = "<",
    *,
    deflated: bool = False,
    planes_apart: bool = False,
    rows_a_strip: int | None = None,
    extra_samples: int | None = None,
    orientation: int | None = None,
) -> bytes:
    """Return a TIFF of uint8 or uint16 samples (H, W, channels); `order` is "<" (II) or ">" (MM)."""
    height, width, channels = samples.shape
    bits = samples.dtype.itemsize * 8
    data = samples.astype(samples.dtype.newbyteorder(order))
    rows = rows_a_strip or height
    parts = [data[:, :, [c]] for c in range(channels)] if planes_apart else [data]
    strips = [part[top : top + rows].tobytes() for part in parts for top in range(0, height, rows)]
    if deflated:
        strips = [zlib.compress(strip) for strip in strips]
    entries: list[tuple[int, str, list[int]]] = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [bits] * channels),
        (259, "H", [8 if deflated else 1]),
        (262, "H", [photometric]),
        (273, "I", [0] * len(strips)),
        (277, "H", [channels]),
        (278, "I", [rows]),
        (279, "I", [len(strip) for strip in strips]),
        (284, "H", [2 if planes_apart else 1]),
    ]
    if orientation is not None:
        entries.append((274, "H", [orientation]))
    if extra_samples is not None:
        entries.append((338, "H", [extra_samples]))
    entries.sort()
    position = 8
    for i, (tag, _, _) in enumerate(entries):
        if tag == 273:
            offsets = [position + sum(len(strip) for strip in strips[:k]) for k in range(len(strips))]
            entries[i] = (tag, "I", offsets)
    position += sum(len(strip) for strip in strips)
    position += position % 2
    body, tail, after = b"", b"", position + 2 + 12 * len(entries) + 4
    for tag, kind, values in entries:
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(packed) > 4:
            where = struct.pack(order + "I", after + len(tail))
            tail += packed + b"\0" * (len(packed) % 2)
            packed = where
        body += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(values)) + packed.ljust(4, b"\0")
    pixels = b"".join(strips)
    pixels += b"\0" * (len(pixels) % 2)
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", position)
    return header + pixels + struct.pack(order + "H", len(entries)) + body + b"\0" * 4 + tail
