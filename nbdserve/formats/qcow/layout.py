"""The bytes of a qcow image, version 1, both ways (QEMU block/qcow.c; all integers are big endian). Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.formats.two_level.geometry import TwoLevelGeometry
from nbdserve.units import MIB, SECTOR_SIZE, align_down, align_up, div_ceil

MAGIC: Final = b"QFI\xfb"
VERSION: Final = 1
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 16
MIN_L2_BITS: Final = 6
MAX_L2_BITS: Final = 13
MAX_BACKING_NAME: Final = 1023
MAX_L1_BYTES: Final = 32 * MIB
"""That of a disk of 8 TiB with the tables of a new image. It is kept in memory."""

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1

HEADER: Final[Any] = c.Struct(
    "magic" / c.Bytes(4),
    "version" / c.Int32ub,
    "backing_file_offset" / c.Int64ub,
    "backing_file_size" / c.Int32ub,
    "mtime" / c.Int32ub,
    "size" / c.Int64ub,
    "cluster_bits" / c.Int8ub,
    "l2_bits" / c.Int8ub,
    "padding" / c.Int16ub,
    "crypt_method" / c.Int32ub,
    "l1_table_offset" / c.Int64ub,
)
HEADER_LENGTH: Final = 48
BACKING_FIELDS_AT: Final = 8
SIZE_AT: Final = 24
L1_OFFSET_AT: Final = 40


@dataclass(frozen=True, slots=True)
class Header:
    """The image header, checked against itself and the file's size."""

    size: int
    """Virtual size as stored, bytes; the disk has the whole sectors of it."""
    cluster_bits: int
    l2_bits: int
    l1_table_offset: int
    backing_offset: int = 0
    backing_length: int = 0
    crypt_method: int = CRYPT_NONE
    mtime: int = 0
    backing_name: str | None = None
    """As stored, decoded as UTF-8 with surrogateescape. No format is declared: the header has no room for one."""

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def disk_size(self) -> int:
        """The virtual size, bytes: whole sectors, rounded down as QEMU does."""
        return align_down(self.size, SECTOR_SIZE)

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table: it has just those the disk needs."""
        return div_ceil(self.size, 1 << self.cluster_bits + self.l2_bits)

    @property
    def geometry(self) -> TwoLevelGeometry:
        """The figures of the mapping."""
        return TwoLevelGeometry(
            size=self.disk_size,
            cluster_bits=self.cluster_bits,
            table_bytes=8 << self.l2_bits,
            reserved=(
                (0, HEADER_LENGTH),
                (self.backing_offset, self.backing_offset + self.backing_length),
                (self.l1_table_offset, self.l1_table_offset + self.l1_entries * 8),
            ),
            alignment=1,
            whole_clusters=False,
        )

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str, file_size: int) -> Header:
        """The header in ``data``, the start of the file; the backing file's name is left to ``with_backing_name``.

        ``file_size`` in bytes bounds the L1 table. CorruptImageError and UnsupportedImageError name field and value.
        """
        if len(data) < HEADER_LENGTH:
            raise CorruptImageError(path, "the file is too short for a qcow header", field="file size", value=file_size)
        fields = HEADER.parse(bytes(data[:HEADER_LENGTH]))
        if fields.magic != MAGIC:
            raise CorruptImageError(path, "not a qcow image", field="magic", value=fields.magic)
        if fields.version != VERSION:
            raise UnsupportedImageError(
                path, "version 1 is known here", field="version", value=fields.version, hint="2 and 3 are qcow2"
            )
        for field, low, high in (
            ("cluster_bits", MIN_CLUSTER_BITS, MAX_CLUSTER_BITS),
            ("l2_bits", MIN_L2_BITS, MAX_L2_BITS),
            ("size", 2, (1 << 63) - 1),
            ("backing_file_size", 0, MAX_BACKING_NAME if fields.backing_file_offset else (1 << 32) - 1),
        ):
            if not low <= fields[field] <= high:
                raise CorruptImageError(path, f"must be between {low} and {high}", field=field, value=fields[field])
        if fields.crypt_method not in (CRYPT_NONE, CRYPT_AES):
            raise UnsupportedImageError(
                path, "0 (none) and 1 (AES) are known", field="crypt_method", value=fields.crypt_method
            )
        header = cls(
            size=fields.size,
            cluster_bits=fields.cluster_bits,
            l2_bits=fields.l2_bits,
            l1_table_offset=fields.l1_table_offset,
            backing_offset=fields.backing_file_offset,
            backing_length=fields.backing_file_size if fields.backing_file_offset else 0,
            crypt_method=fields.crypt_method,
            mtime=fields.mtime,
        )
        header._check_places(path, file_size)
        return header

    def _check_places(self, path: str, file_size: int) -> None:
        length = self.l1_entries * 8
        if length > MAX_L1_BYTES:
            raise UnsupportedImageError(
                path, f"it needs an L1 table of {length} bytes, at most 32 MiB", field="size", value=self.size
            )
        if self.l1_table_offset < HEADER_LENGTH or self.l1_table_offset + length > file_size:
            raise CorruptImageError(
                path,
                f"{length} bytes there are not inside the file of {file_size}",
                field="l1_table_offset",
                value=self.l1_table_offset,
            )
        if self.backing_offset and self.backing_offset + self.backing_length > file_size:
            raise CorruptImageError(
                path,
                f"a name of {self.backing_length} bytes there is not inside the file of {file_size}",
                field="backing_file_offset",
                value=self.backing_offset,
            )

    def with_backing_name(self, name: bytes) -> Header:
        """The header with the backing file's name, as stored."""
        return replace(self, backing_name=name.decode("utf-8", "surrogateescape") or None)

    def build(self) -> bytes:
        """The header and, behind it, the backing file name, padded to 8 bytes, where the L1 table may begin.

        ValueError when the name is too long.
        """
        name = (self.backing_name or "").encode("utf-8", "surrogateescape")
        if len(name) > MAX_BACKING_NAME:
            raise ValueError(f"a backing file name of {len(name)} bytes is longer than {MAX_BACKING_NAME}")
        fields = HEADER.build(
            {
                "magic": MAGIC,
                "version": VERSION,
                "backing_file_offset": HEADER_LENGTH if name else 0,
                "backing_file_size": len(name),
                "mtime": self.mtime,
                "size": self.size,
                "cluster_bits": self.cluster_bits,
                "l2_bits": self.l2_bits,
                "padding": 0,
                "crypt_method": self.crypt_method,
                "l1_table_offset": self.l1_table_offset,
            }
        )
        head = bytes(fields) + name
        return head.ljust(align_up(len(head), 8), b"\0")
