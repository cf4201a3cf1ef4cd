"""Making VHDX images, with qemu-img's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final
from uuid import uuid4

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption
from nbdserve.formats.create_options import parse_boolean
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, NO_GUID, Header, Parameters, Region
from nbdserve.formats.vhdx.layout import ZERO as ZERO_STATE
from nbdserve.formats.vhdx.locator import locator_for
from nbdserve.formats.vhdx.structure import Structure
from nbdserve.storage.base import Storage
from nbdserve.units import GIB, MIB, SECTOR_SIZE, TIB, align_up, is_power_of_two, parse_size

CREATOR: Final = "nbdserve"
DIFFERENCING_BLOCK_SIZE: Final = 2 * MIB
"""Where nobody chooses one: what the parent has counts less than that few sectors of a block are changed."""
_CHUNK_ENTRIES: Final = 1 << 17

CREATE_OPTIONS: Final = (
    CreateOption("size", "Virtual disk size; max of 64TB."),
    CreateOption("backing_file", "File name of the parent, which makes the image a differencing one"),
    CreateOption("backing_fmt", "Image format of the parent: vhdx"),
    CreateOption("log_size", "Log size; min 1MB.", "1048576"),
    CreateOption("block_size", "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.", "0"),
    CreateOption(
        "subformat",
        "VHDX format type, can be either 'dynamic', 'fixed' or 'differencing'. Default is 'dynamic', "
        "and 'differencing' with a backing file.",
    ),
    CreateOption(
        "block_state_zero",
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default. "
        "Blocks of a differencing image show the parent instead.",
        "on",
    ),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a new image is to be: places in bytes from the start of the file."""

    parameters: Parameters
    log: Region
    bat: Region
    metadata: Region
    zero_state: bool
    """Blocks begin as ZERO."""
    backing_file: str | None

    @property
    def data_offset(self) -> int:
        """Where blocks can be."""
        return self.metadata.end

    @property
    def end(self) -> int:
        """The size of the file."""
        fixed = self.parameters.leave_allocated
        return self.data_offset + (self.parameters.blocks * self.parameters.block_size if fixed else 0)


def plan_image(size: int, options: Mapping[str, str]) -> Plan:
    """The image that ``create_vhdx`` would make. ConfigError for what cannot be; nothing is touched."""
    size = align_up(size, SECTOR_SIZE)
    if size > layout.MAX_SIZE:
        raise ConfigError("Image size too large; max of 64TB")
    backing_file = options.get("backing_file") or None
    subformat = options.get("subformat", "differencing" if backing_file else "dynamic")
    if subformat not in ("dynamic", "fixed", "differencing"):
        raise ConfigError(f"subformat={subformat}: expects dynamic, fixed or differencing")
    if (subformat == "differencing") != (backing_file is not None):
        raise ConfigError(f"subformat={subformat}: a differencing image has a backing_file, and no other has")
    if backing_file is not None and options.get("backing_fmt") != "vhdx":
        raise ConfigError(f"backing_fmt={options.get('backing_fmt')}: the parent of a VHDX image is a VHDX image")
    zero_state = parse_boolean(options, "block_state_zero", "on")
    parameters = Parameters(
        size=size,
        block_size=_block_size(options, size, differencing=backing_file is not None),
        leave_allocated=subformat == "fixed",
        has_parent=backing_file is not None,
    )
    if backing_file is not None:
        locator_for(backing_file, NO_GUID)
    return _place(parameters, _log_size(options), backing_file, zero_state=zero_state)


def _place(parameters: Parameters, log_size: int, backing_file: str | None, *, zero_state: bool) -> Plan:
    log = Region(NO_GUID, layout.HEAD_LENGTH, log_size)
    # Room for the last sector bitmap too, so that the table is the same for a differencing image.
    entries = replace(parameters, has_parent=True).bat_entries
    bat = Region(layout.BAT_REGION, log.end, max(MIB, align_up(entries * 8, MIB)))
    metadata = Region(layout.METADATA_REGION, bat.end, MIB)
    return Plan(parameters, log, bat, metadata, zero_state, backing_file)


def _bytes(options: Mapping[str, str], name: str) -> int:
    try:
        return parse_size(options.get(name, "0"))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _block_size(options: Mapping[str, str], size: int, *, differencing: bool) -> int:
    """As qemu-img: 0 chooses by the size of the disk, and what is out of range becomes the nearest that is not."""
    block_size = _bytes(options, "block_size")
    if not block_size:
        if differencing:
            return DIFFERENCING_BLOCK_SIZE
        for least, chosen in ((32 * TIB, 64 * MIB), (100 * GIB, 32 * MIB), (GIB, 16 * MIB)):
            if size > least:
                return chosen
        return 8 * MIB
    block_size = min(max(block_size, layout.MIN_BLOCK_SIZE), layout.MAX_BLOCK_SIZE)
    if not is_power_of_two(block_size):
        raise ConfigError(f"block_size={block_size}: Block size must be a power of two")
    return block_size


def _log_size(options: Mapping[str, str]) -> int:
    log_size = max(MIB, align_up(_bytes(options, "log_size"), MIB))
    if log_size >= 4 * GIB:
        raise ConfigError(f"log_size={log_size}: Log size must be smaller than 4 GB")
    return log_size


async def create_vhdx(
    storage: Storage,
    size: int,
    options: Mapping[str, str],
    parent: Structure | None = None,
    *,
    sector_size: int = SECTOR_SIZE,
) -> None:
    """Make ``storage`` an empty image of ``size`` bytes (rounded up to whole sectors).

    ``parent`` is the structure of the open parent, which a differencing image is made for. ``sector_size``: the logical
    one, where there is no parent that says. The signature is written last and behind a barrier: at every moment before,
    the file is not a VHDX image, and from then on it is a complete one.
    """
    plan = plan_image(size, options)
    parameters = replace(plan.parameters, disk_id=uuid4(), sector_size=sector_size)
    locator = b""
    if plan.backing_file is not None:
        if parent is None:
            raise ConfigError(
                f"backing_file={plan.backing_file}: a differencing VHDX image holds the identity of its parent, "
                "so that has to be opened"
            )
        sector_size = parent.parameters.sector_size
        parameters = replace(parameters, sector_size=sector_size, disk_id=parent.parameters.disk_id)
        try:
            locator = locator_for(plan.backing_file, parent.header.data_write_guid).build()
        except ValueError as error:
            raise ConfigError(f"backing_file={plan.backing_file}: {error}") from None
    parameters = replace(
        parameters, size=align_up(plan.parameters.size, sector_size), physical_sector_size=max(512, sector_size)
    )
    plan = _place(parameters, plan.log.length, plan.backing_file, zero_state=plan.zero_state)
    await storage.truncate(0)
    await storage.truncate(plan.end)
    if not storage.grows_zeroed:
        await storage.zero(0, plan.end)
    await _write_bat(storage, plan)
    await storage.write(plan.metadata.offset, layout.build_metadata(parameters, locator))
    table = layout.build_region_table((plan.bat, plan.metadata))
    for offset in layout.REGION_TABLE_OFFSETS:
        await storage.write(offset, table)
    header = Header(1, uuid4(), uuid4(), NO_GUID, plan.log.offset, plan.log.length)
    await storage.write(layout.HEADER_OFFSETS[0], header.build())
    await storage.write(layout.HEADER_OFFSETS[1], header.next().build())
    await storage.flush()
    # Only a complete image gets its signature: a crash before this leaves a file that nobody takes for VHDX.
    await storage.write(0, layout.build_file_identifier(CREATOR))
    await storage.flush()


async def _write_bat(storage: Storage, plan: Plan) -> None:
    """The state of every block; entries of sector bitmaps, and whole tables of 0, are there already."""
    parameters = plan.parameters
    if parameters.has_parent or not (parameters.leave_allocated or plan.zero_state):
        return
    group = parameters.chunk_ratio + 1
    for first in range(0, parameters.bat_entries, _CHUNK_ENTRIES):
        index = np.arange(first, min(first + _CHUNK_ENTRIES, parameters.bat_entries), dtype=np.uint64)
        if parameters.leave_allocated:
            block = index - index // np.uint64(group)
            entries = np.uint64(plan.data_offset) + block * np.uint64(parameters.block_size) + np.uint64(FULLY_PRESENT)
        else:
            entries = np.full(len(index), ZERO_STATE, np.uint64)
        entries[index % np.uint64(group) == group - 1] = 0
        await storage.write(plan.bat.offset + first * 8, entries.astype("<u8").tobytes())
