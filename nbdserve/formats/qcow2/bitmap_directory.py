"""The directory of persistent dirty bitmaps (qcow2 specification, "Bitmap directory")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nbdserve.errors import CorruptImageError
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import AUTOCLEAR_BITMAPS
from nbdserve.storage.base import Storage
from nbdserve.units import align_up

HEAD_BYTES: Final = 24
"""Of an entry, before its extra data and name."""
MAX_DIRECTORY_BYTES: Final = 64 << 20
FLAG_NAMES: Final = ("in-use", "auto")
"""By bit, with QEMU's names."""
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
    granularity: int
    """Bytes one bit stands for."""
    flags: int
    table_offset: int
    table_entries: int
    kind: int
    """DIRTY_TRACKING; there are no others yet."""
    extra_bytes: int
    """Of data whose meaning is not known."""


async def read_bitmap_directory(storage: Storage, header: Header) -> list[BitmapEntry]:
    """The bitmaps of the image; none when the autoclear bit says that they are not kept up to date.

    CorruptImageError for a directory that does not fit into the file.
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
    data = bytes(await storage.read(extension.directory_offset, length))
    entries, at = [], 0
    while at + HEAD_BYTES <= length:
        extra_bytes = int.from_bytes(data[at + 20 : at + 24], "big")
        name_at = at + HEAD_BYTES + extra_bytes
        end = name_at + int.from_bytes(data[at + 18 : at + 20], "big")
        entries.append(
            BitmapEntry(
                name=data[name_at:end].decode("utf-8", "replace"),
                granularity=1 << min(data[at + 17], 62),
                flags=int.from_bytes(data[at + 12 : at + 16], "big"),
                table_offset=int.from_bytes(data[at : at + 8], "big"),
                table_entries=int.from_bytes(data[at + 8 : at + 12], "big"),
                kind=data[at + 16],
                extra_bytes=extra_bytes,
            )
        )
        at = align_up(end, 8)
    return entries
