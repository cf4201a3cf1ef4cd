"""Allocation tables in memory: native words, indexed as Python ints, with their dirty sectors. For every format.

A table is decoded from its stored form once (numpy, 8 us for 64 KiB) and indexed through a memoryview (40 ns, a numpy
scalar costs 100). A format with one table has a ``Table``; one with two levels has a ``Table`` of L2 tables and keeps
those it uses in an ``L2Cache``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.units import MIB, SECTOR_SIZE

Words: TypeAlias = npt.NDArray[np.uint64]
AnyWords: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
"""Native words of 4 or 8 bytes."""
StoredForm: TypeAlias = Literal[">u8", "<u8", ">u4", "<u4"]
"""How a word is on disk: byte order and bytes."""
Piece: TypeAlias = tuple[int, ReadBuffer]
"""``(host_offset, bytes)`` to be written."""

CACHE_BYTES: Final = 32 * MIB
_SECTORS_PER_PAGE: Final = 8
_TABLE_OVERHEAD: Final = 1024
"""Bytes of objects per cached table, which is what counts with 512-byte clusters."""


def decode_words(data: ReadBuffer) -> Words:
    """Native words of a table of big-endian u64; a copy that may be changed."""
    return np.frombuffer(data, ">u8").astype(np.uint64)


def encode_words(words: Words) -> bytes:
    """``words`` as big-endian u64."""
    return words.astype(">u8").tobytes()


def decode_table(data: ReadBuffer, stored: StoredForm) -> AnyWords:
    """Native words of a table as stored; a copy that may be changed."""
    return np.frombuffer(data, stored).astype(f"u{stored[2]}")


def decode_in_place(data: bytearray, stored: StoredForm) -> AnyWords:
    """As ``decode_table`` for a large table: the words take the place of what is in ``data``."""
    native = np.frombuffer(data, f"u{stored[2]}")
    if not np.dtype(stored).isnative:
        native.byteswap(inplace=True)
    return native


def run_from(entries: memoryview[int], index: int, end: int, run: int, length: int, unit: int, step: int) -> int:
    """Bytes, at most ``length``, that are one piece because each entry is by ``step`` more than the one before it.

    The entry at ``index`` stands for ``run`` bytes, each one after it and before ``end`` for ``unit``. It pays for
    itself where ``run`` is less than ``length``.
    """
    entry = entries[index] + step
    index += 1
    while run < length and index < end and entries[index] == entry:
        run += unit
        entry += step
        index += 1
    return run if run < length else length


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
    """Words at ``host_offset``, with the numbers of the 512-byte sectors that differ from the disk.

    ``words`` are native, of the size that ``stored`` says.
    """

    __slots__ = ("_sector_bits", "_stored", "dirty", "entries", "host_offset", "words")

    def __init__(self, host_offset: int, words: AnyWords, stored: StoredForm = ">u8") -> None:
        self.host_offset = host_offset
        self.words = words
        self.entries: memoryview[int] = words.data.cast("B").cast("Q" if words.itemsize == 8 else "I")
        self.dirty: set[int] = set()
        self._stored = stored
        self._sector_bits = 6 if words.itemsize == 8 else 7
        """log2 of the words in a sector, the unit tables are written back in."""

    def store(self, index: int, word: int) -> None:
        """Change one word."""
        self.entries[index] = word
        self.dirty.add(index >> self._sector_bits)

    def touch(self, first: int, end: int) -> None:
        """The words ``[first, end)`` were changed."""
        self.dirty.update(range(first >> self._sector_bits, (end - 1 >> self._sector_bits) + 1))

    def encode(self) -> bytes:
        """The stored form of the whole table as it is now."""
        return self.words.astype(self._stored).tobytes()

    def pieces(self, sectors: Iterable[int]) -> list[Piece]:
        """The stored form of these sectors as they are now."""
        result: list[Piece] = []
        bits = self._sector_bits
        for first, end in sector_runs(sectors):
            words = self.words[first << bits : end << bits].astype(self._stored)
            result.append((self.host_offset + first * SECTOR_SIZE, words.tobytes()))
        return result


class L2Table(Table):
    """An L2 table. ``fresh``: nothing of it is on disk yet. While ``pins`` is not 0 it stays in memory."""

    __slots__ = ("_changed", "fresh", "l1_index", "pins")

    def __init__(
        self, l1_index: int, host_offset: int, words: AnyWords, changed: set[L2Table], stored: StoredForm = ">u8"
    ) -> None:
        super().__init__(host_offset, words, stored)
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

    def store(self, index: int, word: int) -> None:
        """Change one word."""
        self.entries[index] = word
        self.dirty.add(index >> self._sector_bits)
        self._changed.add(self)

    def touch(self, first: int, end: int) -> None:
        """The words ``[first, end)`` were changed."""
        self.dirty.update(range(first >> self._sector_bits, (end - 1 >> self._sector_bits) + 1))
        self._changed.add(self)


class L2Cache:
    """L2 tables by L1 index, in two generations: a hit in ``recent`` costs one dict access and no bookkeeping.

    When ``recent`` is full it becomes the old generation, and what was old and not used meanwhile is dropped. Tables
    that differ from the disk, or are pinned, stay.
    """

    def __init__(self, table_bytes: int, limit: int = CACHE_BYTES, stored: StoredForm = ">u8") -> None:
        self.recent: dict[int, L2Table] = {}
        self.changed: set[L2Table] = set()
        """The tables that differ from the disk."""
        self._old: dict[int, L2Table] = {}
        self._stored: StoredForm = stored
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

    def create(self, l1_index: int, host_offset: int, words: AnyWords) -> L2Table:
        """Add a table with these words, which are those on disk."""
        table = L2Table(l1_index, host_offset, words, self.changed, self._stored)
        self.add(table)
        return table

    def drop(self, table: L2Table) -> None:
        """Forget ``table``, changed or not: nothing refers to it any more."""
        self.recent.pop(table.l1_index, None)
        self._old.pop(table.l1_index, None)
        self.changed.discard(table)


async def read_tables(
    storage: Storage,
    cache: L2Cache,
    numbers: range,
    size: int,
    place: Callable[[int], int],
    decode: Callable[[bytearray], AnyWords],
) -> AnyWords:
    """The words of these tables of ``size`` bytes, one behind the other, as they are in memory where they are.

    ``place`` is the host offset of a table that is not. Those side by side are read together, and none is kept.
    """
    stored = bytearray(len(numbers) * size)
    view = memoryview(stored)
    missing: list[tuple[int, int, int]] = []  # host offset of the first one, and ``[begin, stop)`` in ``stored``
    for begin, number in enumerate(numbers):
        if cache.peek(number) is None:
            host_offset = place(number)
            last_offset, last, stop = missing[-1] if missing else (0, 0, -1)
            if stop == begin * size and last_offset + stop - last == host_offset:
                missing[-1] = last_offset, last, stop + size
            else:
                missing.append((host_offset, begin * size, (begin + 1) * size))
    reads = []
    for host_offset, begin, stop in missing:
        if not storage.try_read_into(host_offset, view[begin:stop]):
            reads.append(storage.read_into(host_offset, view[begin:stop]))
    if reads:
        await asyncio.gather(*reads)
    words = decode(stored)
    for row, number in zip(words.reshape(len(numbers), -1), numbers, strict=True):
        table = cache.peek(number)  # also one that came, and was changed, while others were read
        if table is not None:
            row[:] = table.words
    return words
