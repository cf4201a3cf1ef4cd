"""A map with one level: a word for each block of the disk, in one table. A page of it is in memory when it is used.

What the words mean is the format's; ``scan`` only asks which unit of the file a word refers to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.extents import Int64Array
from nbdserve.formats.ordered_commit import Batch, Piece, Stage
from nbdserve.formats.tables import AnyWords, L2Cache, L2Table, StoredForm, decode_table
from nbdserve.storage.base import Storage
from nbdserve.units import div_ceil

PAGE_BITS: Final = 14
"""log2 of the words in a page, 64 KiB of them."""
PAGE_WORDS: Final = 1 << PAGE_BITS
PAGE_MASK: Final = PAGE_WORDS - 1
_WORD: Final = 4
_BATCH_PAGES: Final = 16
"""Pages decoded in one turn of the event loop (256 Ki words)."""
MAX_LISTED: Final = 1 << 16
"""Faulty blocks a scan lists; there may be more."""


UnitsOf: TypeAlias = Callable[[AnyWords], tuple[Int64Array, npt.NDArray[np.bool_]]]
"""The unit each word refers to (a negative one is outside), and which of the words refer to one. Units fit 32 bits."""


@dataclass(slots=True)
class Scan:
    """What the words of a map refer to, in units of the file."""

    blocks: int = 0
    allocated: int = 0
    """Words that refer to a unit."""
    fragmented: int = 0
    """Of these, those whose word before refers to a unit too, but not to the one before (QEMU's count)."""
    end: int = 0
    """The unit behind the last one referred to (outside ones not counted)."""
    used: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    """Every unit referred to, ascending, once."""
    duplicates: list[int] = field(default_factory=list)
    """Blocks whose unit an earlier block refers to."""
    outside: list[int] = field(default_factory=list)
    """Blocks whose word refers to no possible unit."""

    def holes(self, first: int = 0) -> list[tuple[int, int]]:
        """``(first unit, count)`` of what nothing refers to, from the unit ``first`` to the last one referred to."""
        used = np.concatenate(([first - 1], self.used[np.searchsorted(self.used, first) :].astype(np.int64)))
        gaps = np.diff(used) - 1
        at = np.flatnonzero(gaps)
        return list(zip((used[at] + 1).tolist(), gaps[at].tolist(), strict=True))


class FlatMap:
    """``count`` words of 4 bytes at ``host_offset`` of ``storage``."""

    def __init__(self, storage: Storage, host_offset: int, count: int, stored: StoredForm = "<u4") -> None:
        self.host_offset = host_offset
        """Where it is read from. A driver may change it to where it has written the same map."""
        self.count = count
        self.cache = L2Cache(PAGE_WORDS * _WORD, stored=stored)
        self.recent = self.cache.recent
        """Pages by number; one that is not here may still be found by ``find``."""
        self._storage = storage
        self._stored: StoredForm = stored
        self._loading: dict[int, asyncio.Task[L2Table]] = {}

    @property
    def pages(self) -> int:
        """Pages of the whole map."""
        return div_ceil(self.count, PAGE_WORDS)

    def find(self, page: int) -> L2Table | None:
        """The page, if it is in memory."""
        return self.cache.find(page)

    async def load(self, page: int) -> L2Table:
        """The page, read if it is not in memory."""
        table = self.cache.find(page)
        if table is not None:
            return table
        task = self._loading.get(page)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._read_page(page))
            self._loading[page] = task
            task.add_done_callback(lambda _: self._loading.pop(page, None))
        return await asyncio.shield(task)

    async def _read_page(self, page: int) -> L2Table:
        words = await self._read(page, page + 1)
        return self.cache.find(page) or self.cache.create(page, page * PAGE_WORDS * _WORD, words)

    async def _read(self, first: int, end: int) -> AnyWords:
        length = min(self.count, end * PAGE_WORDS) * _WORD - first * PAGE_WORDS * _WORD
        stored = bytearray(length)
        host_offset = self.host_offset + first * PAGE_WORDS * _WORD
        if not self._storage.try_read_into(host_offset, memoryview(stored)):
            await self._storage.read_into(host_offset, memoryview(stored))
        return decode_table(stored, self._stored)

    async def words(self, first: int, end: int) -> AsyncIterator[tuple[int, AnyWords]]:
        """``(number of its first block, words)`` of the blocks ``[first, end)``, as they are in memory, in batches."""
        while first < end:
            page = first >> PAGE_BITS
            stop = min(div_ceil(end, PAGE_WORDS), page + _BATCH_PAGES)
            words = await self._read(page, stop)
            for number in range(page, stop):
                table = self.cache.peek(number)
                if table is not None:
                    at = (number - page) * PAGE_WORDS
                    words[at : at + len(table.words)] = table.words
            base = page * PAGE_WORDS
            until = min(end, stop * PAGE_WORDS)
            yield first, words[first - base : until - base]
            first = until
            await asyncio.sleep(0)

    def collect(self, batch: Batch, stage: Stage, host_offset: int | None = None) -> list[Piece]:
        """Put what differs from the disk into ``stage``, and count it as written.

        ``host_offset``: where the map is to be written, if not where it is read from. The pieces that were added, their
        offsets counted from the beginning of the map.
        """
        base = self.host_offset if host_offset is None else host_offset
        added: list[Piece] = []
        for table in self.cache.changed:
            table.pins += 1
            batch.finally_(table.unpin)
            sectors = frozenset(table.dirty)
            pieces = table.pieces(sectors)
            stage.add([(base + at, data) for at, data in pieces], partial(table.dirty.update, sectors))
            table.dirty.clear()
            stage.undo.append(partial(self.cache.changed.add, table))
            added += pieces
        self.cache.changed.clear()
        return added

    async def set(self, block: int, word: int) -> None:
        """Change one word in memory."""
        table = await self.load(block >> PAGE_BITS)
        table.store(block & PAGE_MASK, word)

    async def scan(self, units_of: UnitsOf, limit: int) -> Scan:
        """Look at every word. ``limit``: units the file can have; a word that refers further is *outside*."""
        result = Scan(self.count)
        chunks: list[npt.NDArray[np.uint32]] = []
        previous = -1
        async for first, words in self.words(0, self.count):
            units, placed = units_of(words)
            bad = placed & ((units < 0) | (units >= limit))
            result.outside += (np.flatnonzero(bad)[: MAX_LISTED - len(result.outside)] + first).tolist()
            result.allocated += int(placed.sum())
            places = np.concatenate(([previous], np.where(placed & ~bad, units, -1)))
            previous = int(places[-1])
            result.fragmented += int(((places[1:] >= 0) & (places[:-1] >= 0) & (np.diff(places) != 1)).sum())
            found = units[placed & ~bad]
            if len(found):
                chunks.append(found.astype(np.uint32))
        if chunks:
            everything = np.sort(np.concatenate(chunks))
            chunks.clear()
            again = everything[1:] == everything[:-1]
            shared = np.unique(everything[1:][again])
            result.used = everything[np.concatenate(([True], ~again))]
            result.end = int(everything[-1]) + 1
            if len(shared):
                await self._list_duplicates(units_of, shared, result.duplicates)
        return result

    async def _list_duplicates(self, units_of: UnitsOf, shared: npt.NDArray[np.uint32], duplicates: list[int]) -> None:
        seen: set[int] = set()
        async for first, words in self.words(0, self.count):
            units, placed = units_of(words)
            for at in np.flatnonzero(placed & np.isin(units, shared)).tolist():
                unit = int(units[at])
                if unit in seen and len(duplicates) < MAX_LISTED:
                    duplicates.append(first + at)
                seen.add(unit)
