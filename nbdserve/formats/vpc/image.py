"""What is in the file of a VHD image: its footers, header, table and parent's name, read and judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.tables import AnyWords, Table, decode_table
from nbdserve.formats.vpc import layout
from nbdserve.formats.vpc.layout import DynamicHeader, Footer, Locator
from nbdserve.formats.vpc.parents import MAX_NAME_BYTES, decode_name, portable, preferred
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil

BAD: Final = 0xFFFF_FFFE
"""In memory, the entry of a block that is not inside the file. No image can have it: nothing fits behind."""
REPAIR_HINT: Final = "image check -r all"
_CHUNK: Final = 1 << 16
"""Table entries judged at a time."""


@dataclass(frozen=True, slots=True)
class Footers:
    """The footer and its copy at the beginning, as far as they are there."""

    end: Footer | None
    end_size: int
    """Bytes of the footer at the end: 512, or 511 in old images."""
    begin: Footer | None

    @property
    def best(self) -> Footer | None:
        """The one to go by.

        The sector at the beginning of a fixed image is the guest's, so that what stands there never overrides a footer
        that says the image is fixed. Otherwise the copy is what stock tools go by.
        """
        if self.end is not None and self.end.disk_type == layout.FIXED:
            return self.end
        copy = self.begin if self.begin is not None and self.begin.disk_type != layout.FIXED else None
        for footer in (copy, self.end):
            if footer is not None and footer.sound:
                return footer
        return copy or self.end


async def read_footers(storage: Storage) -> Footers:
    """Look for the footer at the end of the file, and for the copy at its beginning."""
    size = storage.size
    begin = await storage.read(0, layout.FOOTER_SIZE) if size >= layout.FOOTER_SIZE else b""
    end, end_size = b"", layout.FOOTER_SIZE
    if size >= layout.FOOTER_SIZE:
        end = bytes(await storage.read(size - layout.FOOTER_SIZE, layout.FOOTER_SIZE))
    elif size == layout.OLD_FOOTER_SIZE:
        end = b"\0" + bytes(await storage.read(0, size))
    if not end.startswith(layout.COOKIE) and end[1:].startswith(layout.COOKIE):
        end, end_size = end[1:], layout.OLD_FOOTER_SIZE
    return Footers(_footer(end, storage.path), end_size, _footer(begin, storage.path))


def _footer(data: bytes | bytearray, path: str) -> Footer | None:
    return Footer.parse(data, path) if data.startswith(layout.COOKIE) else None


async def read_header(storage: Storage, footer: Footer) -> DynamicHeader:
    """The dynamic disk header the footer points at, checked against the file and the size of the disk."""
    path, at = storage.path, footer.data_offset
    if at + layout.DYNAMIC_HEADER_SIZE > storage.size:
        raise CorruptImageError(path, f"not inside the file of {storage.size} bytes", field="data offset", value=at)
    header = DynamicHeader.parse(await storage.read(at, layout.DYNAMIC_HEADER_SIZE), path)
    needed = div_ceil(footer.size, header.block_size)
    if header.max_entries < needed:
        raise CorruptImageError(
            path,
            f"a disk of {footer.size} bytes has {needed} blocks",
            field="max table entries",
            value=header.max_entries,
        )
    if needed * layout.ENTRY_SIZE > layout.MAX_TABLE_BYTES:
        raise UnsupportedImageError(
            path,
            f"the table needs {needed * layout.ENTRY_SIZE} bytes, at most {layout.MAX_TABLE_BYTES} are read",
            field="block size",
            value=header.block_size,
        )
    if header.table_offset + needed * layout.ENTRY_SIZE > storage.size:
        raise CorruptImageError(
            path,
            f"{needed} entries there do not fit into the file of {storage.size} bytes",
            field="table offset",
            value=header.table_offset,
        )
    return header


async def read_table(storage: Storage, footer: Footer, header: DynamicHeader) -> Table:
    """The block allocation table, as far as the disk has blocks; entries of blocks not inside the file become BAD."""
    count = div_ceil(footer.size, header.block_size)
    stored = await storage.read(header.table_offset, count * layout.ENTRY_SIZE)
    words = decode_table(stored, ">u4")
    most = highest_entry(storage.size, header)
    for first in range(0, count, _CHUNK):
        part = words[first : first + _CHUNK]
        part[(part > most) & (part != layout.UNUSED)] = BAD
    return Table(header.table_offset, words, ">u4")


def highest_entry(file_size: int, header: DynamicHeader) -> int:
    """The last sector a block may begin at to end inside the file; -1 when there is none."""
    return max(-1, min(BAD - 1, (file_size - header.bitmap_size - header.block_size) // SECTOR_SIZE))


def used_locators(footer: Footer, header: DynamicHeader) -> list[Locator]:
    """Those that name a parent: what an image of another type says of one means nothing."""
    return [at for at in header.locators if at.used] if footer.disk_type == layout.DIFFERENCING else []


def metadata_end(footer: Footer, header: DynamicHeader) -> int:
    """Host offset behind everything but blocks and the footer, in whole sectors."""
    ends = [
        layout.FOOTER_SIZE,
        footer.data_offset + layout.DYNAMIC_HEADER_SIZE,
        header.table_offset + header.max_entries * layout.ENTRY_SIZE,
        *(locator.offset + locator.length for locator in used_locators(footer, header)),
    ]
    return align_up(max(ends), SECTOR_SIZE)


def metadata_ranges(footer: Footer, header: DynamicHeader) -> list[tuple[int, int, str]]:
    """``(start, end, name)`` of what no block may lie in, host offsets."""
    ranges = [
        (0, layout.FOOTER_SIZE, "the copy of the footer"),
        (footer.data_offset, footer.data_offset + layout.DYNAMIC_HEADER_SIZE, "the header"),
        (header.table_offset, header.table_offset + header.max_entries * layout.ENTRY_SIZE, "the table"),
    ]
    names = [(at.offset, at.offset + at.length, "the parent's name") for at in used_locators(footer, header)]
    return ranges + names


def refuse_writing(storage: Storage, footer: Footer, header: DynamicHeader, words: AnyWords) -> None:
    """CorruptImageError when a write could damage the image: everything must be in its own place, and certain."""
    path, size = storage.path, storage.size
    if not header.sound:
        raise CorruptImageError(
            path, "it is wrong", field="header checksum", value=header.stored_checksum, hint=REPAIR_HINT
        )
    if header.table_offset % SECTOR_SIZE:
        raise CorruptImageError(path, "not a multiple of 512", field="table offset", value=header.table_offset)
    if (end := metadata_end(footer, header)) > align_up(size, SECTOR_SIZE):
        raise CorruptImageError(path, "the metadata do not end inside the file", field="end of metadata", value=end)
    bad = np.flatnonzero(words == BAD)
    if len(bad):
        raise CorruptImageError(
            path,
            f"block {bad[0]} is not inside the file",
            field="table entries not in the file",
            value=len(bad),
            hint=REPAIR_HINT,
        )
    stride = (header.bitmap_size + header.block_size) // SECTOR_SIZE
    used = words[words != layout.UNUSED]
    used.sort()
    shared = np.flatnonzero(np.diff(used) < stride)
    if len(shared):
        raise CorruptImageError(
            path, "two blocks share a place", field="table entry", value=int(used[shared[0]]), hint=REPAIR_HINT
        )
    for start, end, what in metadata_ranges(footer, header):
        first, last = start // SECTOR_SIZE, div_ceil(end, SECTOR_SIZE)
        inside = used[(used < last) & (used > first - stride)]
        if len(inside):
            raise CorruptImageError(
                path, f"the block there lies in {what}", field="table entry", value=int(inside[0]), hint=REPAIR_HINT
            )


def blocks_end(words: AnyWords, header: DynamicHeader) -> int:
    """Host offset behind the last block in use; 0 when there is none."""
    last = -1
    for first in range(0, len(words), _CHUNK):
        part = words[first : first + _CHUNK]
        part = part[part < BAD]
        if len(part):
            last = max(last, int(part.max()))
    return 0 if last < 0 else last * SECTOR_SIZE + header.bitmap_size + header.block_size


def used_end(footer: Footer, header: DynamicHeader, words: AnyWords) -> int:
    """Host offset behind all that is in use but the footer."""
    return max(metadata_end(footer, header), blocks_end(words, header))


async def read_parent_name(storage: Storage, header: DynamicHeader) -> str | None:
    """The parent's name as the best of the locators has it, or the header; None when nothing can be understood."""
    for locator in preferred(header.locators):
        if locator.length > MAX_NAME_BYTES or locator.offset + locator.length > storage.size:
            continue
        name = decode_name(locator.code, bytes(await storage.read(locator.offset, locator.length)))
        if name is not None and "\0" not in name:
            return name
    return portable(header.parent_name)


def require_footer(footers: Footers, storage: Storage) -> Footer:
    """The footer to go by; ImageError when there is none, or none that is possible."""
    footer = footers.best
    if footer is None:
        raise ImageError(
            storage.path,
            "not a VHD image: no footer at the end and none at the beginning",
            field="footer cookie",
            value=None,
        )
    footer.check(storage.path)
    return footer
