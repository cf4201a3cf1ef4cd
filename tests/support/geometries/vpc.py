"""VHD: blocks of several sizes, fixed disks, and differencing images, which stock tools cannot read."""

from __future__ import annotations

import struct

from nbdserve.units import MIB
from tests.support.geometries.geometry import Contents, Field, Geometry, Kit
from tests.support.vhd_reader import checksum_of, read_over_base


def _differencing(name: str, size: int, block_size: str, base_size: int, base_options: str, *, own: bool) -> Geometry:
    return Geometry(
        name,
        size,
        "vpc",
        options=f"block_size={block_size},force_size=on",
        base="vpc",
        base_size=base_size,
        base_options=base_options,
        own=own,
        maker="ours",
        fill="ours",
        stock="",
        reader=read_over_base,
    )


def _seal(contents: Contents) -> None:
    """Right checksums in both footers and the header."""
    (content, *_) = contents
    for start, at in ((0, 64), (512, 36), (len(content) - 512, 64)):
        length = 1024 if at == 36 else 512
        if start >= 0 and start + length <= len(content) and content[start : start + 1] == b"c":
            struct.pack_into(">I", content, start + at, checksum_of(content[start : start + length], at))


def _footer(start: int, where: str) -> tuple[Field, ...]:
    fields = (
        ("features", 8, 4),
        ("version", 12, 4),
        ("data offset", 16, 8),
        ("time stamp", 24, 4),
        ("creator", 28, 4),
        ("creator version", 32, 4),
        ("creator os", 36, 4),
        ("original size", 40, 8),
        ("current size", 48, 8),
        ("cylinders", 56, 2),
        ("heads", 58, 1),
        ("sectors per track", 59, 1),
        ("disk type", 60, 4),
        ("checksum", 64, 4),
        ("saved state", 84, 1),
    )
    return tuple(Field(f"{name} ({where})", start + at, size, "big") for name, at, size in fields)


_HEADER = tuple(
    Field(name, 512 + at, size, "big")
    for name, at, size in (
        ("header cookie", 0, 8),
        ("next offset", 8, 8),
        ("table offset", 16, 8),
        ("header version", 24, 4),
        ("max table entries", 28, 4),
        ("block size", 32, 4),
        ("header checksum", 36, 4),
        ("parent time stamp", 56, 4),
        *((f"locator {number}: {name}", 576 + 24 * number + at, size)
          for number in (0, 1)
          for name, at, size in (("code", 0, 4), ("space", 4, 4), ("length", 8, 4), ("offset", 16, 8))),
    )
)  # fmt: skip
_TABLE = tuple(Field(f"table entry {number}", 1536 + 4 * number, 4, "big") for number in range(4))

KIT = Kit(
    "vpc",
    (
        Geometry("vpc-4k", 1 * MIB, "vpc", "block_size=4k,force_size=on", maker="ours"),
        Geometry("vpc-64k", 2 * MIB, "vpc", "block_size=64k", maker="ours", own=True, fill="stock"),
        Geometry("vpc-2m", 5 * MIB, "vpc"),
        Geometry("vpc-tiny", 512, "vpc", "force_size=on"),
        Geometry("vpc-odd", 777 * 512, "vpc", "block_size=32k,force_size=on", maker="ours", own=True, fill="ours"),
        Geometry("vpc-fixed", 1 * MIB, "vpc", "subformat=fixed", own=True),
        Geometry("vpc-fixed-exact", 333 * 512, "vpc", "subformat=fixed,force_size=on"),
        _differencing("vpc-diff-4k", 1 * MIB, "4k", 1 * MIB, "", own=False),
        _differencing("vpc-diff-64k", 2 * MIB, "64k", 1 * MIB, "subformat=fixed", own=True),
        _differencing("vpc-diff-2m", 3 * MIB, "2M", 4 * MIB, "", own=False),
    ),
    more=(
        Geometry("vpc-large", 40 * MIB, "vpc", own=True),
        Geometry("vpc-8m-blocks", 50 * MIB, "vpc", "block_size=8M", maker="ours"),
        Geometry("vpc-fixed-large", 24 * MIB, "vpc", "subformat=fixed"),
        _differencing("vpc-diff-large", 20 * MIB, "512k", 30 * MIB, "", own=True),
    ),
    fields=(*_footer(0, "copy"), *_footer(-512, "end"), *_HEADER, *_TABLE),
    seal=_seal,
)
