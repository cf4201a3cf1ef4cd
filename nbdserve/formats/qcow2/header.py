"""The header of a qcow2 image with its extensions, both ways (QEMU docs/interop/qcow2.rst, "Header").

Pure: nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.formats.qcow2 import layout
from nbdserve.units import div_ceil


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
    crypt_method: int = layout.CRYPT_NONE
    compression_type: int = layout.COMPRESSION_ZLIB
    header_length: int = layout.HEADER_V3_LENGTH
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
        return bool(self.incompatible & layout.INCOMPATIBLE_EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Data clusters are in an external file."""
        return bool(self.incompatible & layout.INCOMPATIBLE_DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        """The external data file, read as raw, is the guest's disk."""
        return self.has_data_file and bool(self.autoclear & layout.AUTOCLEAR_DATA_FILE_RAW)

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
        return self._text(layout.EXTENSION_BACKING_FORMAT)

    @property
    def data_file_name(self) -> str | None:
        """The external data file as the header names it."""
        return self._text(layout.EXTENSION_DATA_FILE)

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """The bitmap directory; None without one, or when it is malformed."""
        data = self.extension(layout.EXTENSION_BITMAPS)
        if data is None or len(data) < layout.BITMAPS_EXTENSION.sizeof():
            return None
        fields = layout.BITMAPS_EXTENSION.parse(data)
        return BitmapsExtension(fields.count, fields.directory_size, fields.directory_offset)

    @property
    def luks_area(self) -> tuple[int, int] | None:
        """``(host_offset, length)`` of the LUKS header with its key material; None without one, or when malformed."""
        data = self.extension(layout.EXTENSION_LUKS)
        if data is None or len(data) != layout.LUKS_EXTENSION.sizeof():
            return None
        fields = layout.LUKS_EXTENSION.parse(data)
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
        if len(data) < layout.HEADER_V2_LENGTH:
            raise CorruptImageError(
                path, "the file is too short for a qcow2 header", field="file size", value=file_size
            )
        fields = layout.HEADER_V2.parse(data)
        if fields.magic != layout.MAGIC:
            raise CorruptImageError(path, "not a qcow2 image", field="magic", value=fields.magic)
        if fields.version not in (2, 3):
            raise UnsupportedImageError(path, "versions 2 and 3 are known", field="version", value=fields.version)
        layout.in_range(path, "cluster_bits", fields.cluster_bits, layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS)
        features = (0, 0, 0)
        refcount_order, length, compression, extra = 4, layout.HEADER_V2_LENGTH, layout.COMPRESSION_ZLIB, b""
        if fields.version == 3:
            if len(data) < layout.HEADER_V3_MIN_LENGTH:
                raise CorruptImageError(
                    path, "the file is too short for a version 3 header", field="file size", value=file_size
                )
            more = layout.HEADER_V3.parse(data[layout.HEADER_V2_LENGTH :])
            features = (more.incompatible, more.compatible, more.autoclear)
            refcount_order, length = more.refcount_order, more.header_length
            layout.in_range(
                path, "header_length", length, layout.HEADER_V3_MIN_LENGTH, min(1 << fields.cluster_bits, len(data))
            )
            if length >= layout.HEADER_V3_LENGTH:
                compression = data[layout.HEADER_V3_MIN_LENGTH]
                extra = data[layout.HEADER_V3_LENGTH : length]
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
        if unknown := self.incompatible & ~layout.INCOMPATIBLE_KNOWN:
            bits = [bit for bit in range(64) if unknown >> bit & 1]
            names = ", ".join(map(self._feature_name, bits[:4])) + (", ..." if len(bits) > 4 else "")
            raise UnsupportedImageError(
                path, f"unknown features: {names}", field="incompatible_features", value=unknown
            )
        if self.extended_l2:
            layout.in_range(
                path, "cluster_bits", self.cluster_bits, layout.MIN_EXTENDED_CLUSTER_BITS, layout.MAX_CLUSTER_BITS
            )
        layout.in_range(path, "refcount_order", self.refcount_order, 0, 6)
        if self.compression_type not in layout.COMPRESSION_NAMES:
            raise UnsupportedImageError(
                path, "0 (zlib) and 1 (zstd) are known", field="compression_type", value=self.compression_type
            )
        if bool(self.incompatible & layout.INCOMPATIBLE_COMPRESSION) != (
            self.compression_type != layout.COMPRESSION_ZLIB
        ):
            raise CorruptImageError(
                path, "contradicts incompatible feature bit 3", field="compression_type", value=self.compression_type
            )

    def _check_encryption(self, path: str, file_size: int) -> None:
        if self.crypt_method not in (layout.CRYPT_NONE, *layout.CRYPT_NAMES):
            raise UnsupportedImageError(
                path, "1 (AES) and 2 (LUKS) are known", field="crypt_method", value=self.crypt_method
            )
        area = self.luks_area
        if (self.extension(layout.EXTENSION_LUKS) is not None) != (self.crypt_method == layout.CRYPT_LUKS):
            raise CorruptImageError(
                path,
                "LUKS encryption and its header extension go together",
                field="crypt_method",
                value=self.crypt_method,
            )
        if self.crypt_method != layout.CRYPT_LUKS:
            return
        if area is None:
            raise CorruptImageError(
                path,
                f"must be {layout.LUKS_EXTENSION.sizeof()}",
                field="length of the LUKS header extension",
                value=len(self.extension(layout.EXTENSION_LUKS) or b""),
            )
        offset, length = area
        layout.in_range(path, "LUKS header length", length, 1, layout.MAX_LUKS_BYTES)
        layout.table_inside(
            path, "LUKS header offset", offset, length, cluster_size=self.cluster_size, file_size=file_size
        )

    def _check_tables(self, path: str, file_size: int) -> None:
        inside = {"cluster_size": self.cluster_size, "file_size": file_size}
        if self.size >= 1 << 63:
            raise CorruptImageError(path, "must be less than 2^63", field="size", value=self.size)
        if self.l1_entries * 8 > layout.MAX_L1_BYTES:
            raise CorruptImageError(path, "the L1 table is limited to 32 MiB", field="l1_size", value=self.l1_entries)
        if self.l1_entries < div_ceil(self.size, self.l2_coverage):
            raise CorruptImageError(
                path, f"too small for a disk of {self.size} bytes", field="l1_size", value=self.l1_entries
            )
        layout.table_inside(path, "l1_table_offset", self.l1_offset, self.l1_entries * 8, **inside)
        table_bytes = self.refcount_table_clusters * self.cluster_size
        if not 0 < table_bytes <= layout.MAX_REFCOUNT_TABLE_BYTES:
            raise CorruptImageError(
                path,
                "the refcount table must have 1 byte to 8 MiB",
                field="refcount_table_clusters",
                value=self.refcount_table_clusters,
            )
        layout.table_inside(path, "refcount_table_offset", self.refcount_table_offset, table_bytes, **inside)
        if self.snapshot_count > layout.MAX_SNAPSHOTS:
            raise CorruptImageError(path, "at most 65536", field="nb_snapshots", value=self.snapshot_count)
        layout.table_inside(
            path, "snapshots_offset", self.snapshots_offset, self.snapshot_count * layout.MIN_SNAPSHOT_ENTRY, **inside
        )

    def _feature_name(self, bit: int) -> str:
        table = self.extension(layout.EXTENSION_FEATURE_NAMES) or b""
        size = layout.FEATURE_NAME.sizeof()
        for at in range(0, len(table) - size + 1, size):
            entry = layout.FEATURE_NAME.parse(table[at : at + size])
            if entry.type == 0 and entry.bit == bit:
                name: str = entry.name.rstrip(b"\0").decode("utf-8", "replace")
                return f"bit {bit} ({name})"
        return f"bit {bit}"

    @property
    def extensions_at(self) -> int:
        """Where the header extensions begin."""
        return self.header_length if self.version == 3 else layout.HEADER_V2_LENGTH

    def build_extensions(self) -> bytes:
        """The header extensions and the end of them."""
        return b"".join(
            layout.EXTENSION_HEAD.build({"type": kind, "length": len(data)}) + data + bytes(-len(data) % 8)
            for kind, data in self.extensions
        ) + bytes(layout.EXTENSION_HEAD.sizeof())

    def build_fields(self, backing_offset: int, backing_length: int) -> bytes:
        """Everything before the extensions, with the backing file name at that place (0, 0: there is none)."""
        length = self.extensions_at
        fields: bytes = layout.HEADER_V2.build(
            {
                "magic": layout.MAGIC,
                "version": self.version,
                "backing_offset": backing_offset,
                "backing_length": backing_length,
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
            fields += layout.HEADER_V3.build(
                {
                    "incompatible": self.incompatible,
                    "compatible": self.compatible,
                    "autoclear": self.autoclear,
                    "refcount_order": self.refcount_order,
                    "header_length": length,
                }
            )
            if length >= layout.HEADER_V3_LENGTH:
                fields += layout.HEADER_V3_COMPRESSION.build({"compression_type": self.compression_type}) + self.extra
        return fields

    @property
    def stored_backing_name(self) -> bytes:
        """The backing file name as stored; empty where there is none."""
        return (self.backing_name or "").encode("utf-8", "surrogateescape")

    def build(self) -> bytes:
        """The header, its extensions and the backing file name. ValueError if they do not fit into one cluster."""
        extensions, name = self.build_extensions(), self.stored_backing_name
        data = self.build_fields(self.extensions_at + len(extensions) if name else 0, len(name)) + extensions + name
        if len(name) > layout.MAX_BACKING_NAME or len(data) > self.cluster_size:
            raise ValueError(
                f"the header needs {len(data)} bytes (backing file name: {len(name)}), "
                f"but a cluster has {self.cluster_size} and a name at most {layout.MAX_BACKING_NAME}"
            )
        return data


def _parse_tail(path: str, cluster: bytes, start: int, fields: Any) -> tuple[tuple[tuple[int, bytes], ...], str | None]:
    """Header extensions, which begin at ``start``, and the backing file name behind them."""
    end, backing = len(cluster), None
    if fields.backing_offset:
        layout.in_range(path, "backing_file_offset", fields.backing_offset, start, len(cluster))
        limit = min(layout.MAX_BACKING_NAME, len(cluster) - fields.backing_offset)
        layout.in_range(path, "backing_file_size", fields.backing_length, 0, limit)
        end = fields.backing_offset
        name = cluster[end : end + fields.backing_length]
        backing = name.decode("utf-8", "surrogateescape") or None
    extensions = []
    at, head = start, layout.EXTENSION_HEAD.sizeof()
    while at + head <= end:
        extension = layout.EXTENSION_HEAD.parse(cluster[at : at + head])
        if extension.type == layout.EXTENSION_END:
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
