"""Naming another backing file in the header of an open image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nbdserve.formats.base import BackingReference
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.header_change import change_header

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.image import Qcow2Image


def header_with(header: Header, reference: BackingReference | None) -> Header:
    """``header`` with another backing file. The format's extension is the first, where QEMU has it."""
    others = [(kind, data) for kind, data in header.extensions if kind != layout.EXTENSION_BACKING_FORMAT]
    if reference is not None and reference.format is not None:
        others.insert(0, (layout.EXTENSION_BACKING_FORMAT, reference.format.encode()))
    return replace(header, backing_name=None if reference is None else reference.name, extensions=tuple(others))


async def set_backing(image: Qcow2Image, reference: BackingReference | None) -> None:
    """``FormatDriver.set_backing``. Errors and crashes as of ``change_header``."""
    new = header_with(image.header, reference)
    await change_header(image.storage, image.header_sector, image.header, new)
    image.header = new
    image.backing = reference
    image.has_backing = reference is not None
    image.backing_end = 1 << 63 if image.has_backing else 0
