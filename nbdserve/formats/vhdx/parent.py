"""Naming another parent: the metadata that say so, which change together in one entry of the log ([MS-VHDX] 2.6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.tables import Piece
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.layout import METADATA_ENTRY, METADATA_TABLE_HEAD, Item
from nbdserve.formats.vhdx.locator import ParentLocator, locator_for
from nbdserve.formats.vhdx.pages import ChangedPages
from nbdserve.formats.vhdx.structure import Structure
from nbdserve.storage.base import Storage

_HEAD: Final = METADATA_TABLE_HEAD.sizeof()
_ENTRY: Final = METADATA_ENTRY.sizeof()


def locator_on(parent: Structure, name: str, child: Structure) -> ParentLocator:
    """The locator of ``child`` when ``parent``, the file ``name``, is below it. ConfigError for what cannot be."""
    sector_size, other = child.parameters.sector_size, parent.parameters.sector_size
    if child.parameters.leave_allocated:
        raise ConfigError("a fixed VHDX image cannot have a parent")
    if sector_size != other:
        raise ConfigError(f"its logical sectors have {sector_size} bytes, those of {name} {other}: it cannot be below")
    if replace(child.parameters, has_parent=True).bat_entries * 8 > child.bat.length:
        raise ConfigError("its block allocation table has no room for sector bitmaps, which images with a parent have")
    return locator_for(name, parent.header.data_write_guid)


async def with_parent(
    storage: Storage, structure: Structure, locator: ParentLocator | None
) -> tuple[Structure, list[Piece]]:
    """The structure with this parent, or none, and the pages, as they are to be, that make it so.

    Items keep their places, known or not; the locator has one behind all others. ConfigError when there is no room.
    """
    region = structure.metadata
    table = bytes(await storage.read(region.offset, layout.METADATA_TABLE_LENGTH))
    count = METADATA_TABLE_HEAD.parse(table).entry_count
    entries = [table[at : at + _ENTRY] for at in range(_HEAD, _HEAD + count * _ENTRY, _ENTRY)]
    entries = [entry for entry in entries if entry[:16] != layout.PARENT_LOCATOR.bytes_le]
    items = {item_id: item for item_id, item in structure.items.items() if item_id != layout.PARENT_LOCATOR}
    pages = ChangedPages(storage)
    if locator is not None:
        content = _content(locator)
        known = [METADATA_ENTRY.parse(entry) for entry in entries]
        place = max(layout.METADATA_TABLE_LENGTH, *(entry.offset + entry.length for entry in known))
        if place + len(content) > region.length or len(entries) >= layout.MAX_TABLE_ENTRIES:
            raise ConfigError(f"its metadata leave no room for a parent locator of {len(content)} bytes")
        item = items[layout.PARENT_LOCATOR] = Item(place, len(content))
        entries.append(layout.build_metadata_entry(layout.PARENT_LOCATOR, item))
        await pages.put(region.offset + place, content)
    unused = bytes(_ENTRY * max(0, count - len(entries)))
    await pages.put(region.offset, layout.build_metadata_table(entries) + unused)
    parameters = replace(structure.parameters, has_parent=locator is not None)
    place = items[layout.FILE_PARAMETERS].offset
    await pages.put(region.offset + place, parameters.items()[layout.FILE_PARAMETERS])
    return replace(structure, items=items, parameters=parameters, locator=locator), pages.pieces()


def _content(locator: ParentLocator) -> bytes:
    try:
        return locator.build()
    except ValueError as error:
        raise ConfigError(f"the parent's name cannot be stored: {error}") from None
