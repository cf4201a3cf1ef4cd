"""The bytes of headers, tables and metadata, both ways."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.layout import NO_GUID, Header, Parameters, Region
from nbdserve.units import GIB, MIB, TIB
from tests.formats.vhdx.helpers import qemu_image
from tests.support.images import needs_qemu

HEADER = Header(7, uuid4(), uuid4(), NO_GUID, MIB, MIB)
BAT = Region(layout.BAT_REGION, 2 * MIB, MIB)
METADATA = Region(layout.METADATA_REGION, 3 * MIB, MIB)


def test_a_header_there_and_back() -> None:
    data = HEADER.build()
    assert len(data) == 4096
    assert Header.parse(data) == HEADER
    assert HEADER.next(log_guid=UUID(int=5)) == Header(
        8, HEADER.file_write_guid, HEADER.data_write_guid, UUID(int=5), MIB, MIB
    )


@pytest.mark.parametrize("at", [0, 4, 8, 64, 4095])
def test_a_header_that_was_torn_is_not_valid(at: int) -> None:
    data = bytearray(HEADER.build())
    data[at] ^= 1
    assert Header.parse(bytes(data)) is None


def test_the_header_with_the_greater_number_is_current() -> None:
    newer, torn = HEADER.next(), bytes(4096)
    assert layout.choose_header((HEADER.build(), newer.build()), "x") == (newer, 1)
    assert layout.choose_header((newer.build(), HEADER.build()), "x") == (newer, 0)
    assert layout.choose_header((torn, HEADER.build()), "x") == (HEADER, 1)
    assert layout.choose_header((HEADER.build(), torn), "x") == (HEADER, 0)
    assert layout.choose_header((HEADER.build(), HEADER.build()), "x") == (HEADER, 0)


def test_no_current_header() -> None:
    with pytest.raises(CorruptImageError, match="neither of the two headers"):
        layout.choose_header((bytes(4096), bytes(4096)), "x")
    other = Header(7, uuid4(), uuid4(), NO_GUID, MIB, MIB)
    with pytest.raises(CorruptImageError, match="SequenceNumber = 7"):
        layout.choose_header((HEADER.build(), other.build()), "x")
    later = bytearray(HEADER.build())
    struct.pack_into("<H", later, 66, 2)
    with pytest.raises(UnsupportedImageError, match="Version = 2"):
        layout.choose_header((layout.sealed(later), bytes(4096)), "x")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"log_length": 5}, "LogLength"),
        ({"log_version": 1, "log_guid": UUID(int=1)}, "LogVersion"),
        ({"log_length": 0, "log_guid": UUID(int=1)}, "LogLength"),
        ({"log_offset": 0}, "LogOffset"),
        ({"log_offset": MIB + 512}, "LogOffset"),
        ({"log_offset": 10 * MIB}, "LogOffset"),
        ({"log_length": 0xFFF0_0000}, "LogOffset"),
    ],
)
def test_a_log_that_cannot_be_there(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ImageError) as caught:
        HEADER.next(**changes).check("x", 4 * MIB)
    assert caught.value.field == field
    for harmless in ({}, {"log_version": 1}, {"log_length": 0, "log_offset": 0}):
        HEADER.next(**harmless).check("x", 4 * MIB)


def test_a_header_cannot_run_out_of_numbers() -> None:
    last = Header((1 << 64) - 1, uuid4(), uuid4(), NO_GUID, MIB, MIB)
    with pytest.raises(CorruptImageError, match="SequenceNumber"):
        last.check("x", 4 * MIB)


def test_a_region_table_there_and_back() -> None:
    other = Region(uuid4(), 5 * MIB, MIB, required=False)
    table = layout.build_region_table((BAT, METADATA, other))
    assert len(table) == 65536
    assert layout.parse_region_table((table, bytes(65536)), "x", 8 * MIB) == (BAT, METADATA, other)
    assert layout.parse_region_table((bytes(65536), table), "x", 8 * MIB) == (BAT, METADATA, other)
    with pytest.raises(CorruptImageError, match="neither of the two region tables"):
        layout.parse_region_table((bytes(65536), bytes(65536)), "x", 8 * MIB)


@pytest.mark.parametrize(
    ("regions", "field", "kind"),
    [
        ((BAT,), "region table EntryCount", CorruptImageError),
        ((BAT, BAT, METADATA), "region Guid", CorruptImageError),
        ((BAT, METADATA, Region(UUID(int=9), 5 * MIB, MIB)), "region Guid", UnsupportedImageError),
        ((BAT, Region(layout.METADATA_REGION, 3 * MIB, 0)), "region Length", CorruptImageError),
        ((BAT, Region(layout.METADATA_REGION, 3 * MIB, 4096)), "region Length", CorruptImageError),
        ((BAT, Region(layout.METADATA_REGION, 0, MIB)), "region FileOffset", CorruptImageError),
        ((BAT, Region(layout.METADATA_REGION, 3 * MIB + 1, MIB)), "region FileOffset", CorruptImageError),
        ((BAT, Region(layout.METADATA_REGION, 8 * MIB, MIB)), "region FileOffset", CorruptImageError),
        ((BAT, Region(layout.METADATA_REGION, 1 << 62, MIB)), "region FileOffset", CorruptImageError),
    ],
)
def test_regions_that_cannot_be(regions: tuple[Region, ...], field: str, kind: type[ImageError]) -> None:
    table = layout.build_region_table(regions)
    with pytest.raises(kind) as caught:
        layout.parse_region_table((table, table), "x", 8 * MIB)
    assert caught.value.field == field


def test_too_many_regions() -> None:
    table = bytearray(layout.build_region_table((BAT, METADATA)))
    struct.pack_into("<I", table, 8, 2048)
    with pytest.raises(CorruptImageError, match="EntryCount = 0x800"):
        layout.parse_region_table((layout.sealed(table), bytes(65536)), "x", 8 * MIB)


def test_regions_that_share_space() -> None:
    layout.refuse_overlaps((BAT, METADATA), HEADER, "x")
    for offset in (MIB, 2 * MIB):
        with pytest.raises(CorruptImageError, match="overlaps"):
            layout.refuse_overlaps((BAT, Region(layout.METADATA_REGION, offset, MIB)), HEADER, "x")


def test_metadata_there_and_back() -> None:
    wanted = Parameters(10 * MIB, 2 * MIB, 4096, 4096, leave_allocated=True, has_parent=True, disk_id=uuid4())
    data = layout.build_metadata(wanted, b"locator")
    items = layout.parse_metadata_table(data[:65536], "x", MIB)
    contents = {item_id: data[item.offset : item.offset + item.length] for item_id, item in items.items()}
    assert Parameters.parse(contents, "x") == wanted
    assert contents[layout.PARENT_LOCATOR] == b"locator"


def _table(*entries: tuple[UUID, int, int, int], count: int | None = None) -> bytes:
    head = layout.METADATA_TABLE_HEAD.build(
        {"signature": b"metadata", "reserved": 0, "entry_count": len(entries) if count is None else count}
    )
    body = b"".join(
        layout.METADATA_ENTRY.build(
            {"item_id": guid.bytes_le, "offset": offset, "length": length, "flags": flags, "reserved": 0}
        )
        for guid, offset, length, flags in entries
    )
    return (head + body).ljust(65536, b"\0")


@pytest.mark.parametrize(
    ("table", "field"),
    [
        (bytes(65536), "metadata signature"),
        (_table(count=2048), "metadata EntryCount"),
        (_table((UUID(int=1), 65536, 4, 4)), "metadata ItemId"),
        (_table(*[(layout.FILE_PARAMETERS, 65536, 8, 4)] * 2), "metadata ItemId"),
        (_table((layout.FILE_PARAMETERS, 65535, 8, 4)), "metadata Offset"),
        (_table((layout.FILE_PARAMETERS, MIB - 4, 8, 4)), "metadata Offset"),
        (_table((layout.PARENT_LOCATOR, 65536, 0xFFFF_FFFF, 4)), "metadata Offset"),
    ],
)
def test_metadata_tables_that_cannot_be(table: bytes, field: str) -> None:
    with pytest.raises(ImageError) as caught:
        layout.parse_metadata_table(table, "x", MIB)
    assert caught.value.field == field


def test_a_metadata_item_has_a_bounded_length() -> None:
    with pytest.raises(CorruptImageError, match="metadata Length"):
        layout.parse_metadata_table(_table((layout.PARENT_LOCATOR, 65536, MIB + 1, 4)), "x", 4 * MIB)


def test_an_unknown_item_that_is_not_required_is_left_alone() -> None:
    assert layout.parse_metadata_table(_table((UUID(int=1), 0, 1 << 31, 0)), "x", MIB) == {}


@pytest.mark.parametrize(
    ("item", "content", "field"),
    [
        (layout.FILE_PARAMETERS, struct.pack("<II", 512 << 10, 0), "BlockSize"),
        (layout.FILE_PARAMETERS, struct.pack("<II", 512 << 20, 0), "BlockSize"),
        (layout.FILE_PARAMETERS, struct.pack("<II", 3 << 20, 0), "BlockSize"),
        (layout.FILE_PARAMETERS, struct.pack("<II", 0, 0), "BlockSize"),
        (layout.FILE_PARAMETERS, b"", "length of file parameters"),
        (layout.VIRTUAL_DISK_SIZE, struct.pack("<Q", 511), "VirtualDiskSize"),
        (layout.VIRTUAL_DISK_SIZE, struct.pack("<Q", (64 << 40) + 512), "VirtualDiskSize"),
        (layout.VIRTUAL_DISK_SIZE, b"1234567", "length of virtual disk size"),
        (layout.VIRTUAL_DISK_ID, b"", "length of virtual disk ID"),
        (layout.LOGICAL_SECTOR_SIZE, struct.pack("<I", 1024), "LogicalSectorSize"),
        (layout.LOGICAL_SECTOR_SIZE, struct.pack("<I", 0), "LogicalSectorSize"),
        (layout.PHYSICAL_SECTOR_SIZE, struct.pack("<I", 8192), "PhysicalSectorSize"),
    ],
)
def test_parameters_that_cannot_be(item: UUID, content: bytes, field: str) -> None:
    items = Parameters(10 * MIB, 2 * MIB).items() | {item: content}
    with pytest.raises(CorruptImageError) as caught:
        Parameters.parse(items, "x")
    assert caught.value.field == field


@pytest.mark.parametrize("size", [0, 512, MIB, 4 * GIB, 4 * GIB + 512, 3 * TIB, 64 * TIB])
@pytest.mark.parametrize(("block_size", "sector_size"), [(MIB, 512), (32 * MIB, 512), (256 * MIB, 4096)])
def test_how_entries_are_numbered(size: int, block_size: int, sector_size: int) -> None:
    """Behind each ``chunk_ratio`` payload entries there is one for their sector bitmap."""
    if size % sector_size:
        return
    plain = Parameters(size, block_size, sector_size)
    ratio = (1 << 23) * sector_size // block_size
    assert plain.chunk_ratio == ratio
    kinds = itertools.chain.from_iterable(itertools.repeat([*["payload"] * ratio, "bitmap"]))
    blocks, last, payload, bitmaps = -(-size // block_size), 0, 0, 0
    if blocks > 1 << 14:
        assert plain.bat_index(blocks - 1) == blocks - 1 + (blocks - 1) // ratio
        return
    for index, kind in enumerate(kinds):
        if payload == blocks and (bitmaps * ratio >= blocks):
            break
        if kind == "payload":
            if payload < blocks:
                assert plain.bat_index(payload) == index
                last = index + 1
            payload = min(blocks, payload + 1)
        else:
            assert plain.bitmap_index(bitmaps) == index
            bitmaps += 1
    assert plain.bat_entries == last
    assert Parameters(size, block_size, sector_size, has_parent=True).bat_entries == bitmaps * (ratio + 1)


@needs_qemu
def test_what_qemu_img_writes(tmp_path: Path) -> None:
    data = qemu_image(tmp_path / "a.vhdx", 20 * MIB, "block_size=4M,log_size=2M").read_bytes()
    headers = tuple(data[offset : offset + 4096] for offset in layout.HEADER_OFFSETS)
    header, _ = layout.choose_header((headers[0], headers[1]), "x")
    assert (header.log_offset, header.log_length, header.log_guid) == (MIB, 2 * MIB, NO_GUID)
    tables = tuple(data[offset : offset + 65536] for offset in layout.REGION_TABLE_OFFSETS)
    bat, metadata = layout.parse_region_table((tables[0], tables[1]), "x", len(data))
    assert (bat.offset, metadata.offset) == (3 * MIB, 4 * MIB)
    items = layout.parse_metadata_table(data[metadata.offset :][:65536], "x", metadata.length)
    contents = {item_id: data[metadata.offset + item.offset :][: item.length] for item_id, item in items.items()}
    parameters = Parameters.parse(contents, "x")
    assert (parameters.size, parameters.block_size, parameters.sector_size) == (20 * MIB, 4 * MIB, 512)
    assert not parameters.leave_allocated
    assert data.startswith(layout.build_file_identifier("QEMU")[:8])
