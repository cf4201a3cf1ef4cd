"""``check``: headers, region tables, log, and every block of a VHDX image, compared with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ImageError
from nbdserve.extents import Int64Array
from nbdserve.formats.base import CheckResult
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.bat_scan import Entries, scan
from nbdserve.formats.vhdx.layout import (
    FULLY_PRESENT,
    NO_GUID,
    NOT_PRESENT,
    PARTIALLY_PRESENT,
    UNMAPPED,
    Header,
)
from nbdserve.formats.vhdx.replay import write_replayed
from nbdserve.formats.vhdx.structure import HeaderWriter, Structure, read_copies, refuse_writing
from nbdserve.storage.base import Storage

if TYPE_CHECKING:
    from nbdserve.formats.vhdx.image import VhdxImage

_MOST_MESSAGES = 20


async def check_vhdx(driver: VhdxImage, *, repair: bool) -> CheckResult:
    """Judge the image as its driver has it: with the log replayed.

    A log that is still to be replayed is no error: it is what the image says. ``repair`` replays it for good, and
    writes copies of headers and region tables that are damaged anew.
    """
    result = CheckResult()
    structure = driver.structure
    await _check_copies(driver.storage, driver.data, structure, result)
    if structure.overlay is not None:
        pages = len(structure.overlay.pages)
        result.messages.append(f"the log holds {pages} pages that are not in their place yet (-r all replays it)")
    await _check_blocks(driver, result)
    result.image_end_offset = driver.data.size
    if repair:
        await _repair(driver, result)
    return result


async def _check_copies(storage: Storage, file: Storage, structure: Structure, result: CheckResult) -> None:
    """Both headers and both region tables should be valid: there are two in case one is lost."""
    copies = await read_copies(storage, layout.HEADER_OFFSETS, layout.HEADER_LENGTH)
    for number, data in enumerate(copies, 1):
        if Header.parse(data) is None:
            # A header write that was torn leaves this, and so it is no corruption: the other one is meant for it.
            result.messages.append(f"header {number} is not valid, the other one is used")
    tables = await read_copies(file, layout.REGION_TABLE_OFFSETS, layout.REGION_TABLE_LENGTH)
    for number, data in enumerate(tables, 1):
        if not _says_the_same(data, structure):
            result.corruptions += 1
            result.messages.append(f"region table {number} is not valid, or not the same as the other one")


def _says_the_same(data: bytes, structure: Structure) -> bool:
    try:
        return layout.parse_region_table((data, data), "", 1 << 62) == structure.regions
    except ImageError:
        return False


async def _check_blocks(driver: VhdxImage, result: CheckResult) -> None:
    structure, file = driver.structure, driver.data
    parameters = structure.parameters
    places: list[tuple[Int64Array, Int64Array, Int64Array]] = []
    bitmaps = np.zeros(parameters.chunks, np.bool_)
    partial = np.zeros(parameters.chunks, np.bool_)
    async for entries in scan(file, structure):
        if not (entries.state != NOT_PRESENT).any():
            continue
        _check_states(entries, structure, result)
        placed = entries.placed
        index, host_offset, length = (
            entries.index[placed],
            entries.host_offset[placed],
            entries.lengths(structure)[placed],
        )
        result.allocated_clusters += int((placed & ~entries.is_bitmap).sum())
        needed = _needed(index, entries.is_bitmap[placed], length, structure)
        _report(
            result,
            index[host_offset + needed > file.size],
            "the block is past the end of the file: the image has probably been truncated",
        )
        for start, stop in structure.places():
            clash = (host_offset < stop) & (start < host_offset + length)
            _report(result, index[clash], "the block is where the image's own tables are")
        places.append((index, host_offset, length))
        group = parameters.chunk_ratio + 1
        chunk = entries.index // group
        bitmaps[chunk[entries.is_bitmap & placed]] = True
        partial[chunk[~entries.is_bitmap & (entries.state == PARTIALLY_PRESENT)]] = True
    result.total_clusters = parameters.blocks
    if parameters.has_parent:
        lacking = np.flatnonzero(partial & ~bitmaps)
        _report(result, parameters.bitmap_index(0) + lacking * (parameters.chunk_ratio + 1), "no sector bitmap")
    _check_overlaps(places, result)


def _needed(
    index: Int64Array, is_bitmap: npt.NDArray[np.bool_], length: Int64Array, structure: Structure
) -> Int64Array:
    """Bytes of each block that the file must have: the last one of the disk may be cut where the disk ends."""
    parameters = structure.parameters
    block = index - index // (parameters.chunk_ratio + 1)
    rest = np.minimum(parameters.size - block * parameters.block_size, length)
    return np.where(is_bitmap, length, rest)


def _check_states(entries: Entries, structure: Structure, result: CheckResult) -> None:
    valid = entries.state == FULLY_PRESENT
    valid |= np.where(entries.is_bitmap, entries.state == NOT_PRESENT, entries.state <= UNMAPPED)
    if structure.parameters.has_parent:
        valid |= ~entries.is_bitmap & (entries.state == PARTIALLY_PRESENT)
    else:
        valid &= ~(entries.is_bitmap & (entries.state != NOT_PRESENT))
    _report(result, entries.index[~valid], "the state is none there is")


def _check_overlaps(places: list[tuple[Int64Array, Int64Array, Int64Array]], result: CheckResult) -> None:
    """Two blocks that share space: a write to one changes the other."""
    if not places:
        return
    index, host_offset, length = (np.concatenate(column) for column in zip(*places, strict=True))
    order = np.argsort(host_offset, kind="stable")
    index, host_offset, length = index[order], host_offset[order], length[order]
    reach = np.maximum.accumulate(host_offset + length)
    shared = host_offset[1:] < reach[:-1]
    _report(result, index[1:][shared], "the block shares space with another one")


def _report(result: CheckResult, index: Int64Array, problem: str) -> None:
    result.corruptions += len(index)
    for number in index[: max(0, _MOST_MESSAGES - len(result.messages))].tolist():
        result.messages.append(f"BAT entry {number}: {problem}")


async def _repair(driver: VhdxImage, result: CheckResult) -> None:
    """Replay the log, then write the damaged copies anew; each step leaves an image that says the same."""
    storage, structure = driver.storage, driver.structure
    refuse_writing(storage)
    headers = HeaderWriter(storage, structure.header, structure.header_copy)
    if structure.overlay is not None:
        await write_replayed(structure.overlay)
        result.corruptions_fixed += 1
        result.messages.append("the log was replayed")
    tables = await read_copies(storage, layout.REGION_TABLE_OFFSETS, layout.REGION_TABLE_LENGTH)
    for number, (offset, data) in enumerate(zip(layout.REGION_TABLE_OFFSETS, tables, strict=True)):
        if not _says_the_same(data, structure):
            await storage.write_stable([(offset, tables[1 - number])])
            result.corruptions -= 1
            result.corruptions_fixed += 1
    copies = await read_copies(storage, layout.HEADER_OFFSETS, layout.HEADER_LENGTH)
    renew = any(Header.parse(data) is None for data in copies)
    if renew or structure.header.log_guid != NO_GUID:
        result.corruptions_fixed += renew
        await headers.update(file_write_guid=uuid4(), log_guid=NO_GUID)
