"""A reader of VHD images written from the specification, which shares nothing with the driver.

It asserts what an image must have in every state: a right footer at the end, the copy at the beginning, a header with
its checksum. Only the size may differ, after a resize that was cut short; the copy counts, as for stock tools.
"""

from __future__ import annotations

import struct
from pathlib import Path

NONE = 0xFFFF_FFFF


def checksum_of(data: bytes | bytearray, at: int) -> int:
    """Of a footer (the checksum ``at`` 64) or a header (at 36)."""
    return sum(data) - sum(data[at : at + 4]) & 0xFFFF_FFFF ^ 0xFFFF_FFFF


def footer_of(data: bytes) -> dict[str, int]:
    """The footer at the end of a file, which has to be right."""
    footer = data[-512:]
    assert footer[:8] == b"conectix", "no footer at the end"
    assert struct.unpack_from(">I", footer, 64)[0] == checksum_of(footer, 64), "footer checksum"
    kind = struct.unpack_from(">I", footer, 60)[0]
    if kind != 2 and data[:512] != footer:
        copy = data[:512]
        assert struct.unpack_from(">I", copy, 64)[0] == checksum_of(copy, 64), "checksum of the copy at the beginning"
        assert _but_for_size(copy) == _but_for_size(footer), "the copy at the beginning differs"
        assert copy[48:56] > footer[48:56], "the copy at the beginning is of a smaller disk"
        footer = copy
    return {
        "type": kind,
        "size": struct.unpack_from(">Q", footer, 48)[0],
        "next": struct.unpack_from(">Q", footer, 16)[0],
    }


def _but_for_size(footer: bytes) -> list[bytes]:
    """What is left of a footer without the creator, current size, geometry and checksum."""
    return [footer[:28], footer[32:48], footer[60:64], footer[68:]]


def blocks_of(data: bytes) -> tuple[int, list[int], list[bytes]]:
    """Block size, table, and the sector bitmap of each block that is there."""
    footer = footer_of(data)
    header = data[footer["next"] : footer["next"] + 1024]
    assert header[:8] == b"cxsparse", "no header"
    assert struct.unpack_from(">I", header, 36)[0] == checksum_of(header, 36), "header checksum"
    table_at, _, entries, block = struct.unpack_from(">QIII", header, 16)
    assert entries >= -(-footer["size"] // block), "the table is too small"
    table = list(struct.unpack_from(f">{entries}I", data, table_at))
    size = max(512, block // 4096)
    return block, table, [data[at * 512 : at * 512 + size] if at != NONE else b"" for at in table]


def read_plainly(*chain: bytes) -> bytes:
    """The guest's content of an image and its parents; bitmaps count in differencing images."""
    footer = footer_of(chain[0])
    size = footer["size"]
    if footer["type"] == 2:
        return chain[0][:size]
    below = read_plainly(*chain[1:]) if footer["type"] == 4 else b""
    result = bytearray(below[:size].ljust(size, b"\0"))
    block, table, bitmaps = blocks_of(chain[0])
    for number, (place, bitmap) in enumerate(zip(table, bitmaps, strict=True)):
        if place == NONE:
            continue
        data_at = place * 512 + len(bitmap)
        for sector in range(block // 512):
            guest = number * block + sector * 512
            if guest < size and (footer["type"] == 3 or bitmap[sector // 8] >> (7 - sector % 8) & 1):
                result[guest : guest + 512] = chain[0][data_at + sector * 512 : data_at + (sector + 1) * 512]
    return bytes(result)


def read_over_base(path: Path) -> bytes:
    """The content of a differencing image whose parent is the file ``base`` beside it."""
    return read_plainly(path.read_bytes(), (path.parent / "base").read_bytes())
