"""The bitmap of a raw-cow image in memory, as it is stored: one bit per cluster, the lowest bit of a byte first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdserve.formats.tables import Piece, sector_runs
from nbdserve.units import KIB, SECTOR_SIZE, align_up, div_ceil

_CHUNK: Final = 64 * KIB
_SECTOR_BITS: Final = 12
"""log2 of the bits in a sector."""


class Bitmap:
    """Bits of ``clusters`` clusters, and the 512-byte sectors of them that differ from the disk.

    ``stored`` is the bitmap's place in the file, at ``host_offset``: whole sectors, kept as they are.
    """

    def __init__(self, host_offset: int, clusters: int, stored: bytearray) -> None:
        self.host_offset = host_offset
        self.clusters = clusters
        self.bits = stored
        self.bits.extend(bytes(align_up(max(len(stored), div_ceil(clusters, 8)), SECTOR_SIZE) - len(stored)))
        self.dirty: set[int] = set()
        self.missing = clusters - self.count(0, clusters)
        """Clusters whose bit is not set."""

    def run_end(self, index: int, stop: int) -> int:
        """The first cluster behind ``index`` and below ``stop`` with another bit than it has; or ``stop``."""
        bits = self.bits
        value = bits[index >> 3] >> (index & 7) & 1
        index += 1
        while index < stop and index & 7:
            if bits[index >> 3] >> (index & 7) & 1 != value:
                return index
            index += 1
        same = b"\xff" if value else b"\0"
        while stop - index >= 8:
            chunk = bits[index >> 3 : min(stop >> 3, (index >> 3) + _CHUNK)]
            differs = len(chunk) - len(chunk.lstrip(same))
            index += differs << 3
            if differs < len(chunk):
                break
        while index < stop and bits[index >> 3] >> (index & 7) & 1 == value:
            index += 1
        return index

    def set(self, first: int, end: int) -> None:
        """Set the bits of clusters ``[first, end)``, which is not empty."""
        self._fill(first, end, 1)

    def clear(self, first: int, end: int) -> None:
        """Clear the bits of clusters ``[first, end)``, which is not empty."""
        self._fill(first, end, 0)

    def _fill(self, first: int, end: int, value: int) -> None:
        before = self.count(first, min(end, self.clusters))
        low, high = first >> 3, (end - 1 >> 3) + 1
        mask = ((1 << end - first) - 1) << (first & 7)
        word = int.from_bytes(self.bits[low:high], "little")
        word = word | mask if value else word & ~mask
        self.bits[low:high] = word.to_bytes(high - low, "little")
        self.dirty.update(range(first >> _SECTOR_BITS, (end - 1 >> _SECTOR_BITS) + 1))
        self.missing -= self.count(first, min(end, self.clusters)) - before

    def count(self, first: int, end: int) -> int:
        """How many of the clusters ``[first, end)`` have their bit set."""
        if end <= first:
            return 0
        total = 0
        low, high = first >> 3, (end - 1 >> 3) + 1
        for at in range(low, high, _CHUNK):
            total += int.from_bytes(self.bits[at : min(high, at + _CHUNK)], "little").bit_count()
        total -= (self.bits[low] & (1 << (first & 7)) - 1).bit_count()
        return total - (self.bits[high - 1] >> (end - 1 & 7) + 1).bit_count()

    def stray(self) -> int:
        """Bits set behind the last cluster."""
        return self.count(self.clusters, len(self.bits) << 3)

    def array(self, first: int, end: int) -> npt.NDArray[np.uint8]:
        """The bits of clusters ``[first, end)``, a byte each."""
        low = first >> 3
        stored = np.frombuffer(self.bits, np.uint8, count=(end + 7 >> 3) - low, offset=low)
        return np.unpackbits(stored, bitorder="little")[first - (low << 3) : end - (low << 3)]

    def resize(self, clusters: int) -> None:
        """Have bits of so many clusters; new ones are not set. Sectors that are new count as on disk already."""
        if clusters < self.clusters:
            self.clear(clusters, self.clusters)
            del self.bits[align_up(div_ceil(clusters, 8), SECTOR_SIZE) :]
            self.dirty = {sector for sector in self.dirty if sector < len(self.bits) // SECTOR_SIZE}
        else:
            self.bits.extend(bytes(align_up(div_ceil(clusters, 8), SECTOR_SIZE) - len(self.bits)))
        self.clusters = clusters
        self.missing = clusters - self.count(0, clusters)

    def pieces(self, sectors: Iterable[int]) -> list[Piece]:
        """The stored form of these sectors as they are now."""
        return [
            (
                self.host_offset + first * SECTOR_SIZE,
                bytes(self.bits[first * SECTOR_SIZE : end * SECTOR_SIZE]),
            )
            for first, end in sector_runs(sectors)
        ]
