"""What an image says of itself: headers, log, regions and metadata, read and judged against each other.

Reading modifies nothing: a log that is to be replayed is laid over the file in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from nbdserve.errors import CorruptImageError, ImageError
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.layout import Header, Item, Parameters, Region
from nbdserve.formats.vhdx.locator import ParentLocator
from nbdserve.formats.vhdx.replay import ReplayedStorage, replayed
from nbdserve.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Structure:
    """The parts of an image, and where they are."""

    header: Header
    header_copy: int
    """Which of the two headers it is: the next one is written over the other."""
    overlay: ReplayedStorage | None
    """The file with its log replayed, where there is one to replay."""
    regions: tuple[Region, ...]
    items: dict[UUID, Item]
    parameters: Parameters
    locator: ParentLocator | None

    @property
    def bat(self) -> Region:
        """The region of the block allocation table."""
        return next(region for region in self.regions if region.guid == layout.BAT_REGION)

    @property
    def metadata(self) -> Region:
        """The region of the metadata items."""
        return next(region for region in self.regions if region.guid == layout.METADATA_REGION)

    def places(self) -> list[tuple[int, int]]:
        """``[start, end)`` of what is not for blocks, ascending: the head, the log, every region."""
        header = self.header
        found = [(0, layout.HEAD_LENGTH), *((region.offset, region.end) for region in self.regions)]
        if header.log_length:
            found.append((header.log_offset, header.log_offset + header.log_length))
        return sorted(found)


async def read_copies(storage: Storage, offsets: tuple[int, int], length: int) -> tuple[bytes, bytes]:
    """Both copies of what there are two of."""
    first, second = offsets
    return bytes(await storage.read(first, length)), bytes(await storage.read(second, length))


async def read_structure(storage: Storage) -> Structure:
    """The structure of the image on ``storage``. ImageError naming field and value."""
    path = storage.path
    signature = bytes(await storage.read(0, len(layout.SIGNATURE)))
    if signature != layout.SIGNATURE:
        raise CorruptImageError(path, "not a VHDX image", field="signature", value=signature)
    if storage.size < layout.HEAD_LENGTH:
        raise CorruptImageError(path, "the file is too short for a VHDX image", field="file size", value=storage.size)
    copies = await read_copies(storage, layout.HEADER_OFFSETS, layout.HEADER_LENGTH)
    header, header_copy = layout.choose_header(copies, path)
    header.check(path, storage.size)
    overlay = await replayed(storage, header)
    file: Storage = overlay or storage
    tables = await read_copies(file, layout.REGION_TABLE_OFFSETS, layout.REGION_TABLE_LENGTH)
    regions = layout.parse_region_table(tables, path, file.size)
    layout.refuse_overlaps(regions, header, path)
    metadata = next(region for region in regions if region.guid == layout.METADATA_REGION)
    table = bytes(await file.read(metadata.offset, layout.METADATA_TABLE_LENGTH))
    items = layout.parse_metadata_table(table, path, metadata.length)
    contents = {
        item_id: bytes(await file.read(metadata.offset + item.offset, item.length)) for item_id, item in items.items()
    }
    parameters = Parameters.parse(contents, path)
    locator = None
    if parameters.has_parent:
        if layout.PARENT_LOCATOR not in contents:
            raise CorruptImageError(path, "there is no parent locator", field="HasParent", value=True)
        locator = ParentLocator.parse(contents[layout.PARENT_LOCATOR], path)
    structure = Structure(header, header_copy, overlay, regions, items, parameters, locator)
    if structure.bat.length < parameters.bat_entries * 8:
        raise CorruptImageError(
            path,
            f"too short for {parameters.bat_entries} entries",
            field="BAT region Length",
            value=structure.bat.length,
        )
    return structure


class HeaderWriter:
    """Writes the two headers of an image in turn ([MS-VHDX] 2.2.2)."""

    def __init__(self, storage: Storage, header: Header, copy: int) -> None:
        self.header = header
        self._storage = storage
        self._copy = copy

    async def update(self, **changes: UUID) -> None:
        """Change fields of the header, durably, in both copies.

        The copy that is not current is written first, and is stable before the other one follows. Crash at any point:
        a copy that was torn has no valid checksum, and the other one is complete, and either old or new.
        """
        for _ in range(2):
            header = self.header.next(**changes, log_version=0)
            await self._storage.write_stable([(layout.HEADER_OFFSETS[1 - self._copy], header.build())])
            self.header, self._copy = header, 1 - self._copy


def refuse_writing(storage: Storage) -> None:
    """ImageError when the file cannot be written."""
    if storage.read_only:
        raise ImageError(storage.path, "the file is open read-only")
