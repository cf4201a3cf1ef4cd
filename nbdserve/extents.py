"""The values that describe a mapping: runs (of one layer) and extents (of a whole chain).

A **run** says what one image layer has at a guest range; it is a plain tuple, because one is made for every
request on the hot path (a NamedTuple costs 5x): ``(kind, length, host_offset)``.

A **RunArray** is the same for millions of runs at once, in numpy columns.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

DATA: Final = 0
"""The layer holds the bytes, at ``host_offset`` of its data storage."""
ZERO: Final = 1
"""The layer decides: the bytes are zeroes. ``host_offset`` is the reserved space behind them, or -1."""
UNALLOCATED: Final = 2
"""The layer does not decide: the backing layer does, or zeroes where there is none. ``host_offset`` is -1, but in a
RunArray it may be space reserved for the range (the rest of a cluster of which only some subclusters are allocated)."""
COMPRESSED: Final = 3
"""The layer holds the bytes compressed (``read_compressed``). ``host_offset``: where the stored form begins."""

KIND_NAMES: Final = ("data", "zero", "unallocated", "compressed")

Run: TypeAlias = tuple[int, int, int]
"""``(kind, length, host_offset)``: length in bytes, at least 1, at most the length asked for."""

Int64Array: TypeAlias = npt.NDArray[np.int64]


@dataclass(slots=True)
class RunArray:
    """Consecutive runs in columns: ``start`` ascending, each run ending where the next begins."""

    start: Int64Array
    length: Int64Array
    kind: npt.NDArray[np.uint8]
    host_offset: Int64Array

    def __len__(self) -> int:
        return len(self.start)

    def coalesced(self) -> RunArray:
        """The same mapping with neighbours merged: equal kind and, for DATA and reserved ZERO, adjacent host ranges.

        COMPRESSED runs are never merged: each is a unit of its own.
        """
        if len(self.start) < 2:
            return self
        same_kind = self.kind[1:] == self.kind[:-1]
        placed = self.host_offset[:-1] >= 0
        adjacent = self.host_offset[1:] == self.host_offset[:-1] + self.length[:-1]
        unplaced = ~placed & (self.host_offset[1:] < 0)
        merge = same_kind & (self.kind[1:] != COMPRESSED) & (adjacent & placed | unplaced)
        first = np.flatnonzero(np.concatenate(([True], ~merge)))
        ends = np.concatenate((self.start[first[1:]], self.start[-1:] + self.length[-1:]))
        start = self.start[first]
        return RunArray(start, ends - start, self.kind[first], self.host_offset[first])

    @classmethod
    def of(cls, start: int, length: int, kind: int, host_offset: int = -1) -> RunArray:
        """A single run."""
        return cls(
            np.array([start], np.int64),
            np.array([length], np.int64),
            np.array([kind], np.uint8),
            np.array([host_offset], np.int64),
        )

    @classmethod
    def empty(cls) -> RunArray:
        """No runs."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.int64))


RunStream: TypeAlias = AsyncIterator[RunArray]
"""A mapping in pieces: each RunArray continues where the last one ended."""
