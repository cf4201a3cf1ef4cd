"""The VDI header both ways, and what is refused, field by field."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from uuid import UUID

import pytest

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.vdi import layout
from nbdserve.formats.vdi.layout import Header, plan
from nbdserve.units import MIB, TIB
from tests.support import images

FILE = 2 * MIB


def _patched(at: int, value: int, width: str = "<I") -> bytes:
    data = bytearray(plan(10 * MIB).build())
    struct.pack_into(width, data, at, value)
    return bytes(data)


def test_what_is_built_is_parsed() -> None:
    header = dataclasses.replace(
        plan(10 * MIB, static=True),
        uuid=UUID(int=1),
        uuid_modified=UUID(int=2),
        flags=3,
        type=layout.TYPE_DIFFERENCING,
        uuid_parent=UUID(int=4),
        uuid_parent_modified=UUID(int=5),
    )
    assert Header.parse(header.build(), "x", 12 * MIB) == header


@pytest.mark.parametrize(
    ("at", "value", "kind", "field"),
    [
        (0x40, 0, CorruptImageError, "signature"),
        (0x44, 0x00010000, UnsupportedImageError, "version"),
        (0x48, 0x17F, CorruptImageError, "header size"),
        (0x4C, 0, UnsupportedImageError, "image type"),
        (0x4C, 3, UnsupportedImageError, "image type"),
        (0x4C, 5, UnsupportedImageError, "image type"),
        (0x154, 0, CorruptImageError, "map offset"),
        (0x154, 513, CorruptImageError, "map offset"),
        (0x154, 0xFFFFFE00, CorruptImageError, "data offset"),
        (0x154, 9 * MIB, CorruptImageError, "map offset"),
        (0x158, 0, CorruptImageError, "data offset"),
        (0x158, MIB + 1, CorruptImageError, "data offset"),
        (0x158, 512, CorruptImageError, "data offset"),
        (0x158, 3 * MIB, CorruptImageError, "data offset"),
        (0x168, 4096, UnsupportedImageError, "sector size"),
        (0x170, (10 * MIB + 1) & 0xFFFFFFFF, CorruptImageError, "blocks in image"),
        (0x178, 0, UnsupportedImageError, "block size"),
        (0x178, 3 * MIB, UnsupportedImageError, "block size"),
        (0x178, 2048, UnsupportedImageError, "block size"),
        (0x178, 1 << 31, UnsupportedImageError, "block size"),
        (0x17C, 512, UnsupportedImageError, "block extra size"),
        (0x180, 0, CorruptImageError, "blocks in image"),
        (0x180, 0xFFFFFFFF, CorruptImageError, "data offset"),
        (0x1A8, 1, UnsupportedImageError, "parent UUID"),
        (0x1B8, 1, UnsupportedImageError, "parent UUID"),
    ],
)
def test_bad_fields_are_refused(at: int, value: int, kind: type[ImageError], field: str) -> None:
    with pytest.raises(kind) as caught:
        Header.parse(_patched(at, value), "x.vdi", FILE)
    assert caught.value.field == field
    assert str(caught.value).startswith("x.vdi: ")


def test_short_files_are_refused() -> None:
    data = plan(10 * MIB).build()
    with pytest.raises(CorruptImageError, match="too short"):
        Header.parse(data[:511], "x", 511)
    with pytest.raises(CorruptImageError) as caught:
        Header.parse(data, "x", 512 + 39)
    assert caught.value.field == "map offset"
    Header.parse(data, "x", 512 + 40)


def test_sizes_are_whole_sectors() -> None:
    assert Header.parse(_patched(0x170, 10 * MIB - 511, "<Q"), "x", FILE).size == 10 * MIB
    assert Header.parse(_patched(0x170, 1000, "<Q"), "x", FILE).size == 1024


@pytest.mark.parametrize(
    ("size", "maps"),
    [(0, 2), (512, 2), (MIB, 2), (MIB + 512, 2), (2 * TIB, 2), (layout.MAX_SIZE - 2 * TIB, 2), (layout.MAX_SIZE, 1)],
)
def test_planned_data_is_aligned_and_behind_the_maps(size: int, maps: int) -> None:
    header = plan(size)
    assert header.data_offset % MIB == 0
    least = 512 + maps * (header.blocks * 4 + (4096 if maps == 2 else 0))
    assert least <= header.data_offset <= least + MIB + 1024
    assert header.blocks * MIB >= size > (header.blocks - 1) * MIB


def test_the_largest_size_is_that_of_qemu() -> None:
    with pytest.raises(ValueError, match="at most 562949819203584 bytes"):
        plan(layout.MAX_SIZE + 512)


@images.needs_qemu
def test_a_header_made_by_qemu(tmp_path: Path) -> None:
    images.create(tmp_path / "a", 3 * MIB, fmt="vdi", options="static=on")
    data = (tmp_path / "a").read_bytes()
    header = Header.parse(data[:512], "a", len(data))
    assert (header.type, header.size, header.blocks, header.blocks_allocated) == (2, 3 * MIB, 3, 3)
    assert (header.map_offset, header.data_offset) == (512, 1024)


def test_fields_are_patched() -> None:
    sector = plan(10 * MIB).build()
    changed = layout.patched(sector, {layout.BLOCKS_ALLOCATED_AT: 7, layout.MAP_OFFSET_AT: 1024})
    header = Header.parse(changed, "x", FILE)
    assert (header.blocks_allocated, header.map_offset) == (7, 1024)
    assert sum(a != b for a, b in zip(sector, changed, strict=True)) == 2
