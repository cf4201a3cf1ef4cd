"""Changing the header of an image as a whole: version, feature bits, extensions, the backing file's name.

What counts is decided by sector 0, which a disk does not tear. The name lies in it, or where nothing on disk points to
yet; header extensions behind it are rewritten while an intermediate sector does not show them.
"""

from __future__ import annotations

from dataclasses import replace

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.commit import HeaderSector
from nbdserve.formats.qcow2.header import Header
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up


async def change_header(storage: Storage, sector: HeaderSector, old: Header, new: Header) -> None:
    """Turn the header ``old`` of the image on ``storage`` into ``new``, stable on return.

    Fields that are the same in both are left as ``sector`` has them. Each of the steps is stable before the next; crash
    before the first sector is written: the old header. After it: the new one, at most without the names of features.
    ConfigError, before anything is changed, when the header has no room.
    """
    name = new.stored_backing_name
    try:
        new.build()
        name_at, kept = _place(old, new, sector.read_u64(layout.BACKING_NAME_AT))
    except ValueError as error:
        raise ConfigError(f"{storage.path}: {error}") from None
    start, extensions = new.extensions_at, new.build_extensions()
    inside, behind = extensions[: SECTOR_SIZE - start], extensions[SECTOR_SIZE - start :]
    if name and not kept and name_at >= SECTOR_SIZE:
        await storage.write_stable([(name_at, name)])
    pieces = [(0, _fields(sector, old, new, name_at, len(name)))]
    if name_at and name_at < SECTOR_SIZE:
        pieces.append((name_at, name[: SECTOR_SIZE - name_at]))
    if behind and behind != old.build_extensions()[SECTOR_SIZE - old.extensions_at :]:
        await sector.patch_all([*pieces, (start, _short(new).build_extensions())])
        await storage.write_stable([(SECTOR_SIZE, behind)])
    await sector.patch_all([*pieces, (start, inside)])


def _fields(sector: HeaderSector, old: Header, new: Header, name_at: int, name_length: int) -> bytes:
    """The fields before the extensions, those that do not change as they are in the sector."""
    fields = bytearray(new.build_fields(name_at, name_length))
    before = old.build_fields(0, 0)
    stored = sector.read(0, len(fields))
    names = range(layout.BACKING_NAME_AT, layout.BACKING_NAME_AT + 12)
    for at, byte in enumerate(before[: len(fields)]):
        if byte == fields[at] and at not in names:
            fields[at] = stored[at]
    return bytes(fields)


def _short(header: Header) -> Header:
    """``header`` without the names of features, which are a help for messages; ValueError if that is not enough."""
    kept = tuple(item for item in header.extensions if item[0] != layout.EXTENSION_FEATURE_NAMES)
    short = replace(header, extensions=kept)
    if header.extensions_at + len(short.build_extensions()) > SECTOR_SIZE:
        raise ValueError("its header extensions are too long to be changed safely")
    return short


def _place(old: Header, new: Header, old_name_at: int) -> tuple[int, bool]:
    """Where the new name goes (0: there is none), and whether it is there already. ValueError without a safe place."""
    name, old_name = new.stored_backing_name, old.stored_backing_name
    end = new.extensions_at + len(new.build_extensions())
    if end > SECTOR_SIZE:
        _short(new)
    if not name:
        return 0, False
    if name == old_name and old_name_at >= end:
        return old_name_at, True
    if end + len(name) <= SECTOR_SIZE:
        return end, False
    at = max(end, old.extensions_at + len(old.build_extensions()), SECTOR_SIZE)
    if old_name_at and at < old_name_at + len(old_name) and old_name_at < at + len(name):
        at = align_up(old_name_at + len(old_name), 8)
    if at + len(name) > new.cluster_size:
        raise ValueError(
            f"the header's cluster of {new.cluster_size} bytes has no room for another name beside the old"
        )
    return at, False
