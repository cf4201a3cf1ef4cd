"""The header of a Parallels expandable image, both ways (QEMU docs/interop/parallels.rst; all integers little endian).

The file is the header, the block allocation table (BAT) right behind it, and clusters. Pure: nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.units import MIB, SECTOR_SIZE, align_up, div_ceil

MAGIC_V1: Final = b"WithoutFreeSpace"
"""BAT entries are in sectors."""
MAGIC_EXT: Final = b"WithouFreSpacExt"
"""BAT entries are in clusters."""
VERSION: Final = 2

IN_USE: Final = 0x746F6E59
CLOSED: Final = 0x312E3276
CLOSED_BY_OLD: Final = 0
"""Closed, by software that does not know the Format Extension; also what QEMU leaves in a new image."""
FLAG_EMPTY: Final = 1
"""The image is to be taken for empty. Nobody is known to heed it; it is cleared by the first write."""

HEADER_LENGTH: Final = 64
BAT_OFFSET: Final = HEADER_LENGTH
DEFAULT_CLUSTER_SIZE: Final = MIB
MAX_CLUSTER_SECTORS: Final = 0x7FFF_FFFF // 513
"""QEMU's limit."""
MAX_BAT_ENTRIES: Final = 0x7FFF_FFFF // 4
"""QEMU's limit."""
_HEADS: Final = 16
_SECTORS_PER_TRACK: Final = 32

HEADER: Final[Any] = c.Struct(
    "magic" / c.Bytes(16),
    "version" / c.Int32ul,
    "heads" / c.Int32ul,
    "cylinders" / c.Int32ul,
    "cluster_sectors" / c.Int32ul,
    "bat_entries" / c.Int32ul,
    "size_sectors" / c.Int64ul,
    "in_use" / c.Int32ul,
    "data_sector" / c.Int32ul,
    "flags" / c.Int32ul,
    "extension_sector" / c.Int64ul,
)
assert HEADER.sizeof() == HEADER_LENGTH


@dataclass(frozen=True, slots=True)
class Header:
    """The header fields. Offsets and sizes in bytes."""

    magic: bytes
    size: int
    """Of the disk."""
    cluster_size: int
    bat_entries: int
    data_offset: int
    """Where clusters begin; never 0 here."""
    in_use: int = CLOSED
    flags: int = 0
    extension_offset: int = 0
    """Of the Format Extension cluster; 0: none."""
    heads: int = _HEADS
    cylinders: int = 0

    @property
    def entry_scale(self) -> int:
        """Bytes a BAT entry counts in."""
        return self.cluster_size if self.magic == MAGIC_EXT else SECTOR_SIZE

    @property
    def bat_end(self) -> int:
        """Host offset behind the BAT."""
        return BAT_OFFSET + self.bat_entries * 4

    @property
    def host_limit(self) -> int:
        """Host offset behind the last cluster an entry can refer to."""
        return (1 << 32) * self.entry_scale

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str, file_size: int) -> Header:
        """The header in ``data``. CorruptImageError and UnsupportedImageError name field and value.

        The BAT lies inside the file of ``file_size`` bytes, before the first cluster.
        """
        if len(data) < HEADER_LENGTH or file_size < HEADER_LENGTH:
            raise CorruptImageError(
                path, "the file is too short for a Parallels header", field="file size", value=file_size
            )
        f = HEADER.parse(bytes(data[:HEADER_LENGTH]))
        if f.magic not in (MAGIC_V1, MAGIC_EXT):
            raise CorruptImageError(path, "not a Parallels image", field="magic", value=f.magic)
        if f.version != VERSION:
            raise UnsupportedImageError(path, "only version 2 is known", field="version", value=f.version)
        if not 0 < f.cluster_sectors <= MAX_CLUSTER_SECTORS:
            raise CorruptImageError(
                path, f"must be between 1 and {MAX_CLUSTER_SECTORS} sectors", field="tracks", value=f.cluster_sectors
            )
        if f.bat_entries > MAX_BAT_ENTRIES:
            raise CorruptImageError(
                path, f"must be at most {MAX_BAT_ENTRIES}", field="bat_entries", value=f.bat_entries
            )
        size_sectors = f.size_sectors & 0xFFFF_FFFF if f.magic == MAGIC_V1 else f.size_sectors
        if size_sectors > f.bat_entries * f.cluster_sectors:
            raise CorruptImageError(
                path,
                f"too few for a disk of {size_sectors} sectors in clusters of {f.cluster_sectors}",
                field="bat_entries",
                value=f.bat_entries,
            )
        header = cls(
            magic=f.magic,
            size=size_sectors * SECTOR_SIZE,
            cluster_size=f.cluster_sectors * SECTOR_SIZE,
            bat_entries=f.bat_entries,
            data_offset=cls._data_offset(f),
            in_use=f.in_use,
            flags=f.flags,
            extension_offset=f.extension_sector * SECTOR_SIZE,
            heads=f.heads,
            cylinders=f.cylinders,
        )
        header._check(path, file_size)
        return header

    @staticmethod
    def _data_offset(f: Any) -> int:
        if f.data_sector:
            return int(f.data_sector * SECTOR_SIZE)
        unit = SECTOR_SIZE if f.magic == MAGIC_V1 else f.cluster_sectors * SECTOR_SIZE
        return align_up(BAT_OFFSET + f.bat_entries * 4, unit)

    def _check(self, path: str, file_size: int) -> None:
        if self.bat_end > file_size:
            raise CorruptImageError(
                path,
                f"a table of so many does not fit into the file of {file_size}",
                field="bat_entries",
                value=self.bat_entries,
            )
        if self.data_offset < self.bat_end:
            raise CorruptImageError(
                path,
                f"inside the block allocation table, which ends at {self.bat_end:#x}",
                field="data_off",
                value=self.data_offset // SECTOR_SIZE,
            )
        if self.data_offset > align_up(file_size, self.cluster_size):
            raise CorruptImageError(
                path,
                f"behind the end of the file of {file_size} bytes",
                field="data_off",
                value=self.data_offset // SECTOR_SIZE,
            )
        if self.data_offset % self.entry_scale:
            raise CorruptImageError(
                path,
                f"not a multiple of the cluster size, {self.cluster_size // SECTOR_SIZE} sectors",
                field="data_off",
                value=self.data_offset // SECTOR_SIZE,
            )

    def build(self) -> bytes:
        """The header."""
        data: bytes = HEADER.build(
            {
                "magic": self.magic,
                "version": VERSION,
                "heads": self.heads,
                "cylinders": self.cylinders,
                "cluster_sectors": self.cluster_size // SECTOR_SIZE,
                "bat_entries": self.bat_entries,
                "size_sectors": self.size // SECTOR_SIZE,
                "in_use": self.in_use,
                "data_sector": self.data_offset // SECTOR_SIZE,
                "flags": self.flags,
                "extension_sector": self.extension_offset // SECTOR_SIZE,
            }
        )
        return data


def cylinders_of(size: int) -> int:
    """The geometry QEMU gives a disk of ``size`` bytes: 16 heads, tracks of 32 sectors."""
    return min(size // SECTOR_SIZE // _HEADS // _SECTORS_PER_TRACK, 0xFFFF_FFFF)


def plan(size: int, *, cluster_size: int = DEFAULT_CLUSTER_SIZE) -> Header:
    """The header of a new image of ``size`` bytes, data at the first multiple of the cluster size behind the BAT.

    ValueError when the cluster size is none, or too small for the disk.
    """
    if cluster_size % SECTOR_SIZE or not 0 < cluster_size <= MAX_CLUSTER_SECTORS * SECTOR_SIZE:
        raise ValueError(f"must be a multiple of 512, at most {MAX_CLUSTER_SECTORS * SECTOR_SIZE}")
    entries = div_ceil(size, cluster_size)
    data_offset = align_up(BAT_OFFSET + entries * 4, cluster_size)
    if entries > MAX_BAT_ENTRIES or data_offset // SECTOR_SIZE >= 1 << 32:
        raise ValueError(f"too small for a disk of {size} bytes: the table has at most {MAX_BAT_ENTRIES} entries")
    return Header(
        magic=MAGIC_EXT,
        size=size,
        cluster_size=cluster_size,
        bat_entries=entries,
        data_offset=data_offset,
        cylinders=cylinders_of(size),
    )
