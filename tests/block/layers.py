"""Small chains in memory for the tests of the block layer: a driver that does what it is told, and real qcow2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from nbdserve.block.node import Node
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, Run, RunArray, RunStream
from nbdserve.formats.base import FormatDriver, ImageInfo
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.base import Storage
from nbdserve.storage.memory import MemoryStorage

CLUSTER = 4
_KINDS = {"D": DATA, "Z": ZERO, ".": UNALLOCATED, "C": COMPRESSED}


class Scripted(FormatDriver):
    """A layer of clusters of 4 bytes: ``D`` data, ``Z`` zero, ``.`` unallocated, ``C`` compressed.

    Data is the layer's letter, compressed data its capital. Each table covers two clusters and has to be loaded.
    """

    name = "scripted"
    batch = 3
    """Clusters in each piece of ``iter_runs``."""

    def __init__(self, clusters: str, letter: str, *, size: int | None = None, loaded: bool = True) -> None:
        self.clusters = clusters
        self.letter = letter.encode()
        self.path = f"layer {letter}"
        self.size = len(clusters) * CLUSTER if size is None else size
        self.cluster_size = self.granularity = CLUSTER
        self.read_only = True
        self.storage = self.data = MemoryStorage(self.letter * (len(clusters) * CLUSTER), path=self.path)
        self.tables = set(range(len(clusters))) if loaded else set()
        self.loads: list[int] = []

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        raise NotImplementedError

    def info(self) -> ImageInfo:
        return ImageInfo("scripted", self.size)

    def lookup(self, offset: int, length: int) -> Run | None:
        assert length > 0
        assert 0 <= offset < offset + length <= self.size, "a driver is asked inside its size only"
        index = offset // CLUSTER
        if index // 2 not in self.tables:
            return None
        run = min(length, CLUSTER - offset % CLUSTER)
        kind = _KINDS[self.clusters[index]]
        return kind, run, offset if kind == DATA else -1

    async def load(self, offset: int) -> None:
        self.loads.append(offset)
        self.tables.add(offset // CLUSTER // 2)

    async def read_compressed(self, offset: int) -> tuple[int, bytes]:
        return offset - offset % CLUSTER, self.letter.upper() * CLUSTER

    async def iter_runs(self, start: int, end: int) -> RunStream:
        while start < end:
            bounds = [start]
            for _ in range(self.batch):
                if bounds[-1] < end:
                    bounds.append(min(end, bounds[-1] - bounds[-1] % CLUSTER + CLUSTER))
            starts = np.array(bounds[:-1], np.int64)
            lengths = np.array(bounds[1:], np.int64) - starts
            kinds = np.array([_KINDS[self.clusters[at // CLUSTER]] for at in bounds[:-1]], np.uint8)
            places = np.where(kinds == COMPRESSED, starts - starts % CLUSTER, np.where(kinds == DATA, starts, -1))
            yield RunArray(starts, lengths, kinds, places)
            start = bounds[-1]

    async def close(self) -> None:
        await self.storage.close()


def guest(layers: Sequence[Scripted]) -> bytes:
    """What the guest sees of a chain, byte by byte and by the book."""
    content = bytearray()
    for offset in range(layers[0].size):
        byte = b"\0"
        for layer in layers:
            if offset >= layer.size:
                break
            cluster = layer.clusters[offset // CLUSTER]
            if cluster != ".":
                byte = {"D": layer.letter, "Z": b"\0", "C": layer.letter.upper()}[cluster]
                break
        content += byte
    return bytes(content)


def rows(part: Any) -> list[tuple[int, ...]]:
    """The columns of a ChainMap as rows ``(start, length, depth, kind, host_offset)``."""
    columns = (part.start, part.length, part.depth, part.kind, part.host_offset)
    return [tuple(row) for row in np.stack([column.astype(np.int64) for column in columns], axis=1).tolist()]


async def overlay(
    base: Storage | None,
    size: int,
    *,
    cluster_size: int = 4096,
    storage: Storage | None = None,
    compat: str = "1.1",
    **policy: Any,
) -> Node:
    """A qcow2 of ``size`` bytes in memory over a raw ``base``."""
    image = storage or MemoryStorage(path="overlay.qcow2")
    await Qcow2Driver.create(image, size, {"cluster_size": str(cluster_size), "compat": compat} | _backing(base))
    layers: list[FormatDriver] = [await Qcow2Driver.open(image, {}, read_only=False)]
    if base is not None:
        layers.append(RawDriver(base, 0, base.size, read_only=True))
    return Node(layers, **policy)


def _backing(base: Storage | None) -> dict[str, str]:
    return {} if base is None else {"backing_file": base.path, "backing_fmt": "raw"}


async def raw_node(storage: Storage, **policy: Any) -> Node:
    """A raw image on ``storage``."""
    return Node([await RawDriver.open(storage, {}, read_only=False)], **policy)
