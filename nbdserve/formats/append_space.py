"""Host space of a format that allocates at the end of its file, in units of one size.

A unit that is no longer mapped goes into quarantine: on disk something may still point at it. Once a commit has made
that something disappear, ``release`` makes the unit free, and it is handed out again before the file grows. A free unit
at the very end is given back to the end, so that a driver that cuts its file there leaves no junk behind.
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Iterable
from typing import Final, TypeAlias

from nbdserve.storage.base import Storage
from nbdserve.units import align_up

HostRange: TypeAlias = tuple[int, int]
"""``(host_offset, length)`` in bytes, whole units."""

UNBOUNDED: Final = 1 << 62


class AppendSpace:
    """Hands out consecutive units: freed ones first, lowest first, then those at ``end``."""

    def __init__(
        self, storage: Storage, unit: int, end: int, *, limit: int = UNBOUNDED, reuse: bool = True, punch: bool = False
    ) -> None:
        """Units of ``unit`` bytes (any size), the next new one at ``end``, none reaching past ``limit``.

        Whatever of the file lies past ``end`` now is taken to hold junk. ``reuse`` off: a freed unit stays unused for
        as long as the image is open. ``punch``: freed units are punched out of the file.
        """
        self.unit = unit
        self.end = end
        """Host offset behind the last unit in use: the size to cut the file to, and where the next new unit begins."""
        self.quarantine: list[HostRange] = []
        """Units that lost their mapping in memory, while the disk may still have it. A commit takes them from here."""
        self._storage = storage
        self._limit = limit
        self._reuse = reuse
        self._punch = punch
        self._free: list[HostRange] = []  # a heap
        junk = max(0, storage.size - end)
        self._virgin = end + align_up(junk, unit) if storage.grows_zeroed else UNBOUNDED

    def take(self, wanted: int = 1) -> tuple[int, int, bool]:
        """``(host_offset, count, zeroed)``: 1 to ``wanted`` consecutive units that nothing refers to.

        ``zeroed``: all of it is known to read as zeroes. OSError(ENOSPC) when there is no unit below the limit.
        """
        if self._free:
            host_offset, length = heapq.heappop(self._free)
            taken = min(length, wanted * self.unit)
            if taken < length:
                heapq.heappush(self._free, (host_offset + taken, length - taken))
            return host_offset, taken // self.unit, False
        count = min(wanted, (self._limit - self.end) // self.unit)
        if count < 1:
            raise self._full()
        return self._extend(count)

    def take_whole(self, count: int) -> tuple[int, bool]:
        """``(host_offset, zeroed)`` of exactly ``count`` consecutive units. OSError(ENOSPC)."""
        length = count * self.unit
        for index, (host_offset, free) in enumerate(self._free):
            if free >= length:
                self._free[index : index + 1] = [(host_offset + length, free - length)] if free > length else []
                heapq.heapify(self._free)
                return host_offset, False
        if self.end + length > self._limit:
            raise self._full()
        host_offset, _, zeroed = self._extend(count)
        return host_offset, zeroed

    def free(self, host_offset: int, count: int = 1) -> None:
        """These units are no longer mapped in memory (or never were: an allocation that was abandoned)."""
        self.quarantine.append((host_offset, count * self.unit))

    def collect(self) -> list[HostRange]:
        """Empty the quarantine, for the commit that makes the last mappings of these units disappear."""
        ranges, self.quarantine = self.quarantine, []
        return ranges

    def restore(self, ranges: Iterable[HostRange]) -> None:
        """That commit failed: the disk may still point at these."""
        self.quarantine += ranges

    async def release(self, ranges: Iterable[HostRange]) -> None:
        """Nothing on disk points at these units any more: they may be used again.

        Punched out of the file first and free afterwards: nobody may have them in between. OSError: they stay unused.
        """
        merged = _merged(ranges)
        if self._punch:
            for host_offset, length in merged:
                await self._storage.discard(host_offset, length)
        if self._reuse:
            self.add_free(merged)

    def add_free(self, ranges: Iterable[HostRange]) -> None:
        """Units before ``end`` that nothing refers to, on disk neither: holes that were there when it was opened."""
        self._free = _merged([*self._free, *ranges])  # ascending, and so a heap
        if self._free and sum(self._free[-1]) == self.end:
            self.end = self._free.pop()[0]

    @property
    def free_ranges(self) -> list[HostRange]:
        """Unused units before ``end``, ascending."""
        return sorted(self._free)

    def _extend(self, count: int) -> tuple[int, int, bool]:
        host_offset = self.end
        self.end += count * self.unit
        zeroed = host_offset >= self._virgin
        self._virgin = max(self._virgin, self.end)
        return host_offset, count, zeroed

    def _full(self) -> OSError:
        return OSError(errno.ENOSPC, f"{self._storage.path}: the format cannot address more than {self._limit} bytes")


def _merged(ranges: Iterable[HostRange]) -> list[HostRange]:
    """Ranges in ascending order, neighbours joined, none twice."""
    result: list[HostRange] = []
    for host_offset, length in sorted(ranges):
        if result and sum(result[-1]) >= host_offset:
            start = result[-1][0]
            result[-1] = start, max(sum(result[-1]), host_offset + length) - start
        else:
            result.append((host_offset, length))
    return result
