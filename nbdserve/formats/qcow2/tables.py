"""L1 and L2 tables in memory: native 64-bit words, indexed as Python ints, with their dirty sectors.

A table is decoded from big endian once (numpy, 8 us for 64 KiB) and indexed through a memoryview (40 ns, a numpy
scalar costs 100).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.storage.base import ReadBuffer
from nbdserve.units import MIB, SECTOR_SIZE

Words: TypeAlias = npt.NDArray[np.uint64]
Piece: TypeAlias = tuple[int, ReadBuffer]
"""``(host_offset, bytes)`` to be written."""

CACHE_BYTES: Final = 32 * MIB
WORDS_PER_SECTOR_BITS: Final = 6
"""log2 of the 64 words in a 512-byte sector, the unit tables are written back in."""
_SECTORS_PER_PAGE: Final = 8
_TABLE_OVERHEAD: Final = 1024
"""Bytes of objects per cached table, which is what counts with 512-byte clusters."""


def decode_words(data: ReadBuffer) -> Words:
    """Native words of a table as stored; a copy that may be changed."""
    return np.frombuffer(data, ">u8").astype(np.uint64)


def encode_words(words: Words) -> bytes:
    """The stored form of ``words``."""
    return words.astype(">u8").tobytes()


def sector_runs(sectors: Iterable[int]) -> list[tuple[int, int]]:
    """``[first, end)`` of runs that cover ``sectors``; those less than a page apart share a run.

    The sectors between them are written as they are on disk already, which costs less than a write of their own.
    """
    runs: list[tuple[int, int]] = []
    for sector in sorted(sectors):
        if runs and sector - runs[-1][1] < _SECTORS_PER_PAGE:
            runs[-1] = (runs[-1][0], sector + 1)
        else:
            runs.append((sector, sector + 1))
    return runs


class Table:
    """Words at ``host_offset``, with the numbers of the 512-byte sectors that differ from the disk."""

    __slots__ = ("dirty", "entries", "host_offset", "words")

    def __init__(self, host_offset: int, words: Words) -> None:
        self.host_offset = host_offset
        self.words = words
        self.entries: memoryview[int] = words.data.cast("B").cast("Q")
        self.dirty: set[int] = set()

    def store(self, index: int, word: int) -> None:
        """Change one word."""
        self.entries[index] = word
        self.dirty.add(index >> WORDS_PER_SECTOR_BITS)

    def pieces(self, sectors: Iterable[int]) -> list[Piece]:
        """The stored form of these sectors as they are now."""
        result: list[Piece] = []
        for first, end in sector_runs(sectors):
            words = self.words[first << WORDS_PER_SECTOR_BITS : end << WORDS_PER_SECTOR_BITS]
            result.append((self.host_offset + first * SECTOR_SIZE, encode_words(words)))
        return result


class L2Table(Table):
    """An L2 table. ``fresh``: nothing of it is on disk yet. While ``pins`` is not 0 it stays in memory."""

    __slots__ = ("_changed", "fresh", "l1_index", "pins")

    def __init__(self, l1_index: int, host_offset: int, words: Words, changed: set[L2Table]) -> None:
        super().__init__(host_offset, words)
        self.l1_index = l1_index
        self.fresh = False
        self.pins = 0
        self._changed = changed

    def relocate(self, host_offset: int) -> None:
        """The table now belongs at ``host_offset``, where nothing of it is yet."""
        self.host_offset = host_offset
        self.fresh = True
        self._changed.add(self)

    def unpin(self) -> None:
        """Let go of it."""
        self.pins -= 1

    def touch(self, first: int, end: int) -> None:
        """The words ``[first, end)`` were changed."""
        self.dirty.update(range(first >> WORDS_PER_SECTOR_BITS, (end - 1 >> WORDS_PER_SECTOR_BITS) + 1))
        self._changed.add(self)


class L2Cache:
    """L2 tables by L1 index, in two generations: a hit in ``recent`` costs one dict access and no bookkeeping.

    When ``recent`` is full it becomes the old generation, and what was old and not used meanwhile is dropped. Tables
    that differ from the disk, or are pinned, stay.
    """

    def __init__(self, table_bytes: int, limit: int = CACHE_BYTES) -> None:
        self.recent: dict[int, L2Table] = {}
        self.changed: set[L2Table] = set()
        """The tables that differ from the disk."""
        self._old: dict[int, L2Table] = {}
        self._table_bytes = table_bytes
        self._generation = max(4, limit // 2 // (table_bytes + _TABLE_OVERHEAD))

    @property
    def crowded(self) -> bool:
        """So many tables differ from the disk that they should be written back before more do."""
        return len(self.changed) > self._generation

    def find(self, l1_index: int) -> L2Table | None:
        """The table, which then counts as recently used."""
        table = self.recent.get(l1_index)
        if table is None:
            table = self._old.pop(l1_index, None)
            if table is not None:
                self.add(table)
        return table

    def peek(self, l1_index: int) -> L2Table | None:
        """The table, without changing what is dropped next."""
        return self.recent.get(l1_index) or self._old.get(l1_index)

    def add(self, table: L2Table) -> None:
        """Keep ``table``, which was not here."""
        if len(self.recent) >= self._generation:
            kept = {index: old for index, old in self._old.items() if old.pins or old in self.changed}
            self._old = kept | self.recent
            self.recent.clear()
        self.recent[table.l1_index] = table

    def create(self, l1_index: int, host_offset: int, words: Words) -> L2Table:
        """Add a table with these words, which are those on disk."""
        table = L2Table(l1_index, host_offset, words, self.changed)
        self.add(table)
        return table
