"""The bytes of a VHD image, both ways (Microsoft, "Virtual Hard Disk Image Format Specification", 1.0, 2006).

Footer and dynamic disk header; all integers are big endian. Pure: nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.formats.vpc.geometry import MAX_GEOMETRY_SECTORS, MAX_SECTORS
from nbdserve.units import SECTOR_SIZE, align_up, is_power_of_two

COOKIE: Final = b"conectix"
DYNAMIC_COOKIE: Final = b"cxsparse"
FOOTER_SIZE: Final = 512
OLD_FOOTER_SIZE: Final = 511
"""What Virtual PC before 2004 wrote at the end of the file."""
DYNAMIC_HEADER_SIZE: Final = 1024
VERSION: Final = 0x0001_0000
FEATURES_RESERVED: Final = 2
"""The bit that is always set."""
NO_OFFSET: Final = (1 << 64) - 1
"""Data offset of a fixed disk, and of every dynamic disk header."""
TIME_BASE: Final = 946_684_800
"""Unix time of 2000-01-01 00:00 UTC, from which time stamps count seconds."""

FIXED: Final = 2
DYNAMIC: Final = 3
DIFFERENCING: Final = 4
TYPE_NAMES: Final = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}

UNUSED: Final = 0xFFFF_FFFF
"""The entry of a block that is not in the file."""
ENTRY_SIZE: Final = 4
"""Bytes of an entry of the block allocation table: the sector where the block's bitmap begins."""
LOCATORS: Final = 8
MAX_TABLE_BYTES: Final = 16 << 20
"""Bytes of table that are read: enough for 2040 GiB in blocks of 512 KiB, the smallest that are in use."""

EXACT_CREATORS: Final = (b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0")
"""Creators whose disks have ``current_size`` bytes; those of all others have what the geometry says."""

FOOTER: Final[Any] = c.Struct(
    "cookie" / c.Bytes(8),
    "features" / c.Int32ub,
    "version" / c.Int32ub,
    "data_offset" / c.Int64ub,
    "timestamp" / c.Int32ub,
    "creator_app" / c.Bytes(4),
    "creator_version" / c.Int32ub,
    "creator_os" / c.Bytes(4),
    "original_size" / c.Int64ub,
    "current_size" / c.Int64ub,
    "cylinders" / c.Int16ub,
    "heads" / c.Int8ub,
    "sectors_per_track" / c.Int8ub,
    "disk_type" / c.Int32ub,
    "checksum" / c.Int32ub,
    "uuid" / c.Bytes(16),
    "saved_state" / c.Int8ub,
    "reserved" / c.Bytes(427),
)
FOOTER_CHECKSUM_AT: Final = 64

LOCATOR: Final[Any] = c.Struct(
    "code" / c.Bytes(4),
    "space" / c.Int32ub,
    "length" / c.Int32ub,
    "reserved" / c.Int32ub,
    "offset" / c.Int64ub,
)
DYNAMIC_HEADER: Final[Any] = c.Struct(
    "cookie" / c.Bytes(8),
    "data_offset" / c.Int64ub,
    "table_offset" / c.Int64ub,
    "version" / c.Int32ub,
    "max_entries" / c.Int32ub,
    "block_size" / c.Int32ub,
    "checksum" / c.Int32ub,
    "parent_uuid" / c.Bytes(16),
    "parent_timestamp" / c.Int32ub,
    "reserved1" / c.Bytes(4),
    "parent_name" / c.Bytes(512),
    "locators" / LOCATOR[LOCATORS],
    "reserved2" / c.Bytes(256),
)
DYNAMIC_CHECKSUM_AT: Final = 36


def checksum(data: bytes | bytearray, at: int) -> int:
    """One's complement of the sum of all bytes, those of the checksum itself (4, at ``at``) left out."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFF_FFFF


def _sealed(data: bytes, at: int) -> bytes:
    return data[:at] + checksum(data, at).to_bytes(4, "big") + data[at + 4 :]


@dataclass(frozen=True, slots=True)
class Footer:
    """The footer at the end of the file, of which all but fixed images have a copy at its beginning."""

    disk_type: int
    data_offset: int
    """Host offset of the dynamic disk header; NO_OFFSET in a fixed image."""
    current_size: int
    cylinders: int
    heads: int
    sectors_per_track: int
    uuid: bytes
    original_size: int
    timestamp: int = 0
    """Seconds since 2000."""
    creator_app: bytes = b"qemu"
    creator_version: int = 0x0005_0003
    creator_os: bytes = b"Wi2k"
    features: int = FEATURES_RESERVED
    version: int = VERSION
    saved_state: int = 0
    reserved: bytes = bytes(427)
    stored_checksum: int = field(default=0, compare=False)
    sound: bool = field(default=True, compare=False)
    """The stored checksum was right."""

    @property
    def size(self) -> int:
        """Virtual size in bytes, by QEMU's rule: which field tells depends on who made the image."""
        chs = self.cylinders * self.heads * self.sectors_per_track
        if self.creator_app in EXACT_CREATORS or chs == MAX_GEOMETRY_SECTORS:
            return self.current_size // SECTOR_SIZE * SECTOR_SIZE
        return chs * SECTOR_SIZE

    def with_size_of(self, other: Footer) -> Footer:
        """This footer with everything that tells the size as in the other one."""
        return replace(
            self,
            current_size=other.current_size,
            cylinders=other.cylinders,
            heads=other.heads,
            sectors_per_track=other.sectors_per_track,
            creator_app=other.creator_app,
        )

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str) -> Footer:
        """The footer in 511 or 512 bytes. CorruptImageError without its cookie; a wrong checksum only shows."""
        data = bytes(data).ljust(FOOTER_SIZE, b"\0")
        fields = FOOTER.parse(data)
        if fields.cookie != COOKIE:
            raise CorruptImageError(path, "not a VHD footer", field="footer cookie", value=fields.cookie)
        return cls(
            disk_type=fields.disk_type,
            data_offset=fields.data_offset,
            current_size=fields.current_size,
            cylinders=fields.cylinders,
            heads=fields.heads,
            sectors_per_track=fields.sectors_per_track,
            uuid=fields.uuid,
            original_size=fields.original_size,
            timestamp=fields.timestamp,
            creator_app=fields.creator_app,
            creator_version=fields.creator_version,
            creator_os=fields.creator_os,
            features=fields.features,
            version=fields.version,
            saved_state=fields.saved_state,
            reserved=fields.reserved,
            stored_checksum=fields.checksum,
            sound=fields.checksum == checksum(data, FOOTER_CHECKSUM_AT),
        )

    def check(self, path: str) -> None:
        """CorruptImageError or UnsupportedImageError for what no image can have."""
        if self.version >> 16 != VERSION >> 16:
            raise UnsupportedImageError(path, "only version 1 is known", field="footer version", value=self.version)
        if self.disk_type not in TYPE_NAMES:
            known = ", ".join(f"{number} ({name})" for number, name in TYPE_NAMES.items())
            raise UnsupportedImageError(path, f"known are {known}", field="disk type", value=self.disk_type)
        if self.size > MAX_SECTORS * SECTOR_SIZE:
            raise UnsupportedImageError(path, "a VHD has at most 2040 GiB", field="current size", value=self.size)

    def build(self) -> bytes:
        """512 bytes with the right checksum."""
        data = FOOTER.build(
            {
                "cookie": COOKIE,
                "features": self.features,
                "version": self.version,
                "data_offset": self.data_offset,
                "timestamp": self.timestamp,
                "creator_app": self.creator_app,
                "creator_version": self.creator_version,
                "creator_os": self.creator_os,
                "original_size": self.original_size,
                "current_size": self.current_size,
                "cylinders": self.cylinders,
                "heads": self.heads,
                "sectors_per_track": self.sectors_per_track,
                "disk_type": self.disk_type,
                "checksum": 0,
                "uuid": self.uuid,
                "saved_state": self.saved_state,
                "reserved": self.reserved,
            }
        )
        return _sealed(data, FOOTER_CHECKSUM_AT)


@dataclass(frozen=True, slots=True)
class Locator:
    """Where the header says that one form of the parent's name is."""

    code: bytes
    """``W2ru``, ``W2ku``, ``MacX``, ...; zeroes: not used."""
    length: int
    """Bytes of the name."""
    offset: int
    """Host offset of the name."""
    space: int = 0
    """Room for it: sectors by the specification, bytes by most writers."""

    @property
    def used(self) -> bool:
        """There is a name."""
        return self.code != bytes(4) and self.length != 0


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """The header of an image with a block allocation table."""

    table_offset: int
    """Host offset of the block allocation table."""
    max_entries: int
    block_size: int
    """Bytes of guest data in a block."""
    parent_uuid: bytes = bytes(16)
    parent_timestamp: int = 0
    parent_name: str = ""
    locators: tuple[Locator, ...] = ()
    version: int = VERSION
    reserved1: bytes = bytes(4)
    reserved2: bytes = bytes(256)
    stored_checksum: int = field(default=0, compare=False)
    sound: bool = field(default=True, compare=False)
    """The stored checksum was right."""

    @property
    def bitmap_size(self) -> int:
        """Bytes of the sector bitmap in front of each block's data: a bit per sector, in whole sectors.

        Blocks of less than 8 sectors have none, as QEMU has it; the specification does not say.
        """
        return align_up(self.block_size // (SECTOR_SIZE * 8), SECTOR_SIZE)

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str) -> DynamicHeader:
        """The header in 1024 bytes. CorruptImageError names field and value; a wrong checksum only shows."""
        data = bytes(data)
        fields = DYNAMIC_HEADER.parse(data)
        if fields.cookie != DYNAMIC_COOKIE:
            raise CorruptImageError(path, "no dynamic disk header there", field="header cookie", value=fields.cookie)
        if fields.version >> 16 != VERSION >> 16:
            raise UnsupportedImageError(path, "only version 1 is known", field="header version", value=fields.version)
        if not is_power_of_two(fields.block_size) or fields.block_size < SECTOR_SIZE:
            raise CorruptImageError(
                path, "must be a power of two of at least 512", field="block size", value=fields.block_size
            )
        if fields.table_offset % ENTRY_SIZE:
            raise CorruptImageError(path, "not a multiple of 4", field="table offset", value=fields.table_offset)
        return cls(
            table_offset=fields.table_offset,
            max_entries=fields.max_entries,
            block_size=fields.block_size,
            parent_uuid=fields.parent_uuid,
            parent_timestamp=fields.parent_timestamp,
            parent_name=fields.parent_name.decode("utf-16-be", "replace").partition("\0")[0],
            locators=tuple(Locator(at.code, at.length, at.offset, at.space) for at in fields.locators),
            version=fields.version,
            reserved1=fields.reserved1,
            reserved2=fields.reserved2,
            stored_checksum=fields.checksum,
            sound=fields.checksum == checksum(data, DYNAMIC_CHECKSUM_AT),
        )

    def build(self) -> bytes:
        """1024 bytes with the right checksum. ValueError if the parent's name is longer than 255 UTF-16 units."""
        name = self.parent_name.encode("utf-16-be")
        if len(name) > 510 or len(self.locators) > LOCATORS:
            raise ValueError(f"the parent's name {self.parent_name!r} is too long, or there are too many locators")
        locators = [
            {"code": at.code, "space": at.space, "length": at.length, "reserved": 0, "offset": at.offset}
            for at in (*self.locators, *(LOCATORS - len(self.locators)) * (Locator(bytes(4), 0, 0),))
        ]
        data = DYNAMIC_HEADER.build(
            {
                "cookie": DYNAMIC_COOKIE,
                "data_offset": NO_OFFSET,
                "table_offset": self.table_offset,
                "version": self.version,
                "max_entries": self.max_entries,
                "block_size": self.block_size,
                "checksum": 0,
                "parent_uuid": self.parent_uuid,
                "parent_timestamp": self.parent_timestamp,
                "reserved1": self.reserved1,
                "parent_name": name.ljust(512, b"\0"),
                "locators": locators,
                "reserved2": self.reserved2,
            }
        )
        return _sealed(data, DYNAMIC_CHECKSUM_AT)
