"""The whole mapping as runs, vectorised: the table is decoded with numpy, a part at a time."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

import numpy as np

from nbdserve.errors import RequestError
from nbdserve.extents import DATA, UNALLOCATED, ZERO, RunArray, RunStream
from nbdserve.formats.vhdx.bat_scan import Entries, decode_entries
from nbdserve.formats.vhdx.image import TABLE_BYTES, TABLE_ENTRY_BITS
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT, UNMAPPED
from nbdserve.units import MIB

if TYPE_CHECKING:
    from nbdserve.formats.vhdx.driver import VhdxDriver

_ENTRIES = 1 << TABLE_ENTRY_BITS


async def iter_runs(driver: VhdxDriver, start: int, end: int) -> RunStream:
    """See ``FormatDriver.iter_runs``. ``[start, end)`` is inside the disk."""
    parameters = driver.structure.parameters
    block_size = parameters.block_size
    while start < end:
        index = parameters.bat_index(start // block_size)
        words = (await driver.load_bat(index)).words.astype(np.uint64)
        first = index >> TABLE_ENTRY_BITS << TABLE_ENTRY_BITS
        entries = decode_entries(words[: max(0, parameters.bat_entries - first)], first, driver.structure)
        runs = _payload_runs(driver, entries, start, end)
        async for piece in driver.split_partial(runs):
            yield piece
        start = int(runs.start[-1] + runs.length[-1])
        await asyncio.sleep(0)


def _payload_runs(driver: VhdxDriver, entries: Entries, start: int, end: int) -> RunArray:
    """The blocks of one part of the table, cut to ``[start, end)``; one that is here in part is PARTIAL."""
    block_size, group = driver.cluster_size, driver.structure.parameters.chunk_ratio + 1
    payload = ~entries.is_bitmap
    index = entries.index[payload]
    starts = (index - index // group) * block_size
    inside = (starts + block_size > start) & (starts < end)
    starts, state = starts[inside], entries.state[payload][inside]
    host_offset = entries.host_offset[payload][inside]
    here = (state == FULLY_PRESENT) | (state == PARTIALLY_PRESENT)
    host_offset[~here] = -1
    skipped = np.maximum(start - starts, 0)
    lengths = np.minimum(starts + block_size, end) - starts - skipped
    host_offset[here] += skipped[here]
    bad = (state > UNMAPPED) & ~here
    bad |= here & ((host_offset < MIB) | (host_offset + lengths > driver.host_limit))
    if not driver.structure.parameters.has_parent:
        bad |= state == PARTIALLY_PRESENT
    if bad.any():
        at = int(bad.argmax())
        raise RequestError(
            errno.EIO, f"{driver.path}: invalid BAT entry for guest offset {int(starts[at]):#x} (state {state[at]})"
        )
    kind = np.full(len(starts), ZERO, np.uint8)
    kind[state == NOT_PRESENT] = UNALLOCATED
    kind[here] = DATA
    kind[state == PARTIALLY_PRESENT] = PARTIAL
    return RunArray(starts + skipped, lengths, kind, host_offset)


PARTIAL = 255
"""The kind of a block whose sector bitmap is still to be asked."""

assert TABLE_BYTES == _ENTRIES * 8
