"""The bytes of a VHDX image, both ways ([MS-VHDX]; all integers are little endian).

File identifier, headers, region table, metadata and the words of the block allocation table (BAT). What the log holds
is in ``log``, the parent locator in ``locator``. Pure: nothing here does I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final
from uuid import UUID

import construct as c

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.formats.crc32c import crc32c
from nbdserve.units import KIB, MIB, TIB, div_ceil, is_power_of_two

SIGNATURE: Final = b"vhdxfile"
HEADER_SIGNATURE: Final = b"head"
REGION_SIGNATURE: Final = b"regi"
METADATA_SIGNATURE: Final = b"metadata"

# Where things are that have one place ([MS-VHDX] 2.2).
HEADER_OFFSETS: Final = (64 * KIB, 128 * KIB)
HEADER_LENGTH: Final = 4 * KIB
REGION_TABLE_OFFSETS: Final = (192 * KIB, 256 * KIB)
REGION_TABLE_LENGTH: Final = 64 * KIB
HEAD_LENGTH: Final = MIB
"""Everything above; the log, the regions and the blocks are behind it, at multiples of 1 MiB."""
METADATA_TABLE_LENGTH: Final = 64 * KIB
MAX_TABLE_ENTRIES: Final = 2047
MAX_ITEM_LENGTH: Final = MIB

BAT_REGION: Final = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION: Final = UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")

FILE_PARAMETERS: Final = UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
VIRTUAL_DISK_SIZE: Final = UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
VIRTUAL_DISK_ID: Final = UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR_SIZE: Final = UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR_SIZE: Final = UUID("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR: Final = UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
NO_GUID: Final = UUID(int=0)

MIN_BLOCK_SIZE: Final = MIB
MAX_BLOCK_SIZE: Final = 256 * MIB
MAX_SIZE: Final = 64 * TIB
SECTOR_SIZES: Final = (512, 4096)

# A BAT entry: bits 0-2 state, 3-19 reserved, 20-63 file offset in MiB ([MS-VHDX] 2.5.1).
STATE_MASK: Final = 7
OFFSET_MASK: Final = 0xFFFF_FFFF_FFF0_0000
NOT_PRESENT: Final = 0
"""Not here: the parent decides, or without one nobody does (zeroes are read)."""
UNDEFINED: Final = 1
ZERO: Final = 2
UNMAPPED: Final = 3
FULLY_PRESENT: Final = 6
"""Also the state of a sector bitmap block that there is."""
PARTIALLY_PRESENT: Final = 7
"""The sector bitmap says of each sector whether it is here or in the parent."""
BITMAP_BLOCK_SIZE: Final = MIB
SECTORS_PER_CHUNK: Final = 1 << 23
"""Sectors that one sector bitmap block, a bit each, stands for."""

FLAG_LEAVE_ALLOCATED: Final = 1
FLAG_HAS_PARENT: Final = 2
ITEM_IS_VIRTUAL_DISK: Final = 2
ITEM_IS_REQUIRED: Final = 4

FILE_IDENTIFIER: Final[Any] = c.Struct("signature" / c.Bytes(8), "creator" / c.Bytes(512))
HEADER: Final[Any] = c.Struct(
    "signature" / c.Bytes(4),
    "checksum" / c.Int32ul,
    "sequence_number" / c.Int64ul,
    "file_write_guid" / c.Bytes(16),
    "data_write_guid" / c.Bytes(16),
    "log_guid" / c.Bytes(16),
    "log_version" / c.Int16ul,
    "version" / c.Int16ul,
    "log_length" / c.Int32ul,
    "log_offset" / c.Int64ul,
)
REGION_TABLE_HEAD: Final[Any] = c.Struct(
    "signature" / c.Bytes(4), "checksum" / c.Int32ul, "entry_count" / c.Int32ul, "reserved" / c.Int32ul
)
REGION_ENTRY: Final[Any] = c.Struct(
    "guid" / c.Bytes(16), "file_offset" / c.Int64ul, "length" / c.Int32ul, "required" / c.Int32ul
)
METADATA_TABLE_HEAD: Final[Any] = c.Struct(
    "signature" / c.Bytes(8), "reserved" / c.Int16ul, "entry_count" / c.Int16ul, "reserved2" / c.Padding(20)
)
METADATA_ENTRY: Final[Any] = c.Struct(
    "item_id" / c.Bytes(16), "offset" / c.Int32ul, "length" / c.Int32ul, "flags" / c.Int32ul, "reserved" / c.Int32ul
)
FILE_PARAMETERS_ITEM: Final[Any] = c.Struct("block_size" / c.Int32ul, "flags" / c.Int32ul)

CHECKSUM_AT: Final = 4
"""Where the CRC-32C is in a header, a region table and a log entry; it counts as zero while it is made."""


def checksum(data: bytes) -> int:
    """The CRC-32C of ``data`` with zeroes at ``CHECKSUM_AT``."""
    return crc32c(data[:CHECKSUM_AT] + bytes(4) + data[CHECKSUM_AT + 4 :])


def sealed(data: bytes | bytearray) -> bytes:
    """``data`` with its CRC-32C in place."""
    data = bytes(data)
    return data[:CHECKSUM_AT] + struct.pack("<I", checksum(data)) + data[CHECKSUM_AT + 4 :]


def is_sealed(data: bytes) -> bool:
    """Whether the CRC-32C that ``data`` holds is its own."""
    return bool(struct.unpack_from("<I", data, CHECKSUM_AT)[0] == checksum(data))


def build_file_identifier(creator: str) -> bytes:
    """The first 520 bytes of the file."""
    built: bytes = FILE_IDENTIFIER.build(
        {"signature": SIGNATURE, "creator": creator.encode("utf-16-le").ljust(512, b"\0")}
    )
    return built


@dataclass(frozen=True, slots=True)
class Header:
    """One of the two headers: where the log is, and the identities that change as the image is written."""

    sequence_number: int
    file_write_guid: UUID
    """Changes with every open that writes to the file."""
    data_write_guid: UUID
    """Changes with every open that changes what the guest sees: by it a differencing child knows its parent."""
    log_guid: UUID
    """Entries with this one are to be replayed; NO_GUID: there are none."""
    log_offset: int
    log_length: int
    log_version: int = 0
    """Of the form of log entries, where there are any."""

    @classmethod
    def parse(cls, data: bytes) -> Header | None:
        """The header in ``data`` (4 KiB); None when it is not valid: a write of it may have been torn."""
        if len(data) < HEADER_LENGTH or data[:4] != HEADER_SIGNATURE or not is_sealed(data[:HEADER_LENGTH]):
            return None
        fields = HEADER.parse(data)
        if fields.version != 1:
            return None
        return cls(
            sequence_number=fields.sequence_number,
            file_write_guid=UUID(bytes_le=fields.file_write_guid),
            data_write_guid=UUID(bytes_le=fields.data_write_guid),
            log_guid=UUID(bytes_le=fields.log_guid),
            log_offset=fields.log_offset,
            log_length=fields.log_length,
            log_version=fields.log_version,
        )

    def build(self) -> bytes:
        """4 KiB."""
        built: bytes = HEADER.build(
            {
                "signature": HEADER_SIGNATURE,
                "checksum": 0,
                "sequence_number": self.sequence_number,
                "file_write_guid": self.file_write_guid.bytes_le,
                "data_write_guid": self.data_write_guid.bytes_le,
                "log_guid": self.log_guid.bytes_le,
                "log_version": self.log_version,
                "version": 1,
                "log_length": self.log_length,
                "log_offset": self.log_offset,
            }
        )
        return sealed(built.ljust(HEADER_LENGTH, b"\0"))

    def next(self, **changes: Any) -> Header:
        """The header that follows this one."""
        return replace(self, sequence_number=self.sequence_number + 1, **changes)

    def check(self, path: str, file_size: int) -> None:
        """CorruptImageError where the log cannot be where the header says."""
        if self.log_length % MIB or (self.log_length == 0 and self.log_guid != NO_GUID):
            raise CorruptImageError(path, "must be a multiple of 1 MiB", field="LogLength", value=self.log_length)
        if self.log_version and self.log_guid != NO_GUID:
            raise UnsupportedImageError(path, "version 0 is known", field="LogVersion", value=self.log_version)
        if self.log_length:
            place_inside(path, "LogOffset", self.log_offset, self.log_length, file_size)
        if self.sequence_number >= (1 << 64) - 16:
            raise CorruptImageError(path, "too large", field="SequenceNumber", value=self.sequence_number)


def choose_header(copies: tuple[bytes, bytes], path: str) -> tuple[Header, int]:
    """The current header of the two, and its number ([MS-VHDX] 2.2.2). CorruptImageError when neither is."""
    first, second = (Header.parse(bytes(data)) for data in copies)
    if first is None and second is None:
        _refuse_other_versions(copies, path)
        raise CorruptImageError(
            path, "neither of the two headers is valid", field="header signature", value=bytes(copies[0][:4])
        )
    if first is None:
        assert second is not None
        return second, 1
    if second is None:
        return first, 0
    if first.sequence_number == second.sequence_number and first != second:
        raise CorruptImageError(
            path, "two different headers have it", field="SequenceNumber", value=first.sequence_number
        )
    return (second, 1) if second.sequence_number > first.sequence_number else (first, 0)


def _refuse_other_versions(copies: tuple[bytes, bytes], path: str) -> None:
    for data in copies:
        if data[:4] == HEADER_SIGNATURE and len(data) == HEADER_LENGTH and is_sealed(bytes(data)):
            raise UnsupportedImageError(path, "version 1 is known", field="Version", value=HEADER.parse(data).version)


def place_inside(path: str, field: str, offset: int, length: int, file_size: int) -> None:
    """CorruptImageError unless ``[offset, offset + length)`` is behind the head and inside the file, at whole MiB."""
    if offset % MIB or offset < HEAD_LENGTH:
        raise CorruptImageError(path, "must be a multiple of 1 MiB, and not 0", field=field, value=offset)
    if offset + length > file_size:
        raise CorruptImageError(path, f"past the end of the file ({file_size} bytes)", field=field, value=offset)


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the file, by what it holds."""

    guid: UUID
    offset: int
    length: int
    required: bool = True

    @property
    def end(self) -> int:
        """Host offset."""
        return self.offset + self.length


def parse_region_table(copies: tuple[bytes, bytes], path: str, file_size: int) -> tuple[Region, ...]:
    """The regions of the first valid copy of the table, inside the file and apart from each other."""
    for data in copies:
        if data[:4] == REGION_SIGNATURE and is_sealed(bytes(data)):
            return _parse_regions(bytes(data), path, file_size)
    raise CorruptImageError(
        path, "neither of the two region tables is valid", field="region table signature", value=bytes(copies[0][:4])
    )


def _parse_regions(data: bytes, path: str, file_size: int) -> tuple[Region, ...]:
    count = REGION_TABLE_HEAD.parse(data).entry_count
    if count > MAX_TABLE_ENTRIES:
        raise CorruptImageError(path, "at most 2047", field="region table EntryCount", value=count)
    start, size = REGION_TABLE_HEAD.sizeof(), REGION_ENTRY.sizeof()
    regions: dict[UUID, Region] = {}
    for at in range(start, start + count * size, size):
        entry = REGION_ENTRY.parse(data[at : at + size])
        guid = UUID(bytes_le=entry.guid)
        region = Region(guid, entry.file_offset, entry.length, bool(entry.required & 1))
        if guid not in (BAT_REGION, METADATA_REGION) and region.required:
            raise UnsupportedImageError(path, "a required region is unknown", field="region Guid", value=str(guid))
        if guid in regions:
            raise CorruptImageError(path, "there are two of it", field="region Guid", value=str(guid))
        if not region.length or region.length % MIB:
            raise CorruptImageError(path, "must be a multiple of 1 MiB", field="region Length", value=region.length)
        place_inside(path, "region FileOffset", region.offset, region.length, file_size)
        regions[guid] = region
    for guid, name in ((BAT_REGION, "BAT"), (METADATA_REGION, "metadata")):
        if guid not in regions:
            raise CorruptImageError(path, f"there is no {name} region", field="region table EntryCount", value=count)
    return tuple(regions.values())


def refuse_overlaps(regions: Iterable[Region], header: Header, path: str) -> None:
    """CorruptImageError when two regions, or one and the log, share space."""
    places = sorted([*((region.offset, region.end) for region in regions), *_log_place(header)])
    for (_, end), (start, _) in pairwise(places):
        if start < end:
            raise CorruptImageError(path, "overlaps what is before it", field="region FileOffset", value=start)


def _log_place(header: Header) -> list[tuple[int, int]]:
    return [(header.log_offset, header.log_offset + header.log_length)] if header.log_length else []


def build_region_table(regions: Iterable[Region]) -> bytes:
    """64 KiB."""
    entries = [
        REGION_ENTRY.build(
            {
                "guid": region.guid.bytes_le,
                "file_offset": region.offset,
                "length": region.length,
                "required": int(region.required),
            }
        )
        for region in regions
    ]
    head: bytes = REGION_TABLE_HEAD.build(
        {"signature": REGION_SIGNATURE, "checksum": 0, "entry_count": len(entries), "reserved": 0}
    )
    return sealed((head + b"".join(entries)).ljust(REGION_TABLE_LENGTH, b"\0"))


@dataclass(frozen=True, slots=True)
class Item:
    """Where a metadata item is in its region."""

    offset: int
    length: int


def parse_metadata_table(data: bytes, path: str, region_length: int) -> dict[UUID, Item]:
    """The items that the table (64 KiB) places; an unknown one is refused if it is required."""
    if data[:8] != METADATA_SIGNATURE:
        raise CorruptImageError(path, "no metadata table", field="metadata signature", value=bytes(data[:8]))
    count = METADATA_TABLE_HEAD.parse(data).entry_count
    if count > MAX_TABLE_ENTRIES:
        raise CorruptImageError(path, "at most 2047", field="metadata EntryCount", value=count)
    known = (
        FILE_PARAMETERS,
        VIRTUAL_DISK_SIZE,
        VIRTUAL_DISK_ID,
        LOGICAL_SECTOR_SIZE,
        PHYSICAL_SECTOR_SIZE,
        PARENT_LOCATOR,
    )
    start, size = METADATA_TABLE_HEAD.sizeof(), METADATA_ENTRY.sizeof()
    items: dict[UUID, Item] = {}
    for at in range(start, start + count * size, size):
        entry = METADATA_ENTRY.parse(data[at : at + size])
        item_id = UUID(bytes_le=entry.item_id)
        if item_id not in known:
            if entry.flags & ITEM_IS_REQUIRED:
                raise UnsupportedImageError(
                    path, "a required metadata item is unknown", field="metadata ItemId", value=str(item_id)
                )
            continue
        if item_id in items:
            raise CorruptImageError(path, "there are two of it", field="metadata ItemId", value=str(item_id))
        if entry.offset < METADATA_TABLE_LENGTH or entry.offset + entry.length > region_length:
            raise CorruptImageError(path, "outside the region", field="metadata Offset", value=entry.offset)
        if entry.length > MAX_ITEM_LENGTH:
            raise CorruptImageError(path, "at most 1 MiB", field="metadata Length", value=entry.length)
        items[item_id] = Item(entry.offset, entry.length)
    return items


@dataclass(frozen=True, slots=True)
class Parameters:
    """The shape of the disk, from the metadata items."""

    size: int
    """Virtual size, bytes."""
    block_size: int
    sector_size: int = 512
    """The logical sector size, the unit of sector bitmaps."""
    physical_sector_size: int = 512
    leave_allocated: bool = False
    """The image is fixed: blocks are never given back."""
    has_parent: bool = False
    disk_id: UUID = NO_GUID

    @property
    def chunk_ratio(self) -> int:
        """Blocks that share a sector bitmap block; a power of two."""
        return SECTORS_PER_CHUNK * self.sector_size // self.block_size

    @property
    def blocks(self) -> int:
        """Payload blocks of the disk."""
        return div_ceil(self.size, self.block_size)

    @property
    def chunks(self) -> int:
        """Groups of ``chunk_ratio`` blocks, the last one perhaps shorter."""
        return div_ceil(self.blocks, self.chunk_ratio)

    @property
    def bat_entries(self) -> int:
        """Words of the BAT that stand for something ([MS-VHDX] 2.5)."""
        if self.has_parent:
            return self.chunks * (self.chunk_ratio + 1)
        return self.blocks + max(0, self.blocks - 1) // self.chunk_ratio

    def bat_index(self, block: int) -> int:
        """Where the entry of payload block ``block`` is."""
        return block + block // self.chunk_ratio

    def bitmap_index(self, chunk: int) -> int:
        """Where the entry of the sector bitmap block of ``chunk`` is."""
        return (chunk + 1) * (self.chunk_ratio + 1) - 1

    @classmethod
    def parse(cls, items: dict[UUID, bytes], path: str) -> Parameters:
        """From the content of the items."""
        for item_id, name, length in (
            (FILE_PARAMETERS, "file parameters", 8),
            (VIRTUAL_DISK_SIZE, "virtual disk size", 8),
            (VIRTUAL_DISK_ID, "virtual disk ID", 16),
            (LOGICAL_SECTOR_SIZE, "logical sector size", 4),
            (PHYSICAL_SECTOR_SIZE, "physical sector size", 4),
        ):
            found = len(items.get(item_id, b""))
            if found < length:
                raise CorruptImageError(path, f"expects {length} bytes", field=f"length of {name}", value=found)
        file_parameters = FILE_PARAMETERS_ITEM.parse(items[FILE_PARAMETERS])
        result = cls(
            size=int.from_bytes(items[VIRTUAL_DISK_SIZE][:8], "little"),
            block_size=file_parameters.block_size,
            sector_size=int.from_bytes(items[LOGICAL_SECTOR_SIZE][:4], "little"),
            physical_sector_size=int.from_bytes(items[PHYSICAL_SECTOR_SIZE][:4], "little"),
            leave_allocated=bool(file_parameters.flags & FLAG_LEAVE_ALLOCATED),
            has_parent=bool(file_parameters.flags & FLAG_HAS_PARENT),
            disk_id=UUID(bytes_le=items[VIRTUAL_DISK_ID][:16]),
        )
        result._check(path)
        return result

    def _check(self, path: str) -> None:
        if not is_power_of_two(self.block_size) or not MIN_BLOCK_SIZE <= self.block_size <= MAX_BLOCK_SIZE:
            raise CorruptImageError(path, "1 to 256 MiB, a power of two", field="BlockSize", value=self.block_size)
        for name, value in (
            ("LogicalSectorSize", self.sector_size),
            ("PhysicalSectorSize", self.physical_sector_size),
        ):
            if value not in SECTOR_SIZES:
                raise CorruptImageError(path, "512 or 4096", field=name, value=value)
        if self.size > MAX_SIZE or self.size % self.sector_size:
            raise CorruptImageError(
                path, "whole logical sectors, at most 64 TiB", field="VirtualDiskSize", value=self.size
            )

    def items(self) -> dict[UUID, bytes]:
        """The content of the metadata items."""
        flags = FLAG_LEAVE_ALLOCATED * self.leave_allocated | FLAG_HAS_PARENT * self.has_parent
        return {
            FILE_PARAMETERS: FILE_PARAMETERS_ITEM.build({"block_size": self.block_size, "flags": flags}),
            VIRTUAL_DISK_SIZE: self.size.to_bytes(8, "little"),
            VIRTUAL_DISK_ID: self.disk_id.bytes_le,
            LOGICAL_SECTOR_SIZE: self.sector_size.to_bytes(4, "little"),
            PHYSICAL_SECTOR_SIZE: self.physical_sector_size.to_bytes(4, "little"),
        }


def build_metadata(parameters: Parameters, locator: bytes = b"") -> bytes:
    """The start of the metadata region: the table (64 KiB) and the items behind it."""
    contents = parameters.items()
    if locator:
        contents[PARENT_LOCATOR] = locator
    entries, stored = [], b""
    for item_id, content in contents.items():
        entries.append(build_metadata_entry(item_id, Item(METADATA_TABLE_LENGTH + len(stored), len(content))))
        stored += content
    return build_metadata_table(entries).ljust(METADATA_TABLE_LENGTH, b"\0") + stored


def build_metadata_entry(item_id: UUID, item: Item) -> bytes:
    """Where an item is, and that no reader may do without it."""
    about_file = item_id in (FILE_PARAMETERS, PARENT_LOCATOR)
    flags = ITEM_IS_REQUIRED | (0 if about_file else ITEM_IS_VIRTUAL_DISK)
    fields = {"item_id": item_id.bytes_le, "offset": item.offset, "length": item.length, "flags": flags, "reserved": 0}
    built: bytes = METADATA_ENTRY.build(fields)
    return built


def build_metadata_table(entries: list[bytes]) -> bytes:
    """The table as far as it says something."""
    fields = {"signature": METADATA_SIGNATURE, "reserved": 0, "entry_count": len(entries)}
    head: bytes = METADATA_TABLE_HEAD.build(fields)
    return head + b"".join(entries)
