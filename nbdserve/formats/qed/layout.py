"""The bytes of a QED image, both ways (QEMU docs/interop/qed_spec.rst; all integers are little endian). Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.formats.two_level.geometry import TwoLevelGeometry
from nbdserve.units import KIB, MIB, SECTOR_SIZE, div_ceil, is_power_of_two

MAGIC: Final = b"QED\0"
MIN_CLUSTER_SIZE: Final = 4 * KIB
MAX_CLUSTER_SIZE: Final = 64 * MIB
MAX_TABLE_CLUSTERS: Final = 16
MAX_HEADER_BYTES: Final = (1 << 32) - 1
MAX_BACKING_NAME: Final = 1023

FEATURE_BACKING: Final = 1 << 0
FEATURE_NEED_CHECK: Final = 1 << 1
"""The writer has not closed the image: check it before it is written to again."""
FEATURE_RAW_BACKING: Final = 1 << 2
"""The backing file is raw and must not be probed."""
FEATURES_KNOWN: Final = 0b111

HEADER: Final[Any] = c.Struct(
    "magic" / c.Bytes(4),
    "cluster_size" / c.Int32ul,
    "table_size" / c.Int32ul,
    "header_size" / c.Int32ul,
    "features" / c.Int64ul,
    "compat_features" / c.Int64ul,
    "autoclear_features" / c.Int64ul,
    "l1_table_offset" / c.Int64ul,
    "image_size" / c.Int64ul,
    "backing_filename_offset" / c.Int32ul,
    "backing_filename_size" / c.Int32ul,
)
HEADER_LENGTH: Final = 64
FEATURES_AT: Final = 16
AUTOCLEAR_AT: Final = 32
IMAGE_SIZE_AT: Final = 48
BACKING_NAME_AT: Final = 56


@dataclass(frozen=True, slots=True)
class Header:
    """The image header, checked against itself and the file's size."""

    cluster_size: int
    """Bytes."""
    table_size: int
    """Clusters of an L1 or L2 table."""
    header_size: int
    """Clusters of the header, the backing file name included."""
    l1_table_offset: int
    image_size: int
    """Virtual size, bytes."""
    features: int = 0
    compat_features: int = 0
    autoclear_features: int = 0
    backing_name: str | None = None
    """As stored, decoded as UTF-8 with surrogateescape."""

    @property
    def table_bytes(self) -> int:
        """An L1 or L2 table."""
        return self.table_size * self.cluster_size

    @property
    def table_entries(self) -> int:
        """Entries of an L1 or L2 table."""
        return self.table_bytes // 8

    @property
    def max_image_size(self) -> int:
        """The largest disk these tables can map, bytes."""
        return min(self.table_entries**2 * self.cluster_size, (1 << 63) - SECTOR_SIZE)

    @property
    def l1_used(self) -> int:
        """Entries of the L1 table that the disk needs."""
        return div_ceil(self.image_size, self.table_entries * self.cluster_size)

    @property
    def backing_format(self) -> str | None:
        """``raw`` where the header says so; it has no word for any other format."""
        return "raw" if self.features & FEATURE_RAW_BACKING else None

    @property
    def geometry(self) -> TwoLevelGeometry:
        """The figures of the mapping."""
        return TwoLevelGeometry(
            size=self.image_size,
            cluster_bits=self.cluster_size.bit_length() - 1,
            table_bytes=self.table_bytes,
            reserved=(
                (0, self.header_size * self.cluster_size),
                (self.l1_table_offset, self.l1_table_offset + self.table_bytes),
            ),
            alignment=self.cluster_size,
            whole_clusters=True,
        )

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str, file_size: int) -> Header:
        """The header in ``data``, the start of the file; ``backing_name`` is left to ``with_backing_name``.

        ``file_size`` in bytes bounds the L1 table. CorruptImageError and UnsupportedImageError name field and value.
        """
        if len(data) < HEADER_LENGTH:
            raise CorruptImageError(path, "the file is too short for a QED header", field="file size", value=file_size)
        fields = HEADER.parse(bytes(data[:HEADER_LENGTH]))
        if fields.magic != MAGIC:
            raise CorruptImageError(path, "not a QED image", field="magic", value=fields.magic)
        if unknown := fields.features & ~FEATURES_KNOWN:
            raise UnsupportedImageError(path, f"unknown features: {_bits(unknown)}", field="features", value=unknown)
        for field, low, high in (
            ("cluster_size", MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE),
            ("table_size", 1, MAX_TABLE_CLUSTERS),
        ):
            if not low <= fields[field] <= high or not is_power_of_two(fields[field]):
                raise CorruptImageError(
                    path, f"must be a power of two between {low} and {high}", field=field, value=fields[field]
                )
        if not 0 < fields.header_size <= MAX_HEADER_BYTES // fields.cluster_size:
            raise CorruptImageError(
                path, "the header must have 1 byte to 4 GiB", field="header_size", value=fields.header_size
            )
        header = cls(
            cluster_size=fields.cluster_size,
            table_size=fields.table_size,
            header_size=fields.header_size,
            l1_table_offset=fields.l1_table_offset,
            image_size=fields.image_size,
            features=fields.features,
            compat_features=fields.compat_features,
            autoclear_features=fields.autoclear_features,
        )
        header._check_places(path, file_size)
        return header

    def _check_places(self, path: str, file_size: int) -> None:
        if self.image_size % SECTOR_SIZE or self.image_size > self.max_image_size:
            raise CorruptImageError(
                path,
                f"must be a multiple of 512, and at most {self.max_image_size} with these tables",
                field="image_size",
                value=self.image_size,
            )
        offset = self.l1_table_offset
        if offset % self.cluster_size or offset < self.header_size * self.cluster_size:
            raise CorruptImageError(
                path, "not aligned to a cluster, or inside the header", field="l1_table_offset", value=offset
            )
        if offset + self.table_bytes > self.geometry.host_limit(file_size):
            raise CorruptImageError(
                path,
                f"{self.table_bytes} bytes there do not fit into the file of {file_size}",
                field="l1_table_offset",
                value=offset,
            )

    def with_backing_name(self, name: bytes) -> Header:
        """The header with the backing file name, as stored."""
        return replace(self, backing_name=name.decode("utf-8", "surrogateescape") or None)

    def build(self) -> bytes:
        """The header and, behind it, the backing file name. ValueError if they do not fit into ``header_size``."""
        name = (self.backing_name or "").encode("utf-8", "surrogateescape")
        if HEADER_LENGTH + len(name) > self.header_size * self.cluster_size or len(name) > MAX_BACKING_NAME:
            raise ValueError(f"a backing file name of {len(name)} bytes does not fit into the header")
        fields = HEADER.build(
            {
                "magic": MAGIC,
                "cluster_size": self.cluster_size,
                "table_size": self.table_size,
                "header_size": self.header_size,
                "features": self.features,
                "compat_features": self.compat_features,
                "autoclear_features": self.autoclear_features,
                "l1_table_offset": self.l1_table_offset,
                "image_size": self.image_size,
                "backing_filename_offset": HEADER_LENGTH if name else 0,
                "backing_filename_size": len(name),
            }
        )
        return bytes(fields) + name


def backing_name_range(data: bytes | bytearray, header: Header, path: str) -> tuple[int, int] | None:
    """``(host_offset, length)`` of the backing file name that the header in ``data`` declares; None without one."""
    if not header.features & FEATURE_BACKING:
        return None
    fields = HEADER.parse(bytes(data[:HEADER_LENGTH]))
    offset, length = fields.backing_filename_offset, fields.backing_filename_size
    if length > MAX_BACKING_NAME:
        raise CorruptImageError(path, f"at most {MAX_BACKING_NAME} bytes", field="backing_filename_size", value=length)
    if offset + length > header.header_size * header.cluster_size:
        raise CorruptImageError(path, "the name reaches past the header", field="backing_filename_offset", value=offset)
    return offset, length


def _bits(features: int) -> str:
    bits = [f"bit {bit}" for bit in range(64) if features >> bit & 1]
    return ", ".join(bits[:4]) + (", ..." if len(bits) > 4 else "")
