"""Reserving blocks: their table entries are on disk before anything is written to them.

A new block reads as it did before it was there: as zeroes, or, in a differencing image, as the parent, for no bit of
its sector bitmap is set. So an entry may be on disk early, and it must be: the space behind the last block that the
table shows is taken for zeroes by whoever opens the image after a crash. What waits for the same barrier shares it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from nbdserve.formats.group_run import GroupRun
from nbdserve.formats.tables import Piece, Table
from nbdserve.formats.vpc.layout import ENTRY_SIZE, UNUSED
from nbdserve.formats.vpc.space import BlockSpace
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE

_MOST: Final = 256
"""Blocks of one request that are reserved at once."""
_PER_SECTOR: Final = SECTOR_SIZE // ENTRY_SIZE


class Reservations:
    """Gives blocks of the guest places in the file: host offsets of their sector bitmaps."""

    def __init__(
        self, storage: Storage, table: Table, space: BlockSpace, begin: Callable[[dict[int, int]], Awaitable[None]]
    ) -> None:
        """``begin`` is awaited with the places of blocks that the table on disk shows from now on."""
        self.shown: dict[int, int] = {}
        """Places of blocks that the table on disk shows, and the one in memory does not yet."""
        self._storage = storage
        self._table = table
        self._space = space
        self._begin = begin
        self._ready: set[int] = set()
        self._soiled: set[int] = set()
        self._wanted: set[int] = set()
        self._runs = GroupRun(self._run)

    def take(self, index: int) -> int | None:
        """The place of a reserved block, once; None: ``reserve`` must be awaited first."""
        if index not in self._ready:
            return None
        self._ready.remove(index)
        return self.shown[index]

    def give_back(self, index: int) -> None:
        """The place that was taken may hold anything; it is zeroes again before it is given to the block once more."""
        self._soiled.add(index)

    def publish(self, index: int) -> None:
        """The table in memory shows the block, too."""
        self._table.entries[index] = self.shown.pop(index) // SECTOR_SIZE

    async def reserve(self, indexes: Iterable[int]) -> None:
        """``take`` has places for the blocks (the first 256 of them that have none) on return. OSError: not for all."""
        wanted = [index for index in indexes if self._lacks(index)][:_MOST]
        if not wanted:
            return
        self._wanted.update(wanted)
        await self._runs.join()

    def _lacks(self, index: int) -> bool:
        return index not in self._ready and self._table.entries[index] == UNUSED

    async def settle(self) -> None:
        """Nothing is under way on return."""
        await self._runs.idle()

    async def withdraw(self) -> None:
        """Take back what was reserved and did not come to hold anything: the table on disk is the one in memory."""
        unused, self.shown = list(self.shown), {}
        self._ready.clear()
        self._soiled.clear()
        if unused:
            await self._storage.write_stable(self._pieces(unused))

    async def _run(self) -> None:
        wanted, self._wanted = self._wanted, set()
        await self._reserve(sorted(filter(self._lacks, wanted)))

    async def _reserve(self, indexes: list[int]) -> None:
        if not indexes:
            return
        soiled = {index: self.shown[index] for index in indexes if index in self._soiled}
        for place in soiled.values():
            await self._space.clear(place)
        self._soiled.difference_update(soiled)
        self._ready.update(soiled)
        indexes = [index for index in indexes if index not in soiled]
        if not indexes:
            return
        # From here on the disk may show these places: they go to no other block, whatever fails.
        places = dict(zip(indexes, await self._space.take(len(indexes)), strict=True))
        self.shown.update(places)
        await self._barrier_entries(self._pieces(indexes))
        await self._begin(places)
        self._ready.update(index for index in places if index in self.shown)

    def _pieces(self, indexes: Iterable[int]) -> list[Piece]:
        """The sectors of the table with these entries, as the disk is to have them."""
        pieces: list[Piece] = []
        for first in sorted({index - index % _PER_SECTOR for index in indexes}):
            words = self._table.words[first : first + _PER_SECTOR].copy()
            for index in range(first, first + len(words)):
                if index in self.shown:
                    words[index - first] = self.shown[index] // SECTOR_SIZE
            pieces.append((self._table.host_offset + first * ENTRY_SIZE, words.astype(">u4").tobytes()))
        return pieces

    async def _barrier_entries(self, pieces: list[Piece]) -> None:
        """Table entries are stable before anything is written to the blocks they show.

        Crash before the barrier: each entry is there or not; there, it shows a block of zeroes with an empty sector
        bitmap, which reads as what was there before. Without it, data could be in space that no entry shows, and
        become visible in another block that stock tools put there.
        """
        await self._storage.write_stable(pieces)
