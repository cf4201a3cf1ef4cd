"""Making VHD images: what the options mean, where everything goes (``plan_image``, pure), and the writing."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption
from nbdserve.formats.create_options import parse_boolean
from nbdserve.formats.vpc import layout
from nbdserve.formats.vpc.geometry import fitting_geometry, image_size
from nbdserve.formats.vpc.layout import DynamicHeader, Footer
from nbdserve.formats.vpc.parents import make_locators
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, SECTOR_SIZE, align_up, div_ceil, is_power_of_two, parse_size

HEADER_OFFSET: Final = layout.FOOTER_SIZE
TABLE_OFFSET: Final = HEADER_OFFSET + layout.DYNAMIC_HEADER_SIZE
_MIN_BLOCK_SIZE: Final = 4096
"""Smaller ones have no sector bitmaps in QEMU's opinion."""
_MAX_BLOCK_SIZE: Final = 256 * MIB

CREATE_OPTIONS: Final = (
    CreateOption("backing_file", "File name of the parent of a differencing image"),
    CreateOption("backing_fmt", "Image format of the parent (vpc)"),
    CreateOption("block_size", "Bytes of a block of a dynamic or differencing image", "2097152"),
    CreateOption("force_size", "Have exactly the size given, not the next one a disk geometry has", "off"),
    CreateOption("size", "Virtual disk size"),
    CreateOption("subformat", "Type of image {dynamic, fixed, differencing}", "dynamic"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A new image. Its identity, and that of its parent, are still to be filled in."""

    footer: Footer
    header: DynamicHeader | None
    """None of a fixed image."""
    names: bytes
    """What the parent locators point at, in whole sectors; they begin where the table ends."""
    names_offset: int
    end: int
    """Host offset of the footer at the end."""


def plan_image(size: int, options: Mapping[str, str]) -> Plan:
    """What ``create_vpc`` would write; ConfigError names a bad option, or a size no VHD can have. No I/O."""
    known = {option.name for option in CREATE_OPTIONS}
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown vpc option {name!r}: `-o help` lists the options there are")
    parent = options.get("backing_file") or None
    subformat = _subformat(options, parent)
    force = parse_boolean(options, "force_size")
    if subformat == layout.DIFFERENCING:
        # The size is that of the parent, whatever its geometry says.
        exact_size, geometry = image_size(size, exact=True)[0], fitting_geometry(size)
    else:
        exact_size, geometry = image_size(size, exact=force)
    footer = Footer(
        disk_type=subformat,
        data_offset=layout.NO_OFFSET if subformat == layout.FIXED else HEADER_OFFSET,
        current_size=exact_size,
        original_size=exact_size,
        cylinders=geometry[0],
        heads=geometry[1],
        sectors_per_track=geometry[2],
        uuid=bytes(16),
        creator_app=b"qem2" if force or subformat == layout.DIFFERENCING else b"qemu",
    )
    if subformat == layout.FIXED:
        if "block_size" in options:
            raise ConfigError("block_size: fixed images have no blocks")
        return Plan(footer, None, b"", 0, exact_size)
    return _plan_blocks(footer, _block_size(options), parent)


def _subformat(options: Mapping[str, str], parent: str | None) -> int:
    types = {name: number for number, name in layout.TYPE_NAMES.items()}
    name = options.get("subformat", "dynamic" if parent is None else "differencing")
    if name not in types:
        raise ConfigError(f"subformat={name}: expects one of {', '.join(types)}")
    if (parent is None) != (types[name] != layout.DIFFERENCING):
        raise ConfigError(f"subformat={name}: differencing images, and only they, have a backing file")
    backing_format = options.get("backing_fmt") or None
    if parent is None and backing_format is not None:
        raise ConfigError("backing_fmt needs backing_file")
    if parent is not None and backing_format != "vpc":
        raise ConfigError(f"backing_fmt={backing_format}: the parent of a VHD is a VHD (vpc)")
    return types[name]


def _block_size(options: Mapping[str, str]) -> int:
    try:
        block_size = parse_size(options.get("block_size", "2M"))
    except ValueError as error:
        raise ConfigError(f"block_size: {error}") from None
    if not is_power_of_two(block_size) or not _MIN_BLOCK_SIZE <= block_size <= _MAX_BLOCK_SIZE:
        raise ConfigError(f"block_size={block_size}: must be a power of two between 4096 and 256M")
    return block_size


def _plan_blocks(footer: Footer, block_size: int, parent: str | None) -> Plan:
    entries = div_ceil(footer.current_size, block_size)
    if entries * layout.ENTRY_SIZE > layout.MAX_TABLE_BYTES:
        raise ConfigError(
            f"block_size={block_size}: a disk of {footer.current_size} bytes would have {entries} blocks, which is "
            f"more than {layout.MAX_TABLE_BYTES // layout.ENTRY_SIZE}"
        )
    header = DynamicHeader(table_offset=TABLE_OFFSET, max_entries=entries, block_size=block_size)
    names_offset = TABLE_OFFSET + align_up(entries * layout.ENTRY_SIZE, SECTOR_SIZE)
    names = b""
    if parent is not None:
        try:
            locators, names = make_locators(parent, names_offset)
            header = replace(header, parent_name=Path(parent).name, locators=locators)
            header.build()
        except ValueError as error:
            raise ConfigError(f"backing_file={parent!r}: cannot be stored in a VHD: {error}") from None
    return Plan(footer, header, names, names_offset, names_offset + len(names))


async def create_vpc(storage: Storage, size: int, options: Mapping[str, str], *, parent: Footer | None = None) -> None:
    """Make ``storage`` an empty VHD; ``parent`` is the footer of the image a differencing one is made on.

    The footers are written last and behind a barrier: at every moment before, the file is no VHD.
    """
    plan = plan_image(size, options)
    header = plan.header
    if plan.footer.disk_type == layout.DIFFERENCING:
        assert header is not None
        if parent is None:
            raise ConfigError("backing_file: the parent has to be opened, a differencing VHD holds its identity")
        header = replace(header, parent_uuid=parent.uuid, parent_timestamp=parent.timestamp)
    now = max(0, int(time.time()) - layout.TIME_BASE) & 0xFFFF_FFFF
    footer = replace(plan.footer, uuid=uuid.uuid4().bytes, timestamp=now).build()
    await storage.truncate(0)
    await storage.truncate(plan.end)
    if not storage.grows_zeroed:
        await storage.zero(0, plan.end)
    if header is not None:
        await storage.write(HEADER_OFFSET, header.build())
        unused = b"\xff" * MIB
        for offset in range(TABLE_OFFSET, plan.names_offset, MIB):
            await storage.write(offset, unused[: plan.names_offset - offset])
        if plan.names:
            await storage.write(plan.names_offset, plan.names)
    await storage.flush()
    await storage.write(plan.end, footer)
    if header is not None:
        await storage.write(0, footer)
    await storage.flush()
