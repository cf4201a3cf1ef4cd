"""The numbers of the qcow2 format (QEMU docs/interop/qcow2.rst; all integers are big endian).

Limits, feature bits, the bits of table entries, and the structures of the header. Pure: nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError
from nbdserve.units import MIB

MAGIC: Final = b"QFI\xfb"

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MIN_EXTENDED_CLUSTER_BITS: Final = 14
SUBCLUSTERS: Final = 32
"""Subclusters per cluster with extended L2 entries."""

# QEMU's limits: what is larger is no image that QEMU opens.
MAX_L1_BYTES: Final = 32 * MIB
MAX_REFCOUNT_TABLE_BYTES: Final = 8 * MIB
MAX_SNAPSHOTS: Final = 65536
MIN_SNAPSHOT_ENTRY: Final = 40
"""Bytes of a snapshot table entry before its extra data, id and name."""
MAX_BITMAPS: Final = 65535
MAX_LUKS_BYTES: Final = 16 * MIB
"""Eight times what the largest key makes of it."""
MAX_BACKING_NAME: Final = 1023

# Entries of L1 and (standard) L2 tables.
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9-55: host offset of an L2 table (L1) or a data cluster (L2)."""
COPIED: Final = 1 << 63
"""The refcount of what the entry points at is exactly 1: it may be written in place."""
COMPRESSED_FLAG: Final = 1 << 62
ZERO_FLAG: Final = 1
"""L2, version 3, not with extended entries: the cluster reads as zeroes, whatever its offset."""
L1_RESERVED: Final = ~(OFFSET_MASK | COPIED) & (1 << 64) - 1
L2_RESERVED: Final = ~(OFFSET_MASK | COPIED | COMPRESSED_FLAG | ZERO_FLAG) & (1 << 64) - 1
REFCOUNT_TABLE_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
MAX_HOST_OFFSET: Final = 1 << 56

# Feature bits.
INCOMPATIBLE_DIRTY: Final = 1 << 0
INCOMPATIBLE_CORRUPT: Final = 1 << 1
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
INCOMPATIBLE_COMPRESSION: Final = 1 << 3
INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4
INCOMPATIBLE_KNOWN: Final = 0b11111
COMPATIBLE_LAZY_REFCOUNTS: Final = 1 << 0
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_DATA_FILE_RAW: Final = 1 << 1
AUTOCLEAR_KNOWN: Final = 0b11

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2
CRYPT_NAMES: Final = {CRYPT_AES: "aes", CRYPT_LUKS: "luks"}

COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1
COMPRESSION_NAMES: Final = {COMPRESSION_ZLIB: "zlib", COMPRESSION_ZSTD: "zstd"}

# Header extension types.
EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_LUKS: Final = 0x0537BE77
EXTENSION_DATA_FILE: Final = 0x44415441

FEATURE_NAMES: Final = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
"""``(type, bit, name)`` of the feature name table, type 0 incompatible, 1 compatible, 2 autoclear."""

HEADER_V2: Final[Any] = c.Struct(
    "magic" / c.Bytes(4),
    "version" / c.Int32ub,
    "backing_offset" / c.Int64ub,
    "backing_length" / c.Int32ub,
    "cluster_bits" / c.Int32ub,
    "size" / c.Int64ub,
    "crypt_method" / c.Int32ub,
    "l1_entries" / c.Int32ub,
    "l1_offset" / c.Int64ub,
    "refcount_table_offset" / c.Int64ub,
    "refcount_table_clusters" / c.Int32ub,
    "snapshot_count" / c.Int32ub,
    "snapshots_offset" / c.Int64ub,
)
HEADER_V3: Final[Any] = c.Struct(
    "incompatible" / c.Int64ub,
    "compatible" / c.Int64ub,
    "autoclear" / c.Int64ub,
    "refcount_order" / c.Int32ub,
    "header_length" / c.Int32ub,
)
HEADER_V3_COMPRESSION: Final[Any] = c.Struct("compression_type" / c.Int8ub, "padding" / c.Padding(7))
EXTENSION_HEAD: Final[Any] = c.Struct("type" / c.Int32ub, "length" / c.Int32ub)
BITMAPS_EXTENSION: Final[Any] = c.Struct(
    "count" / c.Int32ub, "reserved" / c.Int32ub, "directory_size" / c.Int64ub, "directory_offset" / c.Int64ub
)
LUKS_EXTENSION: Final[Any] = c.Struct("offset" / c.Int64ub, "length" / c.Int64ub)
FEATURE_NAME: Final[Any] = c.Struct("type" / c.Int8ub, "bit" / c.Int8ub, "name" / c.Bytes(46))
HEADER_V2_LENGTH: Final = 72
HEADER_V3_MIN_LENGTH: Final = 104
HEADER_V3_LENGTH: Final = 112

# Where the fields are that change after creation: sector 0 is patched, never rewritten.
BACKING_NAME_AT: Final = 8
"""``backing_file_offset`` (u64), ``backing_file_size`` (u32)."""
SIZE_AT: Final = 24
L1_FIELDS_AT: Final = 36
"""``l1_size`` (u32), ``l1_table_offset`` (u64)."""
REFCOUNT_TABLE_FIELDS_AT: Final = 48
"""``refcount_table_offset`` (u64), ``refcount_table_clusters`` (u32)."""
INCOMPATIBLE_AT: Final = 72
AUTOCLEAR_AT: Final = 88
REFCOUNT_ORDER_AT: Final = 96


def in_range(path: str, field: str, value: int, low: int, high: int) -> None:
    """CorruptImageError unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise CorruptImageError(path, f"must be between {low} and {high}", field=field, value=value)


def table_inside(path: str, field: str, offset: int, length: int, *, cluster_size: int, file_size: int) -> None:
    """CorruptImageError unless ``length`` bytes (0: no table) at ``offset`` are cluster aligned and inside the file."""
    if length == 0:
        return
    if offset % cluster_size or offset == 0:
        raise CorruptImageError(path, "not aligned to a cluster", field=field, value=offset)
    if offset + length > file_size:
        raise CorruptImageError(
            path, f"{length} bytes there do not fit into the file of {file_size}", field=field, value=offset
        )


def feature_name_table(features: Iterable[tuple[int, int, str]] = FEATURE_NAMES) -> bytes:
    """The data of a feature name table extension."""
    return b"".join(
        FEATURE_NAME.build({"type": kind, "bit": bit, "name": name.encode().ljust(46, b"\0")})
        for kind, bit, name in features
    )


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """``(host_offset, length)`` in bytes of the stored form an L2 entry with COMPRESSED_FLAG describes.

    The length is an upper bound: it ends with a 512-byte sector that other data may share.
    """
    offset_bits = 62 - (cluster_bits - 8)
    host_offset = entry & (1 << offset_bits) - 1
    sectors = (entry & COMPRESSED_FLAG - 1) >> offset_bits
    return host_offset, (sectors + 1) * 512 - host_offset % 512


def compressed_entry(host_offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of compressed data of ``length`` bytes at ``host_offset``: the reverse of ``compressed_range``."""
    sectors = (host_offset + length - 1) // 512 - host_offset // 512
    return COMPRESSED_FLAG | sectors << 62 - (cluster_bits - 8) | host_offset
