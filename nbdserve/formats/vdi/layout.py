"""The header of a VDI image, version 1.1, both ways (all integers are little endian). Pure: nothing here does I/O.

The file is the header, the block map, and the data area: blocks of ``block_size`` bytes, numbered from 0. The map has a
u32 for each block of the disk: the number of its block in the data area, or FREE or ZEROED.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import construct as c

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.units import GIB, MIB, SECTOR_SIZE, align_up, div_ceil, is_power_of_two

SIGNATURE: Final = 0xBEDA107F
VERSION_1_1: Final = 0x00010001
TEXT: Final = b"<<< nbdserve Virtual Disk Image >>>\n"

TYPE_DYNAMIC: Final = 1
TYPE_STATIC: Final = 2
TYPE_UNDO: Final = 3
TYPE_DIFFERENCING: Final = 4
TYPE_NAMES: Final = {TYPE_DYNAMIC: "dynamic", TYPE_STATIC: "static", TYPE_DIFFERENCING: "differencing"}

FREE: Final = 0xFFFF_FFFF
"""A map entry: the block is not allocated, and a differencing image leaves it to its parent."""
ZEROED: Final = 0xFFFF_FFFE
"""A map entry: the block is not allocated and reads as zeroes, in a differencing image too."""

BLOCK_SIZE: Final = MIB
"""The only block size QEMU knows, and what VirtualBox makes."""
MIN_BLOCK_SIZE: Final = 4096
MAX_BLOCK_SIZE: Final = 64 * MIB
MAX_SIZE: Final = 0x1FFF_FF80 * BLOCK_SIZE
"""Bytes of a disk whose map QEMU takes: it ends before 2 GiB."""
OFFSET_LIMIT: Final = 4 * GIB
"""Of the fields with the offsets of the map and of the data."""
PLACEHOLDER_ROOM: Final = 4096
"""Bytes planned behind a map for placeholders."""

NO_UUID: Final = UUID(int=0)

PREHEADER_LENGTH: Final = 72
HEADER_SIZE_QEMU: Final = 0x180
HEADER_SIZE: Final = 0x190
"""Of VirtualBox's headers, which have a logical geometry at the end."""

HEADER: Final[Any] = c.Struct(
    "text" / c.Bytes(64),
    "signature" / c.Int32ul,
    "version" / c.Int32ul,
    "header_size" / c.Int32ul,
    "type" / c.Int32ul,
    "flags" / c.Int32ul,
    "description" / c.Bytes(256),
    "map_offset" / c.Int32ul,
    "data_offset" / c.Int32ul,
    "cylinders" / c.Int32ul,
    "heads" / c.Int32ul,
    "sectors" / c.Int32ul,
    "sector_size" / c.Int32ul,
    "unused" / c.Int32ul,
    "size" / c.Int64ul,
    "block_size" / c.Int32ul,
    "block_extra" / c.Int32ul,
    "blocks" / c.Int32ul,
    "blocks_allocated" / c.Int32ul,
    "uuid" / c.Bytes(16),
    "uuid_modified" / c.Bytes(16),
    "uuid_parent" / c.Bytes(16),
    "uuid_parent_modified" / c.Bytes(16),
    c.Padding(SECTOR_SIZE - 456),
)
assert HEADER.sizeof() == SECTOR_SIZE

MAP_OFFSET_AT: Final = 0x154
"""Where the fields are that change in an image: the sector is patched (``patched``), never built anew."""
DATA_OFFSET_AT: Final = 0x158
SIZE_AT: Final = 0x170
BLOCKS_AT: Final = 0x180
BLOCKS_ALLOCATED_AT: Final = 0x184


@dataclass(frozen=True, slots=True)
class Header:
    """The header fields. Offsets and sizes in bytes."""

    type: int
    size: int
    """Of the disk."""
    map_offset: int
    data_offset: int
    blocks: int
    """Entries of the map; those behind the disk's own (``disk_blocks``) are placeholders that no guest sees."""
    blocks_allocated: int
    """Blocks of the data area in use. QEMU puts the next one there without looking, so each entry must be less; its
    check wants exactly as many entries that refer to a block."""
    block_size: int = BLOCK_SIZE
    header_size: int = HEADER_SIZE
    """Behind the 72 bytes of the preheader."""
    flags: int = 0
    uuid: UUID = NO_UUID
    uuid_modified: UUID = NO_UUID
    """Changes when VirtualBox changes the content."""
    uuid_parent: UUID = NO_UUID
    uuid_parent_modified: UUID = NO_UUID
    """What the parent's two were when this image was made on it."""

    @property
    def differencing(self) -> bool:
        """Blocks that are not allocated are the parent's."""
        return self.type == TYPE_DIFFERENCING

    @property
    def disk_blocks(self) -> int:
        """Entries of the map that the disk needs."""
        return div_ceil(self.size, self.block_size)

    @property
    def end(self) -> int:
        """Host offset of the first sector behind the header."""
        return align_up(PREHEADER_LENGTH + self.header_size, SECTOR_SIZE)

    @property
    def map_among_data(self) -> bool:
        """The map is in the place of a block: what is left of moving the data area (``room``)."""
        return self.map_offset > self.data_offset

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str, file_size: int) -> Header:
        """The header in ``data``, the first sector. CorruptImageError and UnsupportedImageError name field and value.

        The map lies inside the file of ``file_size`` bytes, before the data area.
        """
        if len(data) < SECTOR_SIZE or file_size < SECTOR_SIZE:
            raise CorruptImageError(path, "the file is too short for a VDI header", field="file size", value=file_size)
        f = HEADER.parse(bytes(data[:SECTOR_SIZE]))
        if f.signature != SIGNATURE:
            raise CorruptImageError(path, "not a VDI image", field="signature", value=f.signature)
        if f.version != VERSION_1_1:
            raise UnsupportedImageError(path, "only version 1.1 (0x10001) is known", field="version", value=f.version)
        if f.type not in TYPE_NAMES:
            raise UnsupportedImageError(
                path, "1 (dynamic), 2 (static) and 4 (differencing) are known", field="image type", value=f.type
            )
        if f.header_size < HEADER_SIZE_QEMU:
            raise CorruptImageError(path, "too small for version 1.1", field="header size", value=f.header_size)
        if f.sector_size != SECTOR_SIZE:
            raise UnsupportedImageError(path, "must be 512", field="sector size", value=f.sector_size)
        if not is_power_of_two(f.block_size) or not MIN_BLOCK_SIZE <= f.block_size <= MAX_BLOCK_SIZE:
            raise UnsupportedImageError(
                path, "must be a power of two from 4 KiB to 64 MiB", field="block size", value=f.block_size
            )
        if f.block_extra:
            raise UnsupportedImageError(
                path, "extra bytes before each block are not known", field="block extra size", value=f.block_extra
            )
        header = cls(
            type=f.type,
            size=align_up(f.size, SECTOR_SIZE),
            map_offset=f.map_offset,
            data_offset=f.data_offset,
            blocks=f.blocks,
            blocks_allocated=f.blocks_allocated,
            block_size=f.block_size,
            header_size=f.header_size,
            flags=f.flags,
            uuid=UUID(bytes_le=f.uuid),
            uuid_modified=UUID(bytes_le=f.uuid_modified),
            uuid_parent=UUID(bytes_le=f.uuid_parent),
            uuid_parent_modified=UUID(bytes_le=f.uuid_parent_modified),
        )
        header._check(path, file_size)
        return header

    def _check(self, path: str, file_size: int) -> None:
        for field, offset in (("map offset", self.map_offset), ("data offset", self.data_offset)):
            if offset % SECTOR_SIZE or offset < SECTOR_SIZE:
                raise CorruptImageError(path, "not a sector behind the header", field=field, value=offset)
        if self.size > 1 << 62 or self.blocks < div_ceil(self.size, self.block_size):
            raise CorruptImageError(
                path, f"too few for a disk of {self.size} bytes", field="blocks in image", value=self.blocks
            )
        among = self.map_among_data and (self.map_offset - self.data_offset) % self.block_size == 0
        if not among and self.map_offset + self.blocks * 4 > self.data_offset:
            raise CorruptImageError(
                path,
                f"the map of {self.blocks} blocks at {self.map_offset:#x} does not end before it",
                field="data offset",
                value=self.data_offset,
            )
        if self.map_offset + self.blocks * 4 > file_size:
            raise CorruptImageError(
                path,
                f"the map of {self.blocks} blocks there does not fit into the file of {file_size}",
                field="map offset",
                value=self.map_offset,
            )
        if self.data_offset > align_up(file_size, self.block_size):
            raise CorruptImageError(
                path, f"behind the end of the file of {file_size} bytes", field="data offset", value=self.data_offset
            )
        if not self.differencing and (self.uuid_parent != NO_UUID or self.uuid_parent_modified != NO_UUID):
            uuid = self.uuid_parent if self.uuid_parent != NO_UUID else self.uuid_parent_modified
            raise UnsupportedImageError(
                path, f"a {TYPE_NAMES[self.type]} image has no parent", field="parent UUID", value=str(uuid)
            )

    def build(self) -> bytes:
        """The header sector."""
        data: bytes = HEADER.build(
            {
                "text": TEXT.ljust(64, b"\0"),
                "signature": SIGNATURE,
                "version": VERSION_1_1,
                "header_size": self.header_size,
                "type": self.type,
                "flags": self.flags,
                "description": bytes(256),
                "map_offset": self.map_offset,
                "data_offset": self.data_offset,
                "cylinders": 0,
                "heads": 0,
                "sectors": 0,
                "sector_size": SECTOR_SIZE,
                "unused": 0,
                "size": self.size,
                "block_size": self.block_size,
                "block_extra": 0,
                "blocks": self.blocks,
                "blocks_allocated": self.blocks_allocated,
                "uuid": self.uuid.bytes_le,
                "uuid_modified": self.uuid_modified.bytes_le,
                "uuid_parent": self.uuid_parent.bytes_le,
                "uuid_parent_modified": self.uuid_parent_modified.bytes_le,
            }
        )
        return data


def patched(sector: bytes | bytearray, fields: dict[int, int]) -> bytes:
    """The header ``sector`` with other values in some of its 4-byte fields, by where they are."""
    result = bytearray(sector)
    for at, value in fields.items():
        struct.pack_into("<I", result, at, value)
    return bytes(result)


def plan(size: int, *, static: bool = False) -> Header:
    """The header of a new image of ``size`` bytes: the data area is at a multiple of 1 MiB.

    Between header and data there is room for the map twice, and for 4 KiB of placeholders each time, except where the
    data would begin behind 4 GiB, where the fields that point there end. ValueError when it does with one map too.
    """
    blocks = div_ceil(size, BLOCK_SIZE)
    map_length = align_up(blocks * 4, SECTOR_SIZE)
    data_offset = align_up(SECTOR_SIZE + 2 * (map_length + PLACEHOLDER_ROOM), BLOCK_SIZE)
    if data_offset >= OFFSET_LIMIT:
        data_offset = align_up(SECTOR_SIZE + map_length, BLOCK_SIZE)
    if size > MAX_SIZE or data_offset >= OFFSET_LIMIT:
        raise ValueError(f"a VDI image has at most {MAX_SIZE} bytes")
    return Header(
        type=TYPE_STATIC if static else TYPE_DYNAMIC,
        size=size,
        map_offset=SECTOR_SIZE,
        data_offset=data_offset,
        blocks=blocks,
        blocks_allocated=blocks if static else 0,
    )
