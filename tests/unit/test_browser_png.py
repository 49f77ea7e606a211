"""Joining PNG files with any filter of their first rows."""

from __future__ import annotations

import struct
import zlib

import pytest

from harness_ipc.browser import png

WIDTH = 5


def make(kinds: list[int], rows: list[bytes], color: int) -> bytes:
    """Return a picture whose rows use these filters (PNG specification, 9.2)."""
    pixel = {2: 3, 6: 4}[color]
    above = bytes(WIDTH * pixel)
    data = b""
    for kind, row in zip(kinds, rows, strict=True):
        left = bytes(pixel) + row[:-pixel]
        corner = bytes(pixel) + above[:-pixel]
        predicted = [predict(kind, *values) for values in zip(left, above, corner, strict=True)]
        data += bytes([kind]) + bytes((value - guess) & 0xFF for value, guess in zip(row, predicted, strict=True))
        above = row
    header = struct.pack(">IIBBBBB", WIDTH, len(rows), 8, color, 0, 0, 0)
    packed = zlib.compress(data)
    chunks = [(b"IHDR", header), (b"tEXt", b"a\0b"), (b"IDAT", packed[:7]), (b"IDAT", packed[7:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks
    )


def predict(kind: int, left: int, above: int, corner: int) -> int:
    guess = left + above - corner
    paeth = min((left, above, corner), key=lambda value: abs(guess - value))
    return (0, left, above, (left + above) // 2, paeth)[kind]


def read(picture: bytes, color: int) -> list[bytes]:
    """Return the rows of a picture."""
    pixel = {2: 3, 6: 4}[color]
    place, data = 8, b""
    while place < len(picture):
        length, kind = struct.unpack_from(">I4s", picture, place)
        content = picture[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", picture, place + 8 + length)[0] == zlib.crc32(kind + content)
        data += content if kind == b"IDAT" else b""
        place += 12 + length
    raw, rows, above = zlib.decompress(data), [], bytes(WIDTH * pixel)
    for start in range(0, len(raw), 1 + WIDTH * pixel):
        row = bytearray()
        for index, value in enumerate(raw[start + 1 : start + 1 + WIDTH * pixel]):
            left, corner = (row[index - pixel], above[index - pixel]) if index >= pixel else (0, 0)
            row.append((value + predict(raw[start], left, above[index], corner)) & 0xFF)
        above = bytes(row)
        rows.append(above)
    return rows


@pytest.mark.parametrize("color", [2, 6])
@pytest.mark.parametrize("kind", range(5))
def test_pictures_are_joined_from_top_to_bottom(color: int, kind: int) -> None:
    length = WIDTH * {2: 3, 6: 4}[color]
    rows = [bytes((number * 37 + index * 11) % 256 for index in range(length)) for number in range(6)]
    pictures = [make([kind, 4, 3], rows[:3], color), make([kind, 2], rows[3:5], color), make([kind], rows[5:], color)]
    joined = png.join(pictures)
    assert png.size(joined) == (WIDTH, 6)
    assert read(joined, color) == rows


def test_pictures_of_different_kinds_are_refused() -> None:
    first, second = make([0], [bytes(WIDTH * 3)], 2), make([0], [bytes(WIDTH * 4)], 6)
    with pytest.raises(ValueError, match="can't be joined"):
        png.join([first, second])
