"""Pages of a one-level map, what a commit takes from it, and what a scan finds."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nbdserve.formats.flat_map import PAGE_WORDS, FlatMap, Scan
from nbdserve.formats.ordered_commit import Batch, Piece
from nbdserve.formats.tables import AnyWords
from nbdserve.storage.memory import MemoryStorage

FREE = 0xFFFF_FFFF


def _map(words: list[int] | np.ndarray, at: int = 512) -> FlatMap:
    return FlatMap(MemoryStorage(bytes(at) + np.array(words, "<u4").tobytes()), at, len(words))


def _units(words: AnyWords) -> tuple[np.ndarray, np.ndarray]:
    units = words.astype(np.int64)
    units[units == 77] = -1
    return units, words != FREE


async def _scan(words: list[int] | np.ndarray, limit: int = 1000) -> Scan:
    return await _map(words).scan(_units, limit)


async def test_a_page_is_read_once_for_all_who_wait() -> None:
    table = _map(np.arange(2 * PAGE_WORDS + 10))
    assert table.pages == 3 and table.find(1) is None
    first, second = await asyncio.gather(table.load(1), table.load(1))
    assert first is second is table.find(1)
    assert first.entries[0] == PAGE_WORDS and len(first.entries) == PAGE_WORDS
    assert len((await table.load(2)).entries) == 10


async def test_words_are_those_in_memory() -> None:
    table = _map(np.arange(40 * PAGE_WORDS))
    await table.set(17 * PAGE_WORDS + 3, 5)
    found = [words async for _, words in table.words(10, 39 * PAGE_WORDS)]
    expected = np.arange(40 * PAGE_WORDS)
    expected[17 * PAGE_WORDS + 3] = 5
    assert len(found) == 3
    assert (np.concatenate(found) == expected[10 : 39 * PAGE_WORDS]).all()
    assert [words async for _, words in table.words(5, 5)] == []


async def test_a_commit_takes_the_sectors_that_changed_and_gives_them_back_when_it_fails() -> None:
    table = _map(np.arange(PAGE_WORDS))
    await table.set(0, 9)
    await table.set(2000, 9)

    async def barrier(pieces: list[Piece]) -> None:
        raise AssertionError

    batch = Batch()
    stage = batch.stage(barrier)
    table.collect(batch, stage)
    assert [offset for offset, _ in stage.pieces] == [512, 512 + 15 * 512]
    assert not table.cache.changed
    for undo in stage.undo:
        undo()
    again = Batch().stage(barrier)
    table.collect(Batch(), again)
    assert again.pieces == stage.pieces


async def test_scan_counts() -> None:
    found = await _scan([FREE, 3, 4, FREE, 9, 10])
    assert (found.blocks, found.allocated, found.fragmented, found.end) == (6, 4, 0, 11)
    assert found.used.tolist() == [3, 4, 9, 10]
    assert found.holes() == [(0, 3), (5, 4)]
    assert found.holes(2) == [(2, 1), (5, 4)]
    assert found.duplicates == found.outside == []
    for words, breaks in (([5, 4, 3], 2), ([1, 2, 4, 5], 1), ([7, FREE, 1], 0)):
        assert (await _scan(words)).fragmented == breaks
    empty = await _scan([FREE] * 3)
    assert (empty.allocated, empty.end, empty.holes()) == (0, 0, [])


@pytest.mark.parametrize("gap", [0, PAGE_WORDS, 20 * PAGE_WORDS])
async def test_scan_finds_what_shares_a_unit(gap: int) -> None:
    words = np.full(gap + 4, FREE)
    words[[0, 1]] = 7, 8
    words[[gap + 2, gap + 3]] = 8, 7
    assert (await _scan(words)).duplicates == [gap + 2, gap + 3]


async def test_scan_finds_what_is_outside() -> None:
    found = await _scan([0, 1000, 999, 77, 1])
    assert found.outside == [1, 3]
    assert (found.allocated, found.end) == (5, 1000)
