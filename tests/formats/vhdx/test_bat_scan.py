"""The table as columns, and where new blocks may be."""

from __future__ import annotations

import numpy as np
import pytest

from nbdserve.errors import CorruptImageError
from nbdserve.formats.vhdx.bat_scan import decode_entries, end_of_blocks, scan
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, PARTIALLY_PRESENT, UNMAPPED
from nbdserve.formats.vhdx.structure import read_structure
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, MIB
from tests.formats.vhdx.helpers import child_of, made, put_entry


async def _sparse(size: int) -> MemoryStorage:
    return await made(size, "block_size=1M,block_state_zero=off")


async def test_holes_of_the_table_are_passed_over() -> None:
    storage = await _sparse(64 << 40)
    for index in (5, 40_000_000):
        await put_entry(storage, index, 4 * MIB | FULLY_PRESENT)
    found, rows = [], 0
    async for entries in scan(storage, await read_structure(storage)):
        found += entries.index[entries.placed].tolist()
        rows += len(entries.index)
    assert found == [5, 40_000_000]
    assert rows < 100_000


async def test_every_entry_is_seen_once() -> None:
    storage = await made(9 * GIB, "block_size=1M")  # with states of their own, so that there are no holes
    seen = [index async for entries in scan(storage, await read_structure(storage)) for index in entries.index.tolist()]
    structure = await read_structure(storage)
    assert seen == list(range(structure.parameters.bat_entries))


async def test_columns() -> None:
    structure = await read_structure(await made(20 * GIB, "block_size=1M"))
    ratio = structure.parameters.chunk_ratio
    words = np.array([3 * MIB | 6, 0xFFFF_FFFF_FFF0_0007, 5 * MIB | 6, 2], np.uint64)
    entries = decode_entries(words, ratio - 1, structure)
    assert entries.index.tolist() == [ratio - 1, ratio, ratio + 1, ratio + 2]
    assert entries.is_bitmap.tolist() == [False, True, False, False]
    assert entries.state.tolist() == [6, 7, 6, 2]
    assert entries.host_offset.tolist() == [3 * MIB, 1 << 62, 5 * MIB, 0]
    assert entries.placed.tolist() == [True, False, True, False]
    assert entries.lengths(structure).tolist() == [MIB] * 4


async def test_new_blocks_are_behind_everything() -> None:
    storage = await made(20 * MIB, "block_size=4M")
    structure = await read_structure(storage)
    assert await end_of_blocks(storage, structure) == storage.size
    await storage.truncate(9 * MIB + 100)
    assert await end_of_blocks(storage, structure) == 10 * MIB
    await put_entry(storage, 0, 9 * MIB | FULLY_PRESENT)  # cut by the end of the file
    assert await end_of_blocks(storage, structure) == 13 * MIB
    await put_entry(storage, 1, 100 * MIB | UNMAPPED)  # a place that means nothing in this state
    assert await end_of_blocks(storage, structure) == 13 * MIB


@pytest.mark.parametrize("place", [0, MIB, 2 * MIB, 3 * MIB, 100 * MIB, (1 << 44) - 1 << 20])
async def test_blocks_where_they_cannot_be(place: int) -> None:
    storage = await made(20 * MIB, "block_size=4M")
    await storage.truncate(20 * MIB)
    await put_entry(storage, 2, place | FULLY_PRESENT)
    with pytest.raises(CorruptImageError, match="BAT entry 2") as caught:
        await end_of_blocks(storage, await read_structure(storage))
    assert caught.value.value == min(place, 1 << 62)


async def test_sector_bitmaps_have_a_length_of_their_own() -> None:
    child = await child_of(await made(20 * MIB), 20 * MIB, "block_size=256M")
    structure = await read_structure(child)
    await child.truncate(8 * MIB)
    await put_entry(child, structure.parameters.bitmap_index(0), 7 * MIB | FULLY_PRESENT)
    assert await end_of_blocks(child, structure) == 8 * MIB
    await put_entry(child, 0, 7 * MIB | PARTIALLY_PRESENT)
    assert await end_of_blocks(child, structure) == 263 * MIB
