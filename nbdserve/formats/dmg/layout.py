"""The bytes of an Apple disk image (UDIF), all integers big endian. Apple has published no specification.

The last 512 bytes, "koly", say where the tables are: in a property list, each as base64 text in a ``<data>`` element,
or, in old images, as resources of a resource fork. A table ("mish") has one row of 40 bytes per chunk: a range of the
disk, and how and where its content is stored.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import construct as c
import numpy as np
import numpy.typing as npt

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.extents import Int64Array
from nbdserve.units import MIB, SECTOR_SIZE

KOLY_SIZE: Final = 512
KOLY_MAGIC: Final = b"koly"
MISH_MAGIC: Final = b"mish"
ENCRYPTED_MAGIC: Final = b"encrcdsa"

ZERO_FILL: Final = 0
RAW: Final = 1
IGNORED: Final = 2
ADC: Final = 0x8000_0004
ZLIB: Final = 0x8000_0005
BZIP2: Final = 0x8000_0006
LZFSE: Final = 0x8000_0007
COMMENT: Final = 0x7FFF_FFFE
END: Final = 0xFFFF_FFFF
COMPRESSED_TYPES: Final = (ADC, ZLIB, BZIP2, LZFSE)

MAX_CHUNK: Final = 16 * MIB
"""Bytes of a compressed chunk, stored or not; hdiutil makes them of 256 KiB or 1 MiB."""
MAX_ADC_CHUNK: Final = MIB
"""ADC is expanded in Python, at 0.7 s for the worst MiB."""
MAX_SECTORS: Final = 1 << 52
MAX_TABLES: Final = 16 * MIB
"""Bytes of property list or resource fork: tables of 300 000 chunks."""
MAX_TABLE_COUNT: Final = 1024
"""There is one for each partition, and for each gap between them."""

KOLY: Final[Any] = c.Struct(
    "magic" / c.Bytes(4),
    "version" / c.Int32ub,
    "header_size" / c.Int32ub,
    "flags" / c.Int32ub,
    "running_data_fork_offset" / c.Int64ub,
    "data_fork_offset" / c.Int64ub,
    "data_fork_length" / c.Int64ub,
    "rsrc_fork_offset" / c.Int64ub,
    "rsrc_fork_length" / c.Int64ub,
    "segment_number" / c.Int32ub,
    "segment_count" / c.Int32ub,
    "segment_id" / c.Bytes(16),
    "data_checksum" / c.Bytes(136),
    "xml_offset" / c.Int64ub,
    "xml_length" / c.Int64ub,
    "reserved_1" / c.Bytes(120),
    "master_checksum" / c.Bytes(136),
    "image_variant" / c.Int32ub,
    "sector_count" / c.Int64ub,
    "reserved_2" / c.Bytes(12),
)
MISH: Final[Any] = c.Struct(
    "magic" / c.Bytes(4),
    "version" / c.Int32ub,
    "first_sector" / c.Int64ub,
    "sector_count" / c.Int64ub,
    "data_offset" / c.Int64ub,
    "buffers_needed" / c.Int32ub,
    "descriptor" / c.Int32ub,
    "reserved" / c.Bytes(24),
    "checksum" / c.Bytes(136),
    "chunk_count" / c.Int32ub,
)
RESOURCES: Final[Any] = c.Struct("data_offset" / c.Int32ub, "map_offset" / c.Int32ub, "data_length" / c.Int32ub)
"""The start of a resource fork (Inside Macintosh, "Resource File Format"); each resource is a u32 length and data."""
CHUNK: Final = np.dtype(
    [("type", ">u4"), ("comment", ">u4"), ("sector", ">u8"), ("count", ">u8"), ("offset", ">u8"), ("length", ">u8")]
)
_DATA_ELEMENT: Final = re.compile(rb"<data>([A-Za-z0-9+/=\s]*)</data>")


@dataclass(frozen=True, slots=True)
class Trailer:
    """What "koly" says. Bytes and file offsets."""

    size: int
    """Of the disk."""
    data_offset: int
    """What offsets of chunks count from."""
    rsrc: tuple[int, int] | None
    """Offset and length of the resource fork."""
    xml: tuple[int, int] | None
    """Offset and length of the property list."""

    @classmethod
    def parse(cls, data: bytes, at: int, path: str) -> Trailer:
        """The trailer in ``data``, 512 bytes at the file offset ``at``. The tables are in front of it; ImageError."""
        fields = KOLY.parse(data)
        if fields.segment_count > 1:
            raise UnsupportedImageError(
                path, "an image in several files", field="segment_count", value=fields.segment_count
            )
        if fields.sector_count >= MAX_SECTORS:
            raise CorruptImageError(path, "too many", field="sector_count", value=fields.sector_count)
        if fields.data_fork_offset > at:
            raise CorruptImageError(
                path, "behind the end of the file", field="data_fork_offset", value=fields.data_fork_offset
            )
        rsrc = _place(fields.rsrc_fork_offset, fields.rsrc_fork_length, at, path, "rsrc_fork")
        xml = _place(fields.xml_offset, fields.xml_length, at, path, "xml")
        if rsrc is None and xml is None:
            raise CorruptImageError(path, "there are no tables", field="xml_length", value=0)
        return cls(fields.sector_count * SECTOR_SIZE, fields.data_fork_offset, rsrc, xml)


def _place(offset: int, length: int, end: int, path: str, name: str) -> tuple[int, int] | None:
    if not length:
        return None
    if length > MAX_TABLES:
        raise UnsupportedImageError(path, f"at most {MAX_TABLES} are read", field=f"{name}_length", value=length)
    if offset > end or length > end - offset:
        raise CorruptImageError(path, "it does not end inside the file", field=f"{name}_offset", value=offset)
    return offset, length


def tables_of_property_list(text: bytes | bytearray, path: str) -> Iterator[bytes]:
    """The content of each data element."""
    for match in _DATA_ELEMENT.finditer(text):
        try:
            yield base64.b64decode(match[1])
        except binascii.Error as error:
            raise CorruptImageError(path, f"{error}", field="<data>", value=match[1][:16]) from None


def tables_of_resource_fork(data: bytes | bytearray, path: str) -> Iterator[bytes]:
    """The data of each resource, of whatever type."""
    if len(data) < RESOURCES.sizeof():
        raise CorruptImageError(path, "too short for a resource fork", field="rsrc_fork_length", value=len(data))
    fields = RESOURCES.parse(bytes(data[: RESOURCES.sizeof()]))
    at = fields.data_offset
    end = at + fields.data_length
    if end > len(data):
        raise CorruptImageError(
            path, "the resources do not end inside the fork", field="resource data length", value=fields.data_length
        )
    while at < end:
        length = int.from_bytes(data[at : at + 4], "big")
        if not 0 < length <= end - at - 4:
            raise CorruptImageError(path, f"at {at:#x} of the fork", field="resource length", value=length)
        yield bytes(data[at + 4 : at + 4 + length])
        at += 4 + length


@dataclass(slots=True)
class Chunks:
    """The chunks of a disk in columns, in order; no two of them overlap."""

    start: Int64Array
    """Guest offset."""
    length: Int64Array
    kind: npt.NDArray[np.uint32]
    """ZERO_FILL, RAW, ..."""
    host_offset: Int64Array
    stored: Int64Array
    """Bytes of the stored form."""

    @classmethod
    def collect(cls, tables: Iterator[bytes], trailer: Trailer, file_size: int, path: str) -> Chunks:
        """The chunks of all tables; data that is no table is passed over. ImageError naming the field at fault."""
        parts: list[_Rows] = []
        for table in tables:
            if table.startswith(MISH_MAGIC):
                if len(parts) == MAX_TABLE_COUNT:
                    raise UnsupportedImageError(
                        path, f"more than {MAX_TABLE_COUNT} tables of chunks", field="mish", value=table[:16]
                    )
                parts.append(_rows(table, trailer, path))
        if not parts:
            raise CorruptImageError(path, "there is no table of chunks", field="mish", value=b"")
        rows = np.concatenate(parts)
        rows = rows[np.argsort(rows["sector"], kind="stable")]
        _check_rows(rows, trailer, file_size, path)
        start = rows["sector"].astype(np.int64) * SECTOR_SIZE
        length = rows["count"].astype(np.int64) * SECTOR_SIZE
        return cls(
            start,
            length,
            rows["type"].astype(np.uint32),
            rows["offset"].astype(np.int64),
            rows["length"].astype(np.int64),
        )


_Rows = npt.NDArray[np.void]


def _rows(table: bytes, trailer: Trailer, path: str) -> _Rows:
    """The chunks of one table, with disk sectors and file offsets; comments, the end mark and empty ones left out."""
    if len(table) < MISH.sizeof():
        raise CorruptImageError(path, "too short for a table of chunks", field="mish", value=table[:16])
    head = MISH.parse(table[: MISH.sizeof()])
    count = (len(table) - MISH.sizeof()) // CHUNK.itemsize
    stored = np.frombuffer(table, CHUNK, count=count, offset=MISH.sizeof())
    rows: _Rows = stored[(stored["type"] != COMMENT) & (stored["type"] != END) & (stored["count"] != 0)]
    base = trailer.data_offset + head.data_offset
    for name, added in (("sector", head.first_sector), ("offset", base)):
        _refuse(rows, rows[name] >= np.uint64(MAX_SECTORS), name, path, "out of range")
        if added >= MAX_SECTORS:
            field = "first_sector" if name == "sector" else "data_offset"
            raise CorruptImageError(path, "out of range", field=field, value=added)
        rows[name] += np.uint64(added)
    return rows


def _refuse(rows: _Rows, bad: npt.NDArray[np.bool_], name: str, path: str, problem: str) -> None:
    if bad.any():
        row = rows[int(bad.argmax())]
        raise CorruptImageError(
            path, f"{problem} (chunk of disk sector {int(row['sector'])})", field=f"chunk {name}", value=int(row[name])
        )


def _check_rows(rows: _Rows, trailer: Trailer, file_size: int, path: str) -> None:
    kind = rows["type"]
    known = np.isin(kind, (ZERO_FILL, RAW, IGNORED, *COMPRESSED_TYPES))
    if not known.all():
        value = int(kind[int(known.argmin())])
        raise UnsupportedImageError(path, "not a type of chunk that is known", field="chunk type", value=value)
    _refuse(rows, rows["count"] >= np.uint64(MAX_SECTORS), "count", path, "out of range")
    end = rows["sector"][:-1] + rows["count"][:-1]
    _refuse(rows[1:], rows["sector"][1:] < end, "sector", path, "two chunks overlap")
    compressed = np.isin(kind, COMPRESSED_TYPES)
    _refuse(rows, compressed & (rows["count"] > MAX_CHUNK // SECTOR_SIZE), "count", path, f"at most {MAX_CHUNK} bytes")
    _refuse(rows, compressed & (rows["length"] > MAX_CHUNK), "length", path, f"at most {MAX_CHUNK}")
    too_slow = (kind == ADC) & (rows["count"] > MAX_ADC_CHUNK // SECTOR_SIZE)
    _refuse(rows, too_slow, "count", path, f"at most {MAX_ADC_CHUNK} bytes of ADC")
    _refuse(
        rows, (kind == RAW) & (rows["length"] >> 9 < rows["count"]), "length", path, "fewer bytes than the disk has"
    )
    stored = compressed | (kind == RAW)
    room = np.maximum(file_size - rows["offset"].astype(np.int64), -1)
    outside = (room < 0) | (rows["length"] > np.maximum(room, 0).astype(np.uint64))
    _refuse(rows, stored & outside, "offset", path, f"it does not end inside the file of {file_size} bytes")
