"""Which footer counts, and which headers and tables are believed."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.vpc import image, layout
from nbdserve.formats.vpc.layout import DynamicHeader, Footer, Locator
from tests.formats.vpc.files import stock
from tests.support.recording import ByteStorage
from tests.support.vhd_reader import NONE

FOOTER = Footer(
    disk_type=layout.DYNAMIC, data_offset=512, current_size=3 << 12, original_size=3 << 12, cylinders=65535, heads=16,
    sectors_per_track=255, uuid=bytes(range(16)),
)  # fmt: skip
HEADER = DynamicHeader(table_offset=1536, max_entries=3, block_size=4096)
STRIDE = 9
"""Sectors of a block of 4096 bytes with its bitmap."""


def built(*entries: int, header: DynamicHeader = HEADER, footer: Footer = FOOTER, blocks: int = 3) -> bytes:
    """An image of three blocks, which begin at sector 4."""
    table = struct.pack(f">{len(entries)}I", *entries).ljust(512, b"\xff")
    return footer.build() + header.build() + table + bytes(blocks * STRIDE * 512) + footer.build()


def other(footer: Footer) -> Footer:
    return replace(footer, uuid=bytes(16))


FIXED = replace(FOOTER, disk_type=layout.FIXED, data_offset=layout.NO_OFFSET)
DAMAGED = b"conectix" + bytes(504)


@pytest.mark.parametrize(
    ("begin", "end", "uuid", "sound"),
    [
        (FOOTER.build(), FOOTER.build(), FOOTER.uuid, True),
        (FOOTER.build(), other(FOOTER).build(), FOOTER.uuid, True),
        (FOOTER.build(), bytes(512), FOOTER.uuid, True),
        (bytes(512), FOOTER.build(), FOOTER.uuid, True),
        (FOOTER.build()[:8].ljust(512, b"\1"), FOOTER.build(), FOOTER.uuid, True),
        (FOOTER.build(), b"\0" + FOOTER.build()[:511], FOOTER.uuid, True),
        (bytes(512), b"\0" + FOOTER.build()[:511], FOOTER.uuid, True),
        # Sector 0 of a fixed image is the guest's: what it writes there does not make the image dynamic.
        (other(FOOTER).build(), FIXED.build(), FIXED.uuid, True),
        (other(FIXED).build(), FOOTER.build(), FOOTER.uuid, True),
        (other(FOOTER).build(), FIXED.build()[:511] + b"\1", FIXED.uuid, False),
        (FIXED.build(), bytes(512), None, False),
    ],
)
async def test_the_footer_to_go_by(begin: bytes, end: bytes, uuid: bytes | None, sound: bool) -> None:
    footers = await image.read_footers(ByteStorage(begin + bytes(4096) + end))
    if uuid is None:
        assert footers.best is None
    else:
        assert footers.best is not None
        assert (footers.best.uuid, footers.best.sound) == (uuid, sound)


@pytest.mark.parametrize("size", [0, 1, 510, 511, 512, 600])
async def test_no_footer(size: int) -> None:
    storage = ByteStorage(bytes(size))
    with pytest.raises(ImageError, match="not a VHD"):
        image.require_footer(await image.read_footers(storage), storage)


@pytest.mark.parametrize(
    ("footer", "header", "field"),
    [
        (replace(FOOTER, data_offset=1 << 40), HEADER, "data offset"),
        (replace(FOOTER, data_offset=layout.NO_OFFSET), HEADER, "data offset"),
        (replace(FOOTER, current_size=4 << 12), HEADER, "max table entries"),
        (FOOTER, replace(HEADER, max_entries=2), "max table entries"),
        (FOOTER, replace(HEADER, table_offset=1 << 30), "table offset"),
        (replace(FOOTER, current_size=2040 << 30), replace(HEADER, max_entries=(1 << 32) - 1), "block size"),
    ],
)
async def test_headers_that_cannot_be(footer: Footer, header: DynamicHeader, field: str) -> None:
    with pytest.raises((CorruptImageError, UnsupportedImageError), match=field):
        await image.read_header(ByteStorage(built(4, header=header, footer=footer)), footer)


async def test_the_table() -> None:
    storage = ByteStorage(built(4, NONE, 4 + STRIDE, blocks=2))
    header = await image.read_header(storage, FOOTER)
    table = await image.read_table(storage, FOOTER, header)
    assert table.words.tolist() == [4, NONE, 4 + STRIDE]
    assert image.used_end(FOOTER, header, table.words) == (4 + 2 * STRIDE) * 512
    image.refuse_writing(storage, FOOTER, header, table.words)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ((4, 4, NONE), "share a place"),
        ((4, 4 + STRIDE - 1, NONE), "share a place"),
        ((NONE, NONE, 5 + 2 * STRIDE + 1), "not inside"),
        ((NONE, NONE, NONE - 1), "not inside"),
        ((0, NONE, NONE), "the copy of the footer"),
        ((1, NONE, NONE), "the header"),
        ((3, NONE, NONE), "the table"),
    ],
)
async def test_tables_that_are_not_written_to(entries: tuple[int, ...], problem: str) -> None:
    storage = ByteStorage(built(*entries))
    header = await image.read_header(storage, FOOTER)
    table = await image.read_table(storage, FOOTER, header)
    with pytest.raises(CorruptImageError, match=problem):
        image.refuse_writing(storage, FOOTER, header, table.words)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (replace(HEADER, sound=False), "checksum"),
        (replace(HEADER, table_offset=1540), "multiple of 512"),
        (replace(HEADER, max_entries=1 << 20), "do not end inside"),
        (replace(HEADER, locators=(Locator(b"W2ru", 10, 1 << 40),)), "do not end inside"),
        (replace(HEADER, locators=(Locator(b"W2ru", 10, 4 * 512),)), "parent's name"),
    ],
)
async def test_headers_that_are_not_written_to(header: DynamicHeader, problem: str) -> None:
    storage = ByteStorage(built(4))
    table = await image.read_table(storage, FOOTER, HEADER)
    footer = replace(FOOTER, disk_type=layout.DIFFERENCING)
    with pytest.raises(CorruptImageError, match=problem):
        image.refuse_writing(storage, footer, header, table.words)
    if header.locators:  # names of parents mean nothing in others
        image.refuse_writing(storage, FOOTER, header, table.words)


async def test_a_block_at_the_very_end() -> None:
    data = built(4, 4 + STRIDE, 4 + 2 * STRIDE)
    for cut, bad in ((512, False), (513, True)):  # the footer may be missing, a byte of the block may not
        table = await image.read_table(ByteStorage(data[:-cut]), FOOTER, HEADER)
        assert (table.words[2] == image.BAD) == bad


async def test_names_of_parents() -> None:
    name = ".\\base.vhd".encode("utf-16-le")
    data = bytes(1024) + name + bytes(100)
    far, long, good = Locator(b"W2ru", 40, 2000), Locator(b"W2ru", 1 << 31, 0), Locator(b"W2ku", len(name), 1024)
    for locators, found in (((far, long, good), "base.vhd"), ((far, long), "spare.vhd"), ((), "spare.vhd")):
        header = replace(HEADER, parent_name="D:\\x\\spare.vhd", locators=locators)
        assert await image.read_parent_name(ByteStorage(data), header) == found
    assert await image.read_parent_name(ByteStorage(data), HEADER) is None


async def test_a_name_with_a_nul_is_none() -> None:
    name = "a\0b".encode("utf-16-le")
    header = replace(HEADER, parent_name="spare.vhd", locators=(Locator(b"W2ru", len(name), 0),))
    assert await image.read_parent_name(ByteStorage(name), header) == "spare.vhd"


async def test_what_qemu_makes_can_be_written(tmp_path: Path) -> None:
    storage = ByteStorage(stock(tmp_path / "a.vhd", "10M").read_bytes())
    footer = image.require_footer(await image.read_footers(storage), storage)
    header = await image.read_header(storage, footer)
    table = await image.read_table(storage, footer, header)
    image.refuse_writing(storage, footer, header, table.words)
    assert image.used_end(footer, header, table.words) == len(storage.content) - 512
