"""The directory of persistent dirty bitmaps (qcow2 specification, "Bitmap directory")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import CorruptImageError
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import AUTOCLEAR_BITMAPS, MAX_BITMAPS
from nbdserve.storage.base import Storage
from nbdserve.units import align_up

_HEAD: Final = struct.Struct(">QIIBBHI")
"""Table offset and entries, flags, type, bits of the granularity, bytes of the name and of the extra data, which comes
before it."""
FLAGS_AT: Final = 12
"""Of an entry, where its flags are; entries begin at multiples of 8."""
MAX_DIRECTORY_BYTES: Final = 64 << 20
MAX_BITMAP_BYTES: Final = 512 << 20
"""Of the clusters of one bitmap: QEMU opens no image with more."""
FLAG_IN_USE: Final = 1 << 0
"""The bitmap was open for recording, and not stored since: what is stored does not count."""
FLAG_AUTO: Final = 1 << 1
"""It records whenever the image is written."""
FLAG_EXTRA_COMPATIBLE: Final = 1 << 2
"""Who does not know the extra data may use the bitmap all the same."""
DIRTY_TRACKING: Final = 1


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """A bitmap, and where its table is."""

    name: str
    """As stored, decoded as UTF-8 with surrogateescape."""
    granularity_bits: int
    flags: int
    table_offset: int
    table_entries: int
    kind: int = DIRTY_TRACKING
    """There are no others yet."""
    extra: bytes = b""
    """Data whose meaning is not known."""

    @property
    def granularity(self) -> int:
        """Bytes one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        """See FLAG_IN_USE."""
        return bool(self.flags & FLAG_IN_USE)

    @property
    def auto(self) -> bool:
        """See FLAG_AUTO."""
        return bool(self.flags & FLAG_AUTO)

    def build(self) -> bytes:
        """The stored form."""
        name = self.name.encode("utf-8", "surrogateescape")
        numbers = (self.table_offset, self.table_entries, self.flags, self.kind, self.granularity_bits)
        data = _HEAD.pack(*numbers, len(name), len(self.extra)) + self.extra + name
        return data + bytes(-len(data) % 8)


def build_directory(entries: Sequence[BitmapEntry]) -> bytes:
    """The stored form of a whole directory."""
    return b"".join(entry.build() for entry in entries)


async def read_bitmap_directory(storage: Storage, header: Header) -> list[BitmapEntry]:
    """The bitmaps of the image; none when the autoclear bit says that they are not kept up to date.

    CorruptImageError for a directory that does not fit into the file, or an entry that does not fit into it.
    """
    extension = header.bitmaps
    if extension is None or not header.autoclear & AUTOCLEAR_BITMAPS:
        return []
    length = extension.directory_size
    if length > MAX_DIRECTORY_BYTES or extension.directory_offset + length > align_up(
        storage.size, header.cluster_size
    ):
        raise CorruptImageError(
            storage.path, "outside the file, or over 64 MiB", field="bitmap directory size", value=length
        )
    data = await storage.read(extension.directory_offset, length)
    entries: list[BitmapEntry] = []
    at = 0
    while at + _HEAD.size <= length:
        table_offset, table_entries, flags, kind, granularity_bits, name_bytes, extra_bytes = _HEAD.unpack_from(
            data, at
        )
        extra_at = at + _HEAD.size
        name_at = extra_at + extra_bytes
        end = name_at + name_bytes
        if end > length or len(entries) == MAX_BITMAPS:
            raise CorruptImageError(
                storage.path,
                f"reaches past the end of the directory, or is the one after {MAX_BITMAPS}",
                field="bitmap directory entry",
                value=len(entries),
            )
        entries.append(
            BitmapEntry(
                name=bytes(data[name_at:end]).decode("utf-8", "surrogateescape"),
                granularity_bits=granularity_bits,
                flags=flags,
                table_offset=table_offset,
                table_entries=table_entries,
                kind=kind,
                extra=bytes(data[extra_at:name_at]),
            )
        )
        at = align_up(end, 8)
    return entries
