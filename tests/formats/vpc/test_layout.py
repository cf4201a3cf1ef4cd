"""Footer and header, both ways, against images made by qemu-img."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.vpc import layout
from nbdserve.formats.vpc.layout import DynamicHeader, Footer, Locator
from tests.formats.vpc.files import stock

FOOTER = Footer(
    disk_type=layout.DYNAMIC, data_offset=512, current_size=1 << 20, original_size=1 << 20, cylinders=31, heads=4,
    sectors_per_track=17, uuid=bytes(range(16)),
)  # fmt: skip
HEADER = DynamicHeader(table_offset=1536, max_entries=3, block_size=1 << 21)


@pytest.mark.parametrize("options", ["subformat=dynamic", "subformat=fixed", "force_size=on"])
def test_footer_of_qemu(tmp_path: Path, options: str) -> None:
    data = stock(tmp_path / "a.vhd", 10_000_000, options).read_bytes()
    footer = Footer.parse(data[-512:], "a")
    footer.check("a")
    assert footer.sound
    assert footer.build() == data[-512:]
    assert footer.size == (10_000_384 if "force" in options else 10_027_008)


def test_header_of_qemu(tmp_path: Path) -> None:
    data = stock(tmp_path / "a.vhd", 10_000_000).read_bytes()[512:1536]
    header = DynamicHeader.parse(data, "a")
    assert header.sound
    assert header.build() == data
    assert (header.block_size, header.max_entries, header.table_offset, header.bitmap_size) == (1 << 21, 5, 1536, 512)


def test_old_footers_lack_a_byte() -> None:
    assert Footer.parse(FOOTER.build()[:511], "a") == FOOTER


@pytest.mark.parametrize(
    ("creator", "exact"),
    [(b"qemu", False), (b"vpc ", False), (b"vs  ", False), (b"win ", True), (b"qem2", True), (b"d2v ", True),
     (b"tap\0", True), (b"CTXS", True)],
)  # fmt: skip
def test_who_made_it_tells_which_size_counts(creator: bytes, exact: bool) -> None:
    footer = replace(FOOTER, creator_app=creator, current_size=5 << 20)
    assert footer.size == (5 << 20 if exact else 31 * 4 * 17 * 512)


def test_the_largest_geometry_says_nothing() -> None:
    assert replace(FOOTER, cylinders=65535, heads=16, sectors_per_track=255, current_size=7 << 20).size == 7 << 20


@pytest.mark.parametrize(
    ("change", "field"),
    [({"version": 0x20000}, "version"), ({"disk_type": 5}, "disk type"), ({"disk_type": 0}, "disk type"),
     ({"creator_app": b"win ", "current_size": (2040 << 30) + 512}, "current size")],
)  # fmt: skip
def test_impossible_footers(change: dict[str, int], field: str) -> None:
    with pytest.raises(UnsupportedImageError, match=field):
        replace(FOOTER, **change).check("a")


def test_no_footer() -> None:
    with pytest.raises(CorruptImageError, match="cookie"):
        Footer.parse(bytes(512), "a")


@pytest.mark.parametrize("at", [9, 70, 84, 511])
def test_checksum_of_the_footer(at: int) -> None:
    data = bytearray(FOOTER.build())
    data[at] ^= 1
    assert not Footer.parse(data, "a").sound


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [(0, b"x", "cookie"), (24, b"\0\2", "version"), (32, struct.pack(">I", 0), "block size"),
     (32, struct.pack(">I", 256), "block size"), (32, struct.pack(">I", 3 << 20), "block size"), (23, b"\1", "table")],
)  # fmt: skip
def test_impossible_headers(at: int, value: bytes, field: str) -> None:
    data = bytearray(HEADER.build())
    data[at : at + len(value)] = value
    with pytest.raises(ImageError, match=field):
        DynamicHeader.parse(data, "a")


def test_header_with_a_parent() -> None:
    header = replace(
        HEADER, parent_uuid=bytes(range(16)), parent_name="Grundgerät.vhd", locators=(Locator(b"W2ru", 20, 4096, 512),)
    )
    parsed = DynamicHeader.parse(header.build(), "a")
    assert parsed.sound
    assert [at for at in parsed.locators if at.used] == [Locator(b"W2ru", 20, 4096, 512)]
    assert (parsed.parent_name, parsed.parent_uuid) == ("Grundgerät.vhd", bytes(range(16)))
    damaged = bytearray(header.build())
    damaged[70] ^= 1
    assert not DynamicHeader.parse(damaged, "a").sound


def test_a_name_that_is_too_long() -> None:
    assert DynamicHeader.parse(replace(HEADER, parent_name="x" * 255).build(), "a").parent_name == "x" * 255
    with pytest.raises(ValueError, match="too long"):
        replace(HEADER, parent_name="x" * 256).build()


@pytest.mark.parametrize(
    ("block", "bitmap"), [(512, 0), (2048, 0), (4096, 512), (1 << 21, 512), (1 << 22, 1024), (1 << 31, 1 << 19)]
)
def test_bitmaps_have_whole_sectors(block: int, bitmap: int) -> None:
    assert replace(HEADER, block_size=block).bitmap_size == bitmap
