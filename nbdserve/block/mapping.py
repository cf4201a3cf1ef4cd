"""The map of a whole chain: for every guest range the layer that decides, in numpy columns.

Each piece of a layer's mapping is laid over what the layers below have, by sorting boundaries, not by walking clusters:
a fully allocated terabyte is a few thousand operations.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, Int64Array, RunArray
from nbdserve.formats.base import FormatDriver
from nbdserve.storage.base import Storage


@dataclass(slots=True)
class ChainMap:
    """Consecutive extents of a chain in columns: ``start`` ascending, each ending where the next begins. Bytes."""

    start: Int64Array
    length: Int64Array
    depth: npt.NDArray[np.int8]
    """The layer that decides, 0 the top; for UNALLOCATED the one that ended the search."""
    kind: npt.NDArray[np.uint8]
    """As in ``extents``; UNALLOCATED: no layer decides, the range reads as zeroes."""
    host_offset: Int64Array
    """In the data storage of layer ``depth``, or -1."""

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def of_layer(cls, runs: RunArray, depth: int) -> ChainMap:
        """The runs of one layer, as if it were alone."""
        return cls(runs.start, runs.length, np.full(len(runs), depth, np.int8), runs.kind, runs.host_offset)

    def take(self, index: Int64Array, start: Int64Array, end: int) -> ChainMap:
        """Extents that begin at ``start`` and have what the extents at ``index`` have; the last one ends at ``end``."""
        host_offset = self.host_offset[index]
        kind = self.kind[index]
        shift = start - self.start[index]
        # A compressed cluster is stored as a whole: its host_offset is that of its beginning, whichever part is meant.
        moves = (host_offset >= 0) & (kind != COMPRESSED)
        return ChainMap(
            start,
            np.diff(np.append(start, end)),
            self.depth[index],
            kind,
            np.where(moves, host_offset + shift, host_offset),
        )

    def cut(self, start: int, end: int) -> ChainMap:
        """The part inside ``[start, end)``, a non-empty range that the map covers."""
        first = int(np.searchsorted(self.start, start, "right")) - 1
        last = int(np.searchsorted(self.start, end, "left"))
        index = np.arange(first, last)
        return self.take(index, np.maximum(self.start[first:last], start), end)

    def over(self, below: ChainMap) -> ChainMap:
        """This map where it decides, ``below`` elsewhere; both cover the same range."""
        start = np.union1d(self.start, below.start)
        end = int(self.start[-1] + self.length[-1])
        upper = self.take(np.searchsorted(self.start, start, "right") - 1, start, end)
        lower = below.take(np.searchsorted(below.start, start, "right") - 1, start, end)
        # What ``below`` says about its own end is of the depth of this map, which may have space reserved there.
        undecided = (upper.kind == UNALLOCATED) & (lower.depth > upper.depth)
        return ChainMap(
            start,
            upper.length,
            np.where(undecided, lower.depth, upper.depth),
            np.where(undecided, lower.kind, upper.kind),
            np.where(undecided, lower.host_offset, upper.host_offset),
        ).coalesced()

    def coalesced(self) -> ChainMap:
        """Neighbours merged that are of one layer and kind, and adjacent in the host where they are placed there.

        COMPRESSED extents are merged only with parts of the same stored cluster.
        """
        if len(self) < 2:
            return self
        here, there = self.host_offset[:-1], self.host_offset[1:]
        adjacent = np.where(self.kind[:-1] == COMPRESSED, there == here, there == here + self.length[:-1])
        same = (self.kind[1:] == self.kind[:-1]) & (self.depth[1:] == self.depth[:-1])
        merge = same & np.where(here >= 0, adjacent, there < 0)
        first = np.flatnonzero(np.concatenate(([True], ~merge)))
        return self.take(first, self.start[first], int(self.start[-1] + self.length[-1]))


async def map_chain(layers: Sequence[FormatDriver], start: int, end: int) -> AsyncIterator[ChainMap]:
    """The map of ``[start, end)``, inside the top layer's disk, in pieces that continue each other.

    Works on the tables as they are in memory. OSError, or RequestError(EIO) for a corrupt table.
    """
    async for piece in _map_from(layers, 0, start, end):
        yield piece


async def _map_from(layers: Sequence[FormatDriver], depth: int, start: int, end: int) -> AsyncIterator[ChainMap]:
    layer = layers[depth]
    room = max(start, min(end, layer.size))
    if start < room:
        async for runs in layer.iter_runs(start, room):
            async for piece in _filled(ChainMap.of_layer(runs, depth), layers, depth):
                yield piece
    if room < end:
        # A layer shorter than the one above it has nothing past its end, so the one above ended the search.
        yield ChainMap.of_layer(RunArray.of(room, end - room, UNALLOCATED), max(depth - 1, 0))


async def _filled(piece: ChainMap, layers: Sequence[FormatDriver], depth: int) -> AsyncIterator[ChainMap]:
    """``piece`` of layer ``depth`` with the layers below where it does not decide."""
    undecided = np.flatnonzero(piece.kind == UNALLOCATED)
    if len(undecided) == 0 or depth + 1 == len(layers):
        yield piece
        return
    start, end = int(piece.start[0]), int(piece.start[-1] + piece.length[-1])
    low = int(piece.start[undecided[0]])
    high = int(piece.start[undecided[-1]] + piece.length[undecided[-1]])
    if start < low:
        yield piece.cut(start, low)
    async for below in _map_from(layers, depth + 1, low, high):
        yield piece.cut(int(below.start[0]), int(below.start[-1] + below.length[-1])).over(below)
    if high < end:
        yield piece.cut(high, end)


async def file_map(storage: Storage) -> RunArray:
    """The whole storage as alternating DATA and ZERO runs; what follows its end is ZERO. OSError."""
    pieces = []
    position = 0
    while position < storage.size:
        runs = await storage.host_map(position, storage.size - position)
        pieces.append(runs)
        position = int(runs.start[-1] + runs.length[-1])
    pieces.append(RunArray.of(position, (1 << 62) - position, ZERO))
    kind = np.concatenate([runs.kind for runs in pieces])
    start = np.concatenate([runs.start for runs in pieces])
    first = np.flatnonzero(np.concatenate(([True], kind[1:] != kind[:-1])))
    start, kind = start[first], kind[first]
    return RunArray(start, np.diff(np.append(start, 1 << 62)), kind, np.where(kind == ZERO, -1, start))


def split_by_holes(part: ChainMap, depth: int, holes: RunArray) -> tuple[ChainMap, npt.NDArray[np.bool_]]:
    """``part`` with the DATA of layer ``depth`` cut where ``holes``, its file's map, changes; and which are holes."""
    mine = (part.kind == DATA) & (part.depth == depth) & (part.host_offset >= 0)
    low = np.searchsorted(holes.start, part.host_offset, "right") - 1
    high = np.searchsorted(holes.start, part.host_offset + part.length, "left") - 1
    pieces = np.where(mine, high - low + 1, 1)
    index = np.repeat(np.arange(len(part)), pieces)
    number = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    run = np.where(mine, low, 0)[index] + number
    inside = np.maximum(holes.start[run] - part.host_offset[index], 0)
    start = part.start[index] + np.where(number > 0, inside, 0)
    end = int(part.start[-1] + part.length[-1])
    return part.take(index, start, end), mine[index] & (holes.kind[run] == ZERO)
