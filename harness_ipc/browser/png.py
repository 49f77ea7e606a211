"""PNG files of Chrome: their size, and joining them vertically (https://www.w3.org/TR/png-3/)."""

from __future__ import annotations

import struct

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bytes of a pixel by the colour type of the header: RGB and RGBA, 8 bits each.
_PIXEL = {2: 3, 6: 4}


def size(picture: bytes) -> tuple[int, int]:
    """Return width and height in pixels."""
    width, height = struct.unpack_from(">II", picture, 16)
    return width, height


def join(pictures: list[bytes]) -> bytes:
    """Join `pictures` from top to bottom. Raises `ValueError` if their widths or formats differ."""
    import zlib

    header = _header(pictures[0])
    rows: list[bytes] = []
    total = 0
    for picture in pictures:
        if _header(picture) != header:
            raise ValueError("pictures of different widths or pixel formats can't be joined")
        width, height = size(picture)
        pixel = _PIXEL[picture[25]]
        data = zlib.decompress(b"".join(_data(picture)))
        length = 1 + width * pixel
        # The filter of a row uses the row above it, which changes for the first row.
        rows += [_unfilter_first(data[:length], pixel), data[length:]]
        total += height
    whole = zlib.compress(b"".join(rows), 3)
    start = struct.pack(">II", header[0], total) + header[1]
    return _SIGNATURE + b"".join(
        _chunk(kind, content) for kind, content in ((b"IHDR", start), (b"IDAT", whole), (b"IEND", b""))
    )


def _header(picture: bytes) -> tuple[int, bytes]:
    """Return the width, and the header after the height."""
    return size(picture)[0], picture[24:29]


def _data(picture: bytes) -> list[bytes]:
    found, place = [], len(_SIGNATURE)
    while place < len(picture):
        length, kind = struct.unpack_from(">I4s", picture, place)
        if kind == b"IDAT":
            found.append(picture[place + 8 : place + 8 + length])
        place += length + 12
    return found


def _unfilter_first(row: bytes, pixel: int) -> bytes:
    """Return the first row without its filter; the row above it counts as zeros."""
    kind, values = row[0], bytearray(row[1:])
    # Sub, Average and Paeth: in the first row they depend only on the pixel to the left.
    if kind in (1, 3, 4):
        for place in range(pixel, len(values)):
            left = values[place - pixel]
            values[place] = (values[place] + (left // 2 if kind == 3 else left)) & 0xFF
    return b"\0" + values


def _chunk(kind: bytes, content: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
