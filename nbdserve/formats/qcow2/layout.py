"""The bytes of a qcow2 image, both ways (QEMU docs/interop/qcow2.rst; all integers are big endian).

Header with its extensions, and the bits of table entries. Pure: nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.units import MIB, div_ceil

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
REFCOUNT_TABLE_FIELDS_AT: Final = 48
"""``refcount_table_offset`` (u64), ``refcount_table_clusters`` (u32)."""
INCOMPATIBLE_AT: Final = 72
AUTOCLEAR_AT: Final = 88


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the bitmap directory is: ``count`` entries in ``directory_size`` bytes."""

    count: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """The image header with its extensions, checked against itself and the file's size."""

    version: int
    cluster_bits: int
    size: int
    """Virtual size, bytes."""
    l1_offset: int
    l1_entries: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    crypt_method: int = CRYPT_NONE
    compression_type: int = COMPRESSION_ZLIB
    header_length: int = HEADER_V3_LENGTH
    backing_name: str | None = None
    """As stored, decoded as UTF-8 with surrogateescape."""
    extensions: tuple[tuple[int, bytes], ...] = ()
    """``(type, data)`` of every header extension in file order, unknown ones included."""
    extra: bytes = b""
    """Header fields past byte 112, kept as they are."""

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """L2 entries are 16 bytes, with a bitmap of 32 subclusters."""
        return bool(self.incompatible & INCOMPATIBLE_EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Data clusters are in an external file."""
        return bool(self.incompatible & INCOMPATIBLE_DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        """The external data file, read as raw, is the guest's disk."""
        return self.has_data_file and bool(self.autoclear & AUTOCLEAR_DATA_FILE_RAW)

    @property
    def l2_entry_size(self) -> int:
        """Bytes: 8, or 16 with extended L2 entries."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table, which is always one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def l2_coverage(self) -> int:
        """Guest bytes one L1 entry stands for."""
        return self.cluster_size * self.l2_entries

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount: 1, 2, 4, ... 64."""
        return 1 << self.refcount_order

    @property
    def refcount_block_entries(self) -> int:
        """Clusters one refcount block counts."""
        return self.cluster_size * 8 // self.refcount_bits

    @property
    def refcount_table_entries(self) -> int:
        """Refcount blocks the refcount table has room for."""
        return self.refcount_table_clusters * self.cluster_size // 8

    @property
    def backing_format(self) -> str | None:
        """The declared format of the backing file."""
        return self._text(EXTENSION_BACKING_FORMAT)

    @property
    def data_file_name(self) -> str | None:
        """The external data file as the header names it."""
        return self._text(EXTENSION_DATA_FILE)

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """The bitmap directory; None without one, or when it is malformed."""
        data = self.extension(EXTENSION_BITMAPS)
        if data is None or len(data) < BITMAPS_EXTENSION.sizeof():
            return None
        fields = BITMAPS_EXTENSION.parse(data)
        return BitmapsExtension(fields.count, fields.directory_size, fields.directory_offset)

    @property
    def luks_area(self) -> tuple[int, int] | None:
        """``(host_offset, length)`` of the LUKS header with its key material; None without one, or when malformed."""
        data = self.extension(EXTENSION_LUKS)
        if data is None or len(data) != LUKS_EXTENSION.sizeof():
            return None
        fields = LUKS_EXTENSION.parse(data)
        return fields.offset, fields.length

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of type ``kind``."""
        return next((data for found, data in self.extensions if found == kind), None)

    def _text(self, kind: int) -> str | None:
        data = self.extension(kind)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str, file_size: int) -> Header:
        """The header in ``data``, the first cluster of the file (or its first 512 bytes and whatever else is at hand).

        ``file_size`` in bytes bounds every table. CorruptImageError and UnsupportedImageError name field and value.
        """
        data = bytes(data)
        if len(data) < HEADER_V2_LENGTH:
            raise CorruptImageError(
                path, "the file is too short for a qcow2 header", field="file size", value=file_size
            )
        fields = HEADER_V2.parse(data)
        if fields.magic != MAGIC:
            raise CorruptImageError(path, "not a qcow2 image", field="magic", value=fields.magic)
        if fields.version not in (2, 3):
            raise UnsupportedImageError(path, "versions 2 and 3 are known", field="version", value=fields.version)
        in_range(path, "cluster_bits", fields.cluster_bits, MIN_CLUSTER_BITS, MAX_CLUSTER_BITS)
        features = (0, 0, 0)
        refcount_order, length, compression, extra = 4, HEADER_V2_LENGTH, COMPRESSION_ZLIB, b""
        if fields.version == 3:
            if len(data) < HEADER_V3_MIN_LENGTH:
                raise CorruptImageError(
                    path, "the file is too short for a version 3 header", field="file size", value=file_size
                )
            more = HEADER_V3.parse(data[HEADER_V2_LENGTH:])
            features = (more.incompatible, more.compatible, more.autoclear)
            refcount_order, length = more.refcount_order, more.header_length
            in_range(path, "header_length", length, HEADER_V3_MIN_LENGTH, min(1 << fields.cluster_bits, len(data)))
            if length >= HEADER_V3_LENGTH:
                compression = data[HEADER_V3_MIN_LENGTH]
                extra = data[HEADER_V3_LENGTH:length]
        extensions, backing = _parse_tail(path, data[: 1 << fields.cluster_bits], length, fields)
        header = cls(
            version=fields.version,
            cluster_bits=fields.cluster_bits,
            size=fields.size,
            l1_offset=fields.l1_offset,
            l1_entries=fields.l1_entries,
            refcount_table_offset=fields.refcount_table_offset,
            refcount_table_clusters=fields.refcount_table_clusters,
            snapshot_count=fields.snapshot_count,
            snapshots_offset=fields.snapshots_offset,
            incompatible=features[0],
            compatible=features[1],
            autoclear=features[2],
            refcount_order=refcount_order,
            crypt_method=fields.crypt_method,
            compression_type=compression,
            header_length=length,
            backing_name=backing,
            extensions=extensions,
            extra=extra,
        )
        header._check_features(path)
        header._check_encryption(path, file_size)
        header._check_tables(path, file_size)
        return header

    def _check_features(self, path: str) -> None:
        if unknown := self.incompatible & ~INCOMPATIBLE_KNOWN:
            bits = [bit for bit in range(64) if unknown >> bit & 1]
            names = ", ".join(map(self._feature_name, bits[:4])) + (", ..." if len(bits) > 4 else "")
            raise UnsupportedImageError(
                path, f"unknown features: {names}", field="incompatible_features", value=unknown
            )
        if self.extended_l2:
            in_range(path, "cluster_bits", self.cluster_bits, MIN_EXTENDED_CLUSTER_BITS, MAX_CLUSTER_BITS)
        in_range(path, "refcount_order", self.refcount_order, 0, 6)
        if self.compression_type not in COMPRESSION_NAMES:
            raise UnsupportedImageError(
                path, "0 (zlib) and 1 (zstd) are known", field="compression_type", value=self.compression_type
            )
        if bool(self.incompatible & INCOMPATIBLE_COMPRESSION) != (self.compression_type != COMPRESSION_ZLIB):
            raise CorruptImageError(
                path, "contradicts incompatible feature bit 3", field="compression_type", value=self.compression_type
            )

    def _check_encryption(self, path: str, file_size: int) -> None:
        if self.crypt_method not in (CRYPT_NONE, *CRYPT_NAMES):
            raise UnsupportedImageError(
                path, "1 (AES) and 2 (LUKS) are known", field="crypt_method", value=self.crypt_method
            )
        area = self.luks_area
        if (self.extension(EXTENSION_LUKS) is not None) != (self.crypt_method == CRYPT_LUKS):
            raise CorruptImageError(
                path,
                "LUKS encryption and its header extension go together",
                field="crypt_method",
                value=self.crypt_method,
            )
        if self.crypt_method != CRYPT_LUKS:
            return
        if area is None:
            raise CorruptImageError(
                path,
                f"must be {LUKS_EXTENSION.sizeof()}",
                field="length of the LUKS header extension",
                value=len(self.extension(EXTENSION_LUKS) or b""),
            )
        offset, length = area
        in_range(path, "LUKS header length", length, 1, MAX_LUKS_BYTES)
        table_inside(path, "LUKS header offset", offset, length, cluster_size=self.cluster_size, file_size=file_size)

    def _check_tables(self, path: str, file_size: int) -> None:
        inside = {"cluster_size": self.cluster_size, "file_size": file_size}
        if self.size >= 1 << 63:
            raise CorruptImageError(path, "must be less than 2^63", field="size", value=self.size)
        if self.l1_entries * 8 > MAX_L1_BYTES:
            raise CorruptImageError(path, "the L1 table is limited to 32 MiB", field="l1_size", value=self.l1_entries)
        if self.l1_entries < div_ceil(self.size, self.l2_coverage):
            raise CorruptImageError(
                path, f"too small for a disk of {self.size} bytes", field="l1_size", value=self.l1_entries
            )
        table_inside(path, "l1_table_offset", self.l1_offset, self.l1_entries * 8, **inside)
        table_bytes = self.refcount_table_clusters * self.cluster_size
        if not 0 < table_bytes <= MAX_REFCOUNT_TABLE_BYTES:
            raise CorruptImageError(
                path,
                "the refcount table must have 1 byte to 8 MiB",
                field="refcount_table_clusters",
                value=self.refcount_table_clusters,
            )
        table_inside(path, "refcount_table_offset", self.refcount_table_offset, table_bytes, **inside)
        if self.snapshot_count > MAX_SNAPSHOTS:
            raise CorruptImageError(path, "at most 65536", field="nb_snapshots", value=self.snapshot_count)
        table_inside(
            path, "snapshots_offset", self.snapshots_offset, self.snapshot_count * MIN_SNAPSHOT_ENTRY, **inside
        )

    def _feature_name(self, bit: int) -> str:
        table = self.extension(EXTENSION_FEATURE_NAMES) or b""
        size = FEATURE_NAME.sizeof()
        for at in range(0, len(table) - size + 1, size):
            entry = FEATURE_NAME.parse(table[at : at + size])
            if entry.type == 0 and entry.bit == bit:
                name: str = entry.name.rstrip(b"\0").decode("utf-8", "replace")
                return f"bit {bit} ({name})"
        return f"bit {bit}"

    def build(self) -> bytes:
        """The header, its extensions and the backing file name. ValueError if they do not fit into one cluster."""
        extensions = b"".join(
            EXTENSION_HEAD.build({"type": kind, "length": len(data)}) + data + bytes(-len(data) % 8)
            for kind, data in self.extensions
        ) + bytes(EXTENSION_HEAD.sizeof())
        name = (self.backing_name or "").encode("utf-8", "surrogateescape")
        length = self.header_length if self.version == 3 else HEADER_V2_LENGTH
        fields = HEADER_V2.build(
            {
                "magic": MAGIC,
                "version": self.version,
                "backing_offset": length + len(extensions) if name else 0,
                "backing_length": len(name),
                "cluster_bits": self.cluster_bits,
                "size": self.size,
                "crypt_method": self.crypt_method,
                "l1_entries": self.l1_entries,
                "l1_offset": self.l1_offset,
                "refcount_table_offset": self.refcount_table_offset,
                "refcount_table_clusters": self.refcount_table_clusters,
                "snapshot_count": self.snapshot_count,
                "snapshots_offset": self.snapshots_offset,
            }
        )
        if self.version == 3:
            fields += HEADER_V3.build(
                {
                    "incompatible": self.incompatible,
                    "compatible": self.compatible,
                    "autoclear": self.autoclear,
                    "refcount_order": self.refcount_order,
                    "header_length": length,
                }
            )
            if length >= HEADER_V3_LENGTH:
                fields += HEADER_V3_COMPRESSION.build({"compression_type": self.compression_type}) + self.extra
        data: bytes = fields + extensions + name
        if len(name) > MAX_BACKING_NAME or len(data) > self.cluster_size:
            raise ValueError(
                f"the header needs {len(data)} bytes (backing file name: {len(name)}), "
                f"but a cluster has {self.cluster_size} and a name at most {MAX_BACKING_NAME}"
            )
        return data


def _parse_tail(path: str, cluster: bytes, start: int, fields: Any) -> tuple[tuple[tuple[int, bytes], ...], str | None]:
    """Header extensions, which begin at ``start``, and the backing file name behind them."""
    end, backing = len(cluster), None
    if fields.backing_offset:
        in_range(path, "backing_file_offset", fields.backing_offset, start, len(cluster))
        limit = min(MAX_BACKING_NAME, len(cluster) - fields.backing_offset)
        in_range(path, "backing_file_size", fields.backing_length, 0, limit)
        end = fields.backing_offset
        name = cluster[end : end + fields.backing_length]
        backing = name.decode("utf-8", "surrogateescape") or None
    extensions = []
    at, head = start, EXTENSION_HEAD.sizeof()
    while at + head <= end:
        extension = EXTENSION_HEAD.parse(cluster[at : at + head])
        if extension.type == EXTENSION_END:
            break
        at += head
        if extension.length > end - at:
            raise CorruptImageError(
                path,
                "reaches past the header's cluster",
                field=f"length of header extension {extension.type:#010x}",
                value=extension.length,
            )
        extensions.append((extension.type, cluster[at : at + extension.length]))
        at += extension.length + -extension.length % 8
    return tuple(extensions), backing


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
