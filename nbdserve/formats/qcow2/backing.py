"""Naming another backing file in the header of an open image.

What counts is decided by sector 0, which a disk does not tear. The name lies in it, or where nothing on disk points to
yet; header extensions behind it are rewritten while an intermediate sector does not show them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import BackingReference
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.header import Header
from nbdserve.units import SECTOR_SIZE, align_up

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.image import Qcow2Image

BACKING_FIELDS_AT: Final = 8
"""``backing_file_offset``, 8 bytes, and ``backing_file_size``, 4."""


def header_with(header: Header, reference: BackingReference | None) -> Header:
    """``header`` with another backing file. The format's extension is the first, where QEMU has it."""
    others = [(kind, data) for kind, data in header.extensions if kind != layout.EXTENSION_BACKING_FORMAT]
    if reference is not None and reference.format is not None:
        others.insert(0, (layout.EXTENSION_BACKING_FORMAT, reference.format.encode()))
    return replace(header, backing_name=None if reference is None else reference.name, extensions=tuple(others))


async def set_backing(image: Qcow2Image, reference: BackingReference | None) -> None:
    """``FormatDriver.set_backing``. ConfigError, before anything is changed, when the header has no room.

    Each of the steps is stable before the next. A crash before the first sector is written: the old file is named.
    After it: the new one is.
    """
    old, new = image.header, header_with(image.header, reference)
    try:
        new.build()
        name_at, name = _place(old, new, image.header_sector.read_u64(BACKING_FIELDS_AT))
    except ValueError as error:
        raise ConfigError(f"{image.path}: {error}") from None
    fields = name_at.to_bytes(8, "big") + len(name).to_bytes(4, "big")
    start = new.extensions_at
    extensions = new.build_extensions()
    inside = extensions[: SECTOR_SIZE - start]
    in_sector = name_at + len(name) <= SECTOR_SIZE
    if name and not in_sector:
        await image.storage.write_stable([(name_at, name)])
    pieces = [(BACKING_FIELDS_AT, fields), (start, inside)]
    if name and in_sector:
        pieces.append((name_at, name))
    behind = extensions[len(inside) :]
    if behind and behind != old.build_extensions()[SECTOR_SIZE - start :]:
        shown = _short(new).build_extensions()
        await image.header_sector.patch_all([(BACKING_FIELDS_AT, fields), (start, shown)])
        await image.storage.write_stable([(SECTOR_SIZE, behind)])
    await image.header_sector.patch_all(pieces)
    image.header = new
    image.backing = reference
    image.has_backing = reference is not None
    image.backing_end = 1 << 63 if image.has_backing else 0


def _short(header: Header) -> Header:
    """``header`` without the names of features, which are a help for messages; ValueError if that is not enough."""
    kept = tuple(item for item in header.extensions if item[0] != layout.EXTENSION_FEATURE_NAMES)
    short = replace(header, extensions=kept)
    if header.extensions_at + len(short.build_extensions()) > SECTOR_SIZE:
        raise ValueError("its header extensions are too long to be changed safely")
    return short


def _place(old: Header, new: Header, old_name_at: int) -> tuple[int, bytes]:
    """Where the new name goes, and its bytes; ``(0, b"")`` without one. ValueError without a safe place."""
    name = (new.backing_name or "").encode("utf-8", "surrogateescape")
    end = new.extensions_at + len(new.build_extensions())
    if end > SECTOR_SIZE:
        _short(new)
    if not name:
        return 0, name
    if end + len(name) <= SECTOR_SIZE:
        return end, name
    old_length = len((old.backing_name or "").encode("utf-8", "surrogateescape")) if old_name_at else 0
    at = max(end, old.extensions_at + len(old.build_extensions()), SECTOR_SIZE)
    if old_name_at and at < old_name_at + old_length and old_name_at < at + len(name):
        at = align_up(old_name_at + old_length, 8)
    if at + len(name) > new.cluster_size:
        raise ValueError(
            f"the header's cluster of {new.cluster_size} bytes has no room for another name beside the old"
        )
    return at, name
