"""The bytes of VMDK sparse extents, both ways (VMware Virtual Disk Format 5.0; all integers are little endian).

Three forms of extent: the hosted one (magic KDMV; also the stream-optimized form), the older one of ESX (COWD) and the
space-efficient one (seSparse). Positions on disk are counted in sectors of 512 bytes; a ``SparseHeader`` has them in
bytes. Pure: nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.units import SECTOR_SIZE, div_ceil, is_power_of_two

KDMV: Final = b"KDMV"
COWD: Final = b"COWD"
SESPARSE: Final = b"\xbe\xba\xfe\xca\0\0\0\0"
SESPARSE_VERSION: Final = 0x0000_0002_0000_0001

FLAG_NEWLINES: Final = 1 << 0
"""The bytes that detect a transfer as text are there."""
FLAG_REDUNDANT: Final = 1 << 1
FLAG_ZEROED_GRAINS: Final = 1 << 2
FLAG_COMPRESSED: Final = 1 << 16
FLAG_MARKERS: Final = 1 << 17
NEWLINES: Final = b"\n \r\n"
DIRECTORY_AT_END: Final = 0xFFFF_FFFF_FFFF_FFFF
"""The gdOffset of a header that leaves the places to the footer."""
COMPRESSION_NONE: Final = 0
COMPRESSION_DEFLATE: Final = 1

MARKER_END: Final = 0
MARKER_FOOTER: Final = 3

UNALLOCATED_ENTRY: Final = 0
ZEROED_ENTRY: Final = 1
"""In a grain table: the grain reads as zeroes (with FLAG_ZEROED_GRAINS)."""

TABLE_ENTRIES: Final = 512
"""Of the grain tables of a hosted extent."""
COWD_TABLE_ENTRIES: Final = 4096
MAX_GRAIN: Final = 16 << 20
"""Bytes. QEMU opens up to 1 GiB; VMware's are of 64 KiB, and 4 KiB in the space-efficient form."""
MAX_DIRECTORY_BYTES: Final = 8 << 20
"""Of the grain directories of one image, which stay in memory as long as it is open: 64 TiB with grains of 64 KiB."""
MAX_EXTENT_BYTES: Final = 1 << 41
"""Grain tables count sectors in 32 bits."""
MAX_SIZE: Final = 1 << 60
"""Bytes of a disk."""

DESCRIPTOR_OFFSET: Final = SECTOR_SIZE
"""Where QEMU looks for the descriptor in a sparse extent, whatever the header says."""
DESCRIPTOR_BYTES: Final = 20 * SECTOR_SIZE

HEADER: Final[Any] = c.Struct(
    "magic" / c.Bytes(4),
    "version" / c.Int32ul,
    "flags" / c.Int32ul,
    "capacity" / c.Int64ul,
    "grain_size" / c.Int64ul,
    "descriptor_offset" / c.Int64ul,
    "descriptor_size" / c.Int64ul,
    "table_entries" / c.Int32ul,
    "redundant_offset" / c.Int64ul,
    "directory_offset" / c.Int64ul,
    "overhead" / c.Int64ul,
    "unclean" / c.Int8ul,
    "newlines" / c.Bytes(4),
    "compression" / c.Int16ul,
    "padding" / c.Padding(433),
)
UNCLEAN_AT: Final = 72
"""Where ``uncleanShutdown`` is in the header's sector."""

COWD_HEADER: Final[Any] = c.Struct(
    "magic" / c.Bytes(4),
    "version" / c.Int32ul,
    "flags" / c.Int32ul,
    "capacity" / c.Int32ul,
    "grain_size" / c.Int32ul,
    "directory_offset" / c.Int32ul,
    "directory_entries" / c.Int32ul,
    "next_free" / c.Int32ul,
)

SESPARSE_HEADER: Final[Any] = c.Struct(
    "magic" / c.Bytes(8),
    "version" / c.Int64ul,
    "capacity" / c.Int64ul,
    "grain_size" / c.Int64ul,
    "table_size" / c.Int64ul,
    "flags" / c.Int64ul,
    "reserved" / c.Array(4, c.Int64ul),
    "volatile_offset" / c.Int64ul,
    "volatile_size" / c.Int64ul,
    "journal_header_offset" / c.Int64ul,
    "journal_header_size" / c.Int64ul,
    "journal_offset" / c.Int64ul,
    "journal_size" / c.Int64ul,
    "directory_offset" / c.Int64ul,
    "directory_size" / c.Int64ul,
    "tables_offset" / c.Int64ul,
    "tables_size" / c.Int64ul,
    "free_bitmap_offset" / c.Int64ul,
    "free_bitmap_size" / c.Int64ul,
    "backmap_offset" / c.Int64ul,
    "backmap_size" / c.Int64ul,
    "grains_offset" / c.Int64ul,
    "grains_size" / c.Int64ul,
    "padding" / c.Padding(304),
)
SESPARSE_VOLATILE: Final[Any] = c.Struct(
    "magic" / c.Bytes(8),
    "free_table" / c.Int64ul,
    "next_transaction" / c.Int64ul,
    "replay_journal" / c.Int64ul,
)
SESPARSE_VOLATILE_MAGIC: Final = b"\xfe\xca\xfe\xca\0\0\0\0"
SESPARSE_GRAIN: Final = 4096
SESPARSE_TABLE: Final = 64 * SECTOR_SIZE
SESPARSE_TABLE_ENTRIES: Final = SESPARSE_TABLE // 8

MARKER: Final[Any] = c.Struct("value" / c.Int64ul, "size" / c.Int32ul, "type" / c.Int32ul, "padding" / c.Padding(496))
"""A marker that is no grain: ``size`` 0, ``value`` the sectors that follow it."""
GRAIN_MARKER: Final[Any] = c.Struct("sector" / c.Int64ul, "size" / c.Int32ul)
"""In front of a compressed grain: the guest sector where it begins, and the bytes of the stream behind the marker."""
GRAIN_MARKER_BYTES: Final = 12


@dataclass(frozen=True, slots=True)
class SparseHeader:
    """The header of a sparse extent of any form, checked against the size of its file. Everything in bytes."""

    kind: bytes
    """KDMV, COWD or SESPARSE."""
    version: int
    flags: int
    capacity: int
    """Guest bytes of the extent; 0: the file is only a descriptor."""
    grain_size: int
    table_entries: int
    """Grains per grain table."""
    directory_offset: int
    directory_entries: int
    redundant_offset: int = 0
    """Of the other grain directory, whose tables are copies; 0: there is none."""
    descriptor_offset: int = 0
    descriptor_size: int = 0
    overhead: int = 0
    """Bytes of metadata in front of the first grain."""
    unclean: bool = False
    compressed: bool = False
    markers: bool = False
    tables_offset: int = 0
    """seSparse: where the area of grain tables begins,"""
    grains_offset: int = 0
    """and that of grains."""

    @property
    def zeroed_grains(self) -> bool:
        """A table entry of 1 is a grain that reads as zeroes."""
        return bool(self.flags & FLAG_ZEROED_GRAINS)

    @property
    def entry_size(self) -> int:
        """Bytes of an entry of directory and tables."""
        return 8 if self.kind == SESPARSE else 4

    @property
    def table_bytes(self) -> int:
        """Of one grain table."""
        return self.table_entries * self.entry_size

    @property
    def coverage(self) -> int:
        """Guest bytes one grain table maps."""
        return self.table_entries * self.grain_size

    @property
    def is_hosted(self) -> bool:
        """The form VMware's hosted products and QEMU write."""
        return self.kind == KDMV


def wants_footer(sector: bytes | bytearray, path: str) -> bool:
    """Whether the header in ``sector``, of a hosted extent, says that the footer has the places."""
    return int(_hosted_fields(sector, path).directory_offset) == DIRECTORY_AT_END


def parse_footer(tail: bytes | bytearray, path: str) -> bytes:
    """The header that ``tail``, the last three sectors of a file, holds between a footer and an end marker."""
    marker, sector = MARKER.parse(tail[:SECTOR_SIZE]), bytes(tail[SECTOR_SIZE : 2 * SECTOR_SIZE])
    if marker.size or marker.type != MARKER_FOOTER:
        raise CorruptImageError(path, "no footer marker at the end of the file", field="footer", value=marker.type)
    if sector[:4] != KDMV:
        raise CorruptImageError(path, "the footer is no header", field="footer", value=sector[:4])
    end = MARKER.parse(tail[2 * SECTOR_SIZE :])
    if end.value or end.size or end.type != MARKER_END:
        raise CorruptImageError(path, "no end-of-stream marker at the end", field="footer", value=end.type)
    return sector


def _hosted_fields(sector: bytes | bytearray, path: str) -> Any:
    if len(sector) < SECTOR_SIZE:
        raise CorruptImageError(path, "too short for a VMDK header", field="file size", value=len(sector))
    fields = HEADER.parse(sector)
    if fields.magic != KDMV:
        raise CorruptImageError(path, "no sparse extent", field="magic", value=fields.magic)
    return fields


def parse_hosted(sector: bytes | bytearray, path: str, file_size: int) -> SparseHeader:
    """The header of a hosted extent. CorruptImageError and UnsupportedImageError name field and value."""
    fields = _hosted_fields(sector, path)
    if not 1 <= fields.version <= 3:
        raise UnsupportedImageError(path, "versions 1 to 3 are known", field="version", value=fields.version)
    if fields.flags & FLAG_NEWLINES and fields.newlines != NEWLINES:
        raise CorruptImageError(
            path, "damaged by a transfer as text", field="newline detection", value=bytes(fields.newlines)
        )
    if fields.compression not in (COMPRESSION_NONE, COMPRESSION_DEFLATE):
        raise UnsupportedImageError(
            path, "0 (none) and 1 (deflate) are known", field="compressAlgorithm", value=fields.compression
        )
    if fields.descriptor_offset:
        inside(path, "descriptorOffset", fields.descriptor_offset, fields.descriptor_size * SECTOR_SIZE, file_size)
    common = {
        "kind": KDMV,
        "version": fields.version,
        "flags": fields.flags,
        "descriptor_offset": fields.descriptor_offset * SECTOR_SIZE,
        "descriptor_size": fields.descriptor_size * SECTOR_SIZE,
    }
    if not fields.capacity:
        return SparseHeader(
            **common, capacity=0, grain_size=0, table_entries=0, directory_offset=0, directory_entries=0
        )
    entries = _check_geometry(path, fields.capacity, fields.grain_size, fields.table_entries, TABLE_ENTRIES)
    inside(path, "gdOffset", fields.directory_offset, entries * 4, file_size, required=True)
    redundant = 0
    if fields.flags & FLAG_REDUNDANT:
        inside(path, "rgdOffset", fields.redundant_offset, entries * 4, file_size, required=True)
        redundant = fields.redundant_offset * SECTOR_SIZE
    if fields.overhead * SECTOR_SIZE > file_size:
        raise CorruptImageError(
            path, f"reaches past the end of the file of {file_size} bytes", field="overHead", value=fields.overhead
        )
    return SparseHeader(
        **common,
        capacity=fields.capacity * SECTOR_SIZE,
        grain_size=fields.grain_size * SECTOR_SIZE,
        table_entries=fields.table_entries,
        directory_offset=fields.directory_offset * SECTOR_SIZE,
        directory_entries=entries,
        redundant_offset=redundant,
        overhead=fields.overhead * SECTOR_SIZE,
        unclean=bool(fields.unclean),
        compressed=fields.compression == COMPRESSION_DEFLATE,
        markers=bool(fields.flags & FLAG_MARKERS),
    )


def parse_cowd(sector: bytes | bytearray, path: str, file_size: int) -> SparseHeader:
    """The header of an ESX sparse extent."""
    if len(sector) < COWD_HEADER.sizeof():
        raise CorruptImageError(path, "too short for a COWD header", field="file size", value=file_size)
    fields = COWD_HEADER.parse(sector)
    if fields.magic != COWD:
        raise CorruptImageError(path, "no ESX sparse extent", field="magic", value=fields.magic)
    if fields.version != 1:
        raise UnsupportedImageError(path, "version 1 is known", field="version", value=fields.version)
    if not fields.capacity:
        raise CorruptImageError(path, "must not be 0", field="numSectors", value=0)
    entries = _check_geometry(path, fields.capacity, fields.grain_size, COWD_TABLE_ENTRIES, COWD_TABLE_ENTRIES)
    if fields.directory_entries < entries:
        raise CorruptImageError(path, f"the disk needs {entries}", field="numGDEntries", value=fields.directory_entries)
    inside(path, "gdOffset", fields.directory_offset, entries * 4, file_size, required=True)
    return SparseHeader(
        kind=COWD,
        version=fields.version,
        flags=0,
        capacity=fields.capacity * SECTOR_SIZE,
        grain_size=fields.grain_size * SECTOR_SIZE,
        table_entries=COWD_TABLE_ENTRIES,
        directory_offset=fields.directory_offset * SECTOR_SIZE,
        directory_entries=entries,
    )


def volatile_offset(sector: bytes | bytearray, path: str, file_size: int) -> int:
    """Where the volatile header of a space-efficient extent is, bytes."""
    fields = _sesparse_fields(sector, path)
    inside(path, "volatile header offset", fields.volatile_offset, SECTOR_SIZE, file_size, required=True)
    return int(fields.volatile_offset) * SECTOR_SIZE


def _sesparse_fields(sector: bytes | bytearray, path: str) -> Any:
    if len(sector) < SECTOR_SIZE:
        raise CorruptImageError(path, "too short for a seSparse header", field="file size", value=len(sector))
    fields = SESPARSE_HEADER.parse(sector)
    if fields.magic != SESPARSE:
        raise CorruptImageError(path, "no space-efficient extent", field="magic", value=fields.magic)
    return fields


def parse_sesparse(sector: bytes | bytearray, volatile: bytes | bytearray, path: str, file_size: int) -> SparseHeader:
    """The headers of a space-efficient extent; ``volatile`` is the sector at ``volatile_offset``."""
    fields = _sesparse_fields(sector, path)
    if fields.version != SESPARSE_VERSION:
        raise UnsupportedImageError(path, "version 2.1 is known", field="version", value=fields.version)
    if fields.grain_size * SECTOR_SIZE != SESPARSE_GRAIN:
        raise UnsupportedImageError(path, "8 sectors are known", field="grain size", value=fields.grain_size)
    if fields.table_size * SECTOR_SIZE != SESPARSE_TABLE:
        raise UnsupportedImageError(path, "64 sectors are known", field="grain table size", value=fields.table_size)
    if fields.flags:
        raise UnsupportedImageError(path, "no flags are known", field="flags", value=fields.flags)
    if any(fields.reserved):
        raise UnsupportedImageError(path, "reserved fields are in use", field="reserved", value=list(fields.reserved))
    if not fields.capacity:
        raise CorruptImageError(path, "must not be 0", field="capacity", value=0)
    entries = _check_geometry(
        path, fields.capacity, fields.grain_size, SESPARSE_TABLE_ENTRIES, SESPARSE_TABLE_ENTRIES, entry_size=8
    )
    inside(path, "grain directory offset", fields.directory_offset, entries * 8, file_size, required=True)
    inside(path, "grain tables offset", fields.tables_offset, 0, file_size, required=True)
    inside(path, "grains offset", fields.grains_offset, 0, file_size, required=True)
    state = SESPARSE_VOLATILE.parse(volatile)
    if state.magic != SESPARSE_VOLATILE_MAGIC:
        raise CorruptImageError(path, "no volatile header", field="volatile magic", value=state.magic)
    if state.replay_journal:
        raise UnsupportedImageError(
            path, "its journal must be replayed first", field="replay journal", value=state.replay_journal
        )
    return SparseHeader(
        kind=SESPARSE,
        version=fields.version,
        flags=0,
        capacity=fields.capacity * SECTOR_SIZE,
        grain_size=SESPARSE_GRAIN,
        table_entries=SESPARSE_TABLE_ENTRIES,
        directory_offset=fields.directory_offset * SECTOR_SIZE,
        directory_entries=entries,
        tables_offset=fields.tables_offset * SECTOR_SIZE,
        grains_offset=fields.grains_offset * SECTOR_SIZE,
    )


def _check_geometry(
    path: str, capacity: int, grain: int, table_entries: int, most_entries: int, *, entry_size: int = 4
) -> int:
    """Grain directory entries of an extent whose sizes, in sectors, can be."""
    if capacity * SECTOR_SIZE > MAX_SIZE:
        raise CorruptImageError(path, f"more than {MAX_SIZE} bytes", field="capacity", value=capacity)
    if not is_power_of_two(grain) or grain * SECTOR_SIZE > MAX_GRAIN:
        raise CorruptImageError(
            path, f"must be a power of two up to {MAX_GRAIN // SECTOR_SIZE} sectors", field="grainSize", value=grain
        )
    if not is_power_of_two(table_entries) or table_entries > most_entries:
        raise CorruptImageError(
            path, f"must be a power of two up to {most_entries}", field="numGTEsPerGT", value=table_entries
        )
    entries = div_ceil(capacity, grain * table_entries)
    if entries * entry_size > MAX_DIRECTORY_BYTES:
        raise CorruptImageError(
            path,
            f"needs a grain directory of {entries} entries, more than {MAX_DIRECTORY_BYTES} bytes",
            field="capacity",
            value=capacity,
        )
    return entries


def inside(path: str, field: str, sector: int, length: int, file_size: int, *, required: bool = False) -> None:
    """CorruptImageError unless ``length`` bytes at ``sector`` are in the file; 0 only if not ``required``."""
    if required and not sector:
        raise CorruptImageError(path, "must not be 0", field=field, value=sector)
    if sector * SECTOR_SIZE + length > file_size:
        raise CorruptImageError(
            path, f"{length} bytes there do not fit into the file of {file_size}", field=field, value=sector
        )


@dataclass(frozen=True, slots=True)
class HostedLayout:
    """Where the parts of a new hosted extent go; bytes. The descriptor has 20 sectors behind the header's."""

    capacity: int
    grain_size: int
    directory_entries: int
    redundant_offset: int
    redundant_tables: int
    directory_offset: int
    tables: int
    overhead: int


def plan_hosted(capacity: int, grain_size: int = 64 << 10) -> HostedLayout:
    """The redundant directory and its tables, then the directory and its tables, then the grains, as QEMU has it."""
    tables = div_ceil(capacity, grain_size * TABLE_ENTRIES)
    directory_bytes = div_ceil(tables * 4, SECTOR_SIZE) * SECTOR_SIZE
    tables_bytes = tables * TABLE_ENTRIES * 4
    redundant = DESCRIPTOR_OFFSET + DESCRIPTOR_BYTES
    directory = redundant + directory_bytes + tables_bytes
    end = directory + directory_bytes + tables_bytes
    return HostedLayout(
        capacity=capacity,
        grain_size=grain_size,
        directory_entries=tables,
        redundant_offset=redundant,
        redundant_tables=redundant + directory_bytes,
        directory_offset=directory,
        tables=directory + directory_bytes,
        overhead=div_ceil(end, grain_size) * grain_size,
    )


def build_hosted(layout: HostedLayout, *, compressed: bool, zeroed_grains: bool) -> bytes:
    """The header's sector of a new extent."""
    flags = FLAG_NEWLINES | FLAG_REDUNDANT | FLAG_ZEROED_GRAINS * zeroed_grains
    if compressed:
        flags |= FLAG_COMPRESSED | FLAG_MARKERS
    sector: bytes = HEADER.build(
        {
            "magic": KDMV,
            "version": 3 if compressed else 2 if zeroed_grains else 1,
            "flags": flags,
            "capacity": layout.capacity // SECTOR_SIZE,
            "grain_size": layout.grain_size // SECTOR_SIZE,
            "descriptor_offset": DESCRIPTOR_OFFSET // SECTOR_SIZE,
            "descriptor_size": DESCRIPTOR_BYTES // SECTOR_SIZE,
            "table_entries": TABLE_ENTRIES,
            "redundant_offset": layout.redundant_offset // SECTOR_SIZE,
            "directory_offset": layout.directory_offset // SECTOR_SIZE,
            "overhead": layout.overhead // SECTOR_SIZE,
            "unclean": 0,
            "newlines": NEWLINES,
            "compression": COMPRESSION_DEFLATE if compressed else COMPRESSION_NONE,
        }
    )
    return sector
