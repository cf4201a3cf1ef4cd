"""Making VDI images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final
from uuid import uuid4

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption
from nbdserve.formats.create_options import parse_boolean
from nbdserve.formats.flat_map import PAGE_WORDS
from nbdserve.formats.vdi import layout
from nbdserve.formats.vdi.layout import FREE, Header
from nbdserve.storage.base import Storage

CREATE_OPTIONS: Final = (
    CreateOption("backing_file", "File name of the parent: make a differencing image, which does not store the name"),
    CreateOption("backing_fmt", "Image format of the parent (vdi)"),
    CreateOption("size", "Virtual disk size"),
    CreateOption("static", "VDI static (pre-allocated) image", "off"),
)


def plan_header(size: int, options: Mapping[str, str]) -> Header:
    """The header an image with these options gets, with fresh UUIDs. ConfigError."""
    static = parse_boolean(options, "static")
    parent = options.get("backing_file")
    if parent and static:
        raise ConfigError(f"static={options['static']}: a differencing image is dynamic")
    if parent and options.get("backing_fmt") != "vdi":
        raise ConfigError(f"backing_fmt={options.get('backing_fmt')}: the parent of a VDI image is one too (vdi)")
    try:
        header = layout.plan(size, static=static)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    kind = layout.TYPE_DIFFERENCING if parent else header.type
    return replace(header, type=kind, uuid=uuid4(), uuid_modified=uuid4())


async def create_vdi(storage: Storage, header: Header) -> None:
    """Make ``storage`` a new image with this header; a static one has all of its blocks in place.

    The header is written last, behind a barrier: before, the file is no VDI image.
    """
    await storage.truncate(0)
    await storage.truncate(header.data_offset + header.blocks_allocated * header.block_size)
    for first in range(0, header.blocks, PAGE_WORDS):
        count = min(PAGE_WORDS, header.blocks - first)
        words = np.arange(first, first + count) if header.blocks_allocated else np.full(count, FREE)
        await storage.write(header.map_offset + first * 4, words.astype("<u4").tobytes())
    await storage.flush()
    await storage.write_stable([(0, header.build())])
