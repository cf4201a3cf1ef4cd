"""Sector bitmaps of a differencing image, in memory: which sectors of a block this layer has. First sector, first bit.

In two generations, as tables are (``formats.tables``): those that differ from the disk, or are pinned, stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from nbdserve.formats.tables import Piece, sector_runs
from nbdserve.units import MIB, SECTOR_SIZE

CACHE_BYTES: Final = 16 * MIB
_OVERHEAD: Final = 512
"""Bytes of objects per bitmap."""


class SectorBitmap:
    """The bitmap at ``host_offset``, with the numbers of its 512-byte sectors that differ from the disk.

    While ``pins`` is not 0 it stays in memory.
    """

    __slots__ = ("_changed", "_every", "bits", "dirty", "full", "host_offset", "index", "pins")

    def __init__(self, index: int, host_offset: int, bits: bytearray, every: bytes, changed: set[SectorBitmap]) -> None:
        """``every`` is what ``bits`` begin with when every sector of the block is here."""
        self.index = index
        """Of the block."""
        self.host_offset = host_offset
        self.bits = bits
        self.full = bits.startswith(every)
        """Every sector is here."""
        self._every = every
        self.dirty: set[int] = set()
        self.pins = 0
        self._changed = changed

    def run(self, first: int, count: int) -> tuple[bool, int]:
        """Whether sector ``first`` of the block is here, and for how many of ``count`` sectors that holds.

        No more than 4096 are looked at.
        """
        count = min(count, 4096)
        end = first + count
        value = int.from_bytes(self.bits[first >> 3 : end + 7 >> 3], "big") >> (-end & 7)
        every = (1 << count) - 1
        value &= every
        if value >> (count - 1):
            return True, count - (value ^ every).bit_length()
        return False, count - value.bit_length()

    def set(self, first: int, count: int) -> None:
        """The sectors are here from now on."""
        end = first + count
        start, stop = first >> 3, end + 7 >> 3
        mask = (1 << count) - 1 << (-end & 7)
        value = int.from_bytes(self.bits[start:stop], "big") | mask
        self.bits[start:stop] = value.to_bytes(stop - start, "big")
        self.full = self.bits.startswith(self._every)
        self.dirty.update(range(start // SECTOR_SIZE, (stop - 1) // SECTOR_SIZE + 1))
        self._changed.add(self)

    def restore(self, sectors: Iterable[int]) -> None:
        """These sectors, counted as written, may not be."""
        self.dirty.update(sectors)
        self._changed.add(self)

    def unpin(self) -> None:
        """Let go of it."""
        self.pins -= 1

    def pieces(self, sectors: Iterable[int]) -> list[Piece]:
        """The stored form of these sectors as they are now."""
        return [
            (self.host_offset + first * SECTOR_SIZE, bytes(self.bits[first * SECTOR_SIZE : end * SECTOR_SIZE]))
            for first, end in sector_runs(sectors)
        ]


class BitmapCache:
    """Bitmaps by the number of their block."""

    def __init__(self, bitmap_size: int, limit: int = CACHE_BYTES, *, sectors: int | None = None) -> None:
        """``sectors`` of a block, a multiple of 8, if they are fewer than a bitmap has bits."""
        self.recent: dict[int, SectorBitmap] = {}
        self.changed: set[SectorBitmap] = set()
        """Those that differ from the disk."""
        self._old: dict[int, SectorBitmap] = {}
        self._every = b"\xff" * (bitmap_size if sectors is None else sectors // 8)
        self._generation = max(4, limit // 2 // (bitmap_size + _OVERHEAD))

    @property
    def crowded(self) -> bool:
        """So many differ from the disk that they should be written before more do."""
        return len(self.changed) > self._generation

    def find(self, index: int) -> SectorBitmap | None:
        """The bitmap, which then counts as recently used."""
        bitmap = self.recent.get(index)
        if bitmap is None:
            bitmap = self._old.pop(index, None)
            if bitmap is not None:
                self._keep(bitmap)
        return bitmap

    def peek(self, index: int) -> SectorBitmap | None:
        """The bitmap, without changing what is dropped next."""
        return self.recent.get(index) or self._old.get(index)

    def add(self, index: int, host_offset: int, bits: bytearray) -> SectorBitmap:
        """Keep a bitmap as it is on disk."""
        bitmap = SectorBitmap(index, host_offset, bits, self._every, self.changed)
        self._keep(bitmap)
        return bitmap

    def _keep(self, bitmap: SectorBitmap) -> None:
        if len(self.recent) >= self._generation:
            kept = {index: old for index, old in self._old.items() if old.pins or old in self.changed}
            self._old = kept | self.recent
            self.recent.clear()
        self.recent[bitmap.index] = bitmap
