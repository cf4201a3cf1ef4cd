"""Growing a VHDX image: a larger size in its metadata, and a table that has room for it.

Entries past the end of the disk mean nothing, and neither does a table no region names. So both are written in place,
and one log entry then changes size and regions together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.formats.tables import Piece
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, Parameters, Region
from nbdserve.formats.vhdx.layout import ZERO as ZERO_STATE
from nbdserve.formats.vhdx.pages import ChangedPages
from nbdserve.formats.vhdx.structure import Structure
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, align_up

if TYPE_CHECKING:
    from nbdserve.formats.vhdx.driver import VhdxDriver

_CHUNK: Final = MIB


def grown(parameters: Parameters, size: int) -> Parameters:
    """The parameters with a disk of ``size`` bytes, rounded up to whole sectors. ConfigError."""
    size = align_up(size, parameters.sector_size)
    if size < parameters.size:
        raise ConfigError(f"the disk has {parameters.size} bytes, and VHDX images cannot be made smaller ({size})")
    if size > layout.MAX_SIZE:
        raise ConfigError(f"size {size}: VHDX images have at most 64 TiB")
    return replace(parameters, size=size)


async def write_rest_of_last_block(driver: VhdxDriver, end: int) -> None:
    """The part of the last block that was past the end of the disk, up to the guest offset ``end``, holds zeroes.

    Otherwise what its place in the file holds would show, or what a longer parent has there.
    """
    offset = driver.size
    while offset < end:
        run = driver.lookup(offset, end - offset)
        if run is None:
            await driver.load(offset)
            continue
        kind, length, host_offset = run
        if kind == DATA:
            await driver.storage.zero(host_offset, length, unmap=False)
        elif kind == UNALLOCATED and driver.has_backing:
            if driver.structure.locator is None:
                raise ConfigError(
                    f"{driver.path}: what its last block has past the end of the disk is in the layer below; "
                    "write something to that block first"
                )
            length = await _write_zeroes(driver, offset, length)
        offset += length


async def _write_zeroes(driver: VhdxDriver, offset: int, length: int) -> int:
    while (allocation := driver.allocate(offset, length)) is None:
        await driver.prepare(offset, length)
    await driver.storage.zero(allocation.host_offset, allocation.length, unmap=False)
    driver.publish(allocation)
    return allocation.length


async def place_table(
    storage: Storage, structure: Structure, wanted: Parameters, place: Region, blocks_at: int
) -> None:
    """The table for ``wanted``, in the region ``place``: the entries there are, and those of the new blocks.

    New blocks are zeroes; those of a fixed image lie one behind the other from the host offset ``blocks_at``.
    """
    old = structure.parameters
    if place.offset != structure.bat.offset:
        await _copy(storage, structure.bat.offset, place.offset, old.bat_entries * 8)
    group = old.chunk_ratio + 1
    first = old.bat_entries
    while first < wanted.bat_entries:
        index = np.arange(first, min(first + _CHUNK // 8, wanted.bat_entries), dtype=np.uint64)
        if old.leave_allocated:
            block = index - index // np.uint64(group) - np.uint64(old.blocks)
            entries = np.uint64(blocks_at) + block * np.uint64(old.block_size) + np.uint64(FULLY_PRESENT)
        else:
            entries = np.full(len(index), ZERO_STATE, np.uint64)
        entries[index % np.uint64(group) == group - 1] = 0
        await storage.write(place.offset + first * 8, entries.astype("<u8").tobytes())
        first += len(index)
    if old.has_parent:
        await _clear_payload_past_the_end(storage, structure, wanted, place)


async def _clear_payload_past_the_end(
    storage: Storage, structure: Structure, wanted: Parameters, place: Region
) -> None:
    """In the table of a differencing image, the last chunk had entries for blocks past the end of the disk."""
    old = structure.parameters
    start, stop = old.bat_index(old.blocks - 1) + 1 if old.blocks else 0, old.chunks * (old.chunk_ratio + 1) - 1
    if start < stop:
        entries = np.full(stop - start, ZERO_STATE, "<u8")
        await storage.write(place.offset + start * 8, entries.tobytes())
    assert wanted.chunks >= old.chunks


async def _copy(storage: Storage, source: int, target: int, length: int) -> None:
    """Copy inside the file; what is a hole there stays one here (the target reads as zeroes)."""
    at = 0
    while at < length:
        runs = await storage.host_map(source + at, length - at)
        for start, size, kind in zip(runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), strict=True):
            if kind == ZERO:
                continue
            for position in range(start, start + size, _CHUNK):
                part = min(_CHUNK, start + size - position)
                await storage.write(target + position - source, await storage.read(position, part))
        at = int(runs.start[-1] + runs.length[-1]) - source


async def change_pages(storage: Storage, structure: Structure, wanted: Parameters, bat: Region) -> list[Piece]:
    """The pages, as they are to be, that make the disk as large as ``wanted`` and the table that in ``bat``."""
    pages = ChangedPages(storage)
    place = structure.metadata.offset + structure.items[layout.VIRTUAL_DISK_SIZE].offset
    await pages.put(place, wanted.size.to_bytes(8, "little"))
    if bat != structure.bat:
        regions = [bat if region.guid == layout.BAT_REGION else region for region in structure.regions]
        for offset in layout.REGION_TABLE_OFFSETS:
            await pages.put(offset, layout.build_region_table(regions))
    return pages.pieces()
