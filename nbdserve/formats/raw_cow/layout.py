"""The bytes of a raw-cow image, both ways: a header of 4096 bytes, and a bitmap behind it.

The first seven fields are those of the raw-cow proposal of 2011 (qemu-devel, "External COW format for raw images"),
which left their places to the compiler: here all integers are big endian and nothing is aligned, so that ``size`` is at
2060. The other fields are this project's own, in what was padding. Everything that changes after creation is in the
sector of bytes 2048-2559, the checksum too, so that it changes with one write that a disk does not tear.

The bitmap has one bit per cluster, the lowest bit of a byte first: set where the raw file has the cluster's content,
which is there at the offset it has in the guest's disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.formats.crc32c import crc32c
from nbdserve.units import KIB, MIB, SECTOR_SIZE, div_ceil, is_power_of_two

MAGIC: Final = b"RCOW"
VERSION: Final = 1
HEADER_SIZE: Final = 4 * KIB
NAME_SIZE: Final = 1024
"""Bytes of a file name with its final NUL."""
FORMAT_SIZE: Final = 32
"""Bytes of a format name with its final NUL."""

MIN_CLUSTER_SIZE: Final = 512
MAX_CLUSTER_SIZE: Final = 2 * MIB
MAX_BITMAP_BYTES: Final = 32 * MIB
"""The bitmap is kept in memory: 128 GiB of disk in clusters of 512 bytes, 16 TiB in clusters of 64 KiB."""

INCOMPATIBLE_KNOWN: Final = 0
AUTOCLEAR_KNOWN: Final = 0

HEADER: Final[Any] = c.Struct(
    "magic" / c.Bytes(4),
    "version" / c.Int32ub,
    "backing_file" / c.Bytes(NAME_SIZE),
    "raw_file" / c.Bytes(NAME_SIZE),
    "mtime" / c.Int32sb,
    "size" / c.Int64ub,
    "sectorsize" / c.Int32ub,
    "incompatible_features" / c.Int64ub,
    "compatible_features" / c.Int64ub,
    "autoclear_features" / c.Int64ub,
    "backing_format" / c.Bytes(FORMAT_SIZE),
    "raw_format" / c.Bytes(FORMAT_SIZE),
    "cluster_size" / c.Int32ub,
    "bitmap_offset" / c.Int64ub,
    "backing_limit" / c.Int64ub,
    "header_crc32c" / c.Int32ub,
)
"""Zeroes follow, up to HEADER_SIZE. ``header_crc32c`` is the CRC-32C of all HEADER_SIZE bytes with zeroes in its own
place."""
CHECKSUM_AT: Final = 2180

CHANGING_AT: Final = 2048
"""The sector with every field that changes after creation."""


@dataclass(frozen=True, slots=True)
class Header:
    """The image header, checked against itself and the file's size."""

    size: int
    """Virtual size, bytes; a multiple of 512."""
    raw_file: str
    """As stored, decoded as UTF-8 with surrogateescape."""
    backing_file: str | None = None
    backing_format: str | None = None
    raw_format: str = "raw"
    mtime: int = 0
    """When the backing file was last changed before the image was made, seconds since 1970; 0: not known."""
    cluster_size: int = 64 * KIB
    bitmap_offset: int = HEADER_SIZE
    backing_limit: int = -1
    """Guest offset from which on the backing file is not visible and a cluster whose bit is not set reads as zeroes:
    the smallest size the disk ever had. By default ``size``."""
    compatible: int = 0
    autoclear: int = 0

    def __post_init__(self) -> None:
        if self.backing_limit < 0:
            object.__setattr__(self, "backing_limit", self.size)

    @property
    def clusters(self) -> int:
        """Clusters of the disk; the last one may be cut off by its end."""
        return div_ceil(self.size, self.cluster_size)

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of the bitmap that have bits of clusters."""
        return div_ceil(self.clusters, 8)

    @property
    def end_offset(self) -> int:
        """Where the file ends: the bitmap fills whole sectors."""
        return self.bitmap_offset + div_ceil(self.bitmap_bytes, SECTOR_SIZE) * SECTOR_SIZE

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str, file_size: int, *, any_checksum: bool = False) -> Header:
        """The header in ``data``, the first HEADER_SIZE bytes of the file of ``file_size`` bytes.

        CorruptImageError and UnsupportedImageError name field and value. ``any_checksum``: a wrong one is no error.
        """
        data = bytes(data)
        if file_size < HEADER_SIZE or len(data) < HEADER_SIZE:
            raise CorruptImageError(
                path, "the file is too short for a raw-cow header", field="file size", value=file_size
            )
        fields = HEADER.parse(data)
        if fields.magic != MAGIC:
            raise CorruptImageError(path, "not a raw-cow image", field="magic", value=fields.magic)
        if fields.version != VERSION:
            raise UnsupportedImageError(path, f"version {VERSION} is known", field="version", value=fields.version)
        checksum = header_checksum(data)
        if fields.header_crc32c != checksum and not any_checksum:
            raise CorruptImageError(
                path,
                f"the header's checksum is {checksum:#x}",
                field="header_crc32c",
                value=fields.header_crc32c,
                hint="the header is damaged; if what image info shows is right: image check -r all",
            )
        _check_fields(fields, path)
        header = cls(
            size=fields.size,
            raw_file=_text(fields.raw_file, path, "raw_file") or "",
            backing_file=_text(fields.backing_file, path, "backing_file"),
            backing_format=_text(fields.backing_format, path, "backing_format"),
            raw_format=_text(fields.raw_format, path, "raw_format") or "",
            mtime=fields.mtime,
            cluster_size=fields.cluster_size,
            bitmap_offset=fields.bitmap_offset,
            backing_limit=fields.backing_limit,
            compatible=fields.compatible_features,
            autoclear=fields.autoclear_features,
        )
        header._check(path, file_size)
        return header

    def _check(self, path: str, file_size: int) -> None:
        if not self.raw_file:
            raise CorruptImageError(path, "names no raw file", field="raw_file", value="")
        if self.raw_format != "raw":
            raise UnsupportedImageError(path, "only raw is known", field="raw_format", value=self.raw_format)
        if self.bitmap_bytes > MAX_BITMAP_BYTES:
            raise UnsupportedImageError(
                path,
                f"its bitmap, in clusters of {self.cluster_size} bytes, is larger than {MAX_BITMAP_BYTES} bytes",
                field="size",
                value=self.size,
            )
        if self.bitmap_offset < HEADER_SIZE or self.bitmap_offset % SECTOR_SIZE:
            raise CorruptImageError(
                path,
                f"must be a multiple of {SECTOR_SIZE} behind the header",
                field="bitmap_offset",
                value=self.bitmap_offset,
            )
        if self.bitmap_offset + self.bitmap_bytes > file_size:
            raise CorruptImageError(
                path,
                f"the bitmap of {self.bitmap_bytes} bytes does not end inside the file of {file_size} bytes",
                field="bitmap_offset",
                value=self.bitmap_offset,
            )

    def build(self) -> bytes:
        """HEADER_SIZE bytes. ValueError naming a name that is too long, or has a NUL."""
        data = HEADER.build(
            {
                "magic": MAGIC,
                "version": VERSION,
                "backing_file": _padded(self.backing_file or "", NAME_SIZE, "backing_file"),
                "raw_file": _padded(self.raw_file, NAME_SIZE, "raw_file"),
                "mtime": self.mtime,
                "size": self.size,
                "sectorsize": SECTOR_SIZE,
                "incompatible_features": 0,
                "compatible_features": self.compatible,
                "autoclear_features": self.autoclear,
                "backing_format": _padded(self.backing_format or "", FORMAT_SIZE, "backing_fmt"),
                "raw_format": _padded(self.raw_format, FORMAT_SIZE, "raw_format"),
                "cluster_size": self.cluster_size,
                "bitmap_offset": self.bitmap_offset,
                "backing_limit": self.backing_limit,
                "header_crc32c": 0,
            }
        )
        return with_checksum(bytes(data).ljust(HEADER_SIZE, b"\0"))


def stored_time(seconds: float) -> int:
    """A time in seconds since 1970 as the 32 bits of ``mtime`` have it."""
    return (int(seconds) + (1 << 31)) % (1 << 32) - (1 << 31)


def header_checksum(data: bytes) -> int:
    """The CRC-32C a header of HEADER_SIZE bytes should have."""
    return crc32c(data[:CHECKSUM_AT] + bytes(4) + data[CHECKSUM_AT + 4 : HEADER_SIZE])


def is_sealed(data: bytes) -> bool:
    """The checksum of the header is right."""
    return with_checksum(data) == data


def with_checksum(data: bytes) -> bytes:
    """The header with the right checksum."""
    return data[:CHECKSUM_AT] + header_checksum(data).to_bytes(4, "big") + data[CHECKSUM_AT + 4 :]


def _check_fields(fields: Any, path: str) -> None:
    if unknown := fields.incompatible_features & ~INCOMPATIBLE_KNOWN:
        bits = ", ".join(f"bit {bit}" for bit in range(64) if unknown >> bit & 1)
        raise UnsupportedImageError(path, f"unknown features: {bits}", field="incompatible_features", value=unknown)
    if fields.sectorsize != SECTOR_SIZE:
        raise UnsupportedImageError(path, f"only {SECTOR_SIZE} is known", field="sectorsize", value=fields.sectorsize)
    if not is_power_of_two(fields.cluster_size) or not MIN_CLUSTER_SIZE <= fields.cluster_size <= MAX_CLUSTER_SIZE:
        raise CorruptImageError(
            path,
            f"must be a power of two between {MIN_CLUSTER_SIZE} and {MAX_CLUSTER_SIZE}",
            field="cluster_size",
            value=fields.cluster_size,
        )
    if fields.size % SECTOR_SIZE or fields.size >= 1 << 63:
        raise CorruptImageError(
            path, f"must be a multiple of {SECTOR_SIZE} below 2^63", field="size", value=fields.size
        )
    if fields.backing_limit % SECTOR_SIZE:
        raise CorruptImageError(
            path, f"must be a multiple of {SECTOR_SIZE}", field="backing_limit", value=fields.backing_limit
        )


def _text(field: bytes, path: str, name: str) -> str | None:
    """The text before the first NUL; None when there is none."""
    text, end, _ = field.partition(b"\0")
    if not end:
        raise CorruptImageError(path, "does not end with a NUL byte", field=name, value=field[:16])
    return text.decode("utf-8", "surrogateescape") or None


def _padded(text: str, size: int, name: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    if len(data) >= size:
        raise ValueError(f"{name}: {len(data)} bytes, raw-cow has room for {size - 1}")
    if b"\0" in data:
        raise ValueError(f"{name}: a NUL byte in a name")
    return data.ljust(size, b"\0")
