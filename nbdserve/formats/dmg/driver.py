"""dmg, Apple's disk images: read-only."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Final, Self

import numpy as np

from nbdserve.errors import CorruptImageError, ImageError, RequestError, UnsupportedImageError
from nbdserve.extents import COMPRESSED, DATA, ZERO, Run, RunArray, RunStream
from nbdserve.formats.base import FormatDriver, ImageInfo
from nbdserve.formats.dmg import adc, layout, lzfse
from nbdserve.formats.dmg.layout import Chunks, Trailer
from nbdserve.formats.inflate import bunzip2, inflate
from nbdserve.formats.unit_cache import UnitCache
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE

_EXPAND: Final[dict[int, Callable[..., bytes]]] = {
    layout.ADC: adc.expand,
    layout.ZLIB: inflate,
    layout.BZIP2: bunzip2,
    layout.LZFSE: lzfse.expand,
}
_KINDS: Final = {layout.ZERO_FILL: ZERO, layout.IGNORED: ZERO, layout.RAW: DATA}
"""Of chunks; the others are COMPRESSED."""
_BATCH: Final = 1 << 16


class DmgDriver(FormatDriver):
    """One open image."""

    name: ClassVar[str] = "dmg"

    def __init__(self, storage: Storage, size: int, chunks: Chunks) -> None:
        self.path, self.storage, self.data = storage.path, storage, storage
        self.read_only = True
        self.size = size
        self.cluster_size = self.granularity = 1
        self._chunks = chunks
        self._starts: memoryview[int] = chunks.start.data.cast("B").cast("q")
        self._units = UnitCache(storage)

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image; it can only be read."""
        if not read_only:
            raise ImageError(
                storage.path, "such images can only be read", field="format", value="dmg", hint="--read-only"
            )
        at, data = await _find_trailer(storage)
        trailer = Trailer.parse(data, at, storage.path)
        # Where an image has both, they say the same; QEMU looks at the resource fork first, too.
        if trailer.rsrc is not None:
            fork = await storage.read(*trailer.rsrc)
            tables = layout.tables_of_resource_fork(fork, storage.path)
        else:
            assert trailer.xml is not None
            tables = layout.tables_of_property_list(await storage.read(*trailer.xml), storage.path)
        chunks = Chunks.collect(tables, trailer, at, storage.path)
        if bool((chunks.kind == layout.LZFSE).any()) and not lzfse.available():
            raise UnsupportedImageError(
                storage.path,
                "LZFSE chunks need the Python package lzfse",
                field="chunk type",
                value=layout.LZFSE,
                hint="pip install nbdserve[lzfse]",
            )
        return cls(storage, trailer.size, chunks)

    def info(self) -> ImageInfo:
        """The facts of this layer."""
        return ImageInfo(self.name, self.size)

    def _find(self, offset: int) -> int:
        """The number of the chunk that has ``offset``. RequestError(EIO) when there is none."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or offset >= self._starts[index] + int(self._chunks.length[index]):
            raise self._gap(offset)
        return index

    def _gap(self, offset: int) -> RequestError:
        return RequestError(errno.EIO, f"{self.path}: no chunk has disk sector {offset // SECTOR_SIZE}")

    def lookup(self, offset: int, length: int) -> Run:
        """What the chunk at ``offset`` says."""
        chunks = self._chunks
        index = self._find(offset)
        inside = offset - self._starts[index]
        length = min(length, int(chunks.length[index]) - inside)
        kind = _KINDS.get(int(chunks.kind[index]), COMPRESSED)
        if kind == DATA:
            return DATA, length, int(chunks.host_offset[index]) + inside
        return kind, length, -1 if kind == ZERO else int(chunks.host_offset[index])

    async def iter_runs(self, start: int, end: int) -> RunStream:
        """One run per chunk."""
        chunks = self._chunks
        while start < end:
            first = self._find(start)
            stop = min(first + _BATCH, bisect_right(self._starts, end - 1))
            part = slice(first, stop)
            starts, ends = chunks.start[part].copy(), chunks.start[part] + chunks.length[part]
            gaps = np.flatnonzero(starts[1:] != ends[:-1])
            if len(gaps):
                raise self._gap(int(ends[gaps[0]]))
            host_offset = chunks.host_offset[part].copy()
            kind = np.full(stop - first, COMPRESSED, np.uint8)
            for stored, meaning in _KINDS.items():
                kind[chunks.kind[part] == stored] = meaning
            host_offset[kind == ZERO] = -1
            if kind[0] == DATA:
                host_offset[0] += start - starts[0]
            starts[0] = start
            ends[-1] = min(int(ends[-1]), end)
            yield RunArray(starts, ends - starts, kind, host_offset)
            start = int(ends[-1])

    async def read_compressed(self, offset: int) -> tuple[int, bytes]:
        """The chunk that contains ``offset``."""
        chunks = self._chunks
        index = self._find(offset)
        expand = partial(_EXPAND[int(chunks.kind[index])], size=int(chunks.length[index]))
        data = await self._units.read(index, int(chunks.host_offset[index]), int(chunks.stored[index]), expand)
        return self._starts[index], data

    async def close(self) -> None:
        """Release the file."""
        await self.storage.close()


async def _find_trailer(storage: Storage) -> tuple[int, bytes]:
    """Where the trailer is, and its bytes: the last 512 of the file, or, where the file was filled up to whole
    sectors, up to 511 bytes before that. ImageError when there is none."""
    length = min(storage.size, 2 * layout.KOLY_SIZE - 1)
    data = bytes(await storage.read(storage.size - length, length))
    at = length - layout.KOLY_SIZE
    if not data.startswith(layout.KOLY_MAGIC, at):
        at = data.rfind(layout.KOLY_MAGIC, 0, max(at, 0) + len(layout.KOLY_MAGIC) - 1)
    if at < 0 or length < layout.KOLY_SIZE:
        if bytes(await storage.read(0, len(layout.ENCRYPTED_MAGIC))) == layout.ENCRYPTED_MAGIC:
            raise UnsupportedImageError(storage.path, "the image is encrypted")
        raise CorruptImageError(
            storage.path,
            "not a dmg image: there is no trailer",
            field="magic",
            value=data[-layout.KOLY_SIZE :][:4],
            hint="-f raw",
        )
    return storage.size - length + at, data[at : at + layout.KOLY_SIZE]
