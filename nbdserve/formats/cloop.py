"""cloop, the compressed loop device of Knoppix (version 2.0): one zlib stream per block. Read-only.

128 bytes of shell script, then big endian: u32 block size, u32 number of blocks, u64 offsets of the blocks and of what
follows the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Final, Self

import construct as c
import numpy as np

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.extents import COMPRESSED, Int64Array, Run, RunArray, RunStream
from nbdserve.formats.base import FormatDriver, ImageInfo
from nbdserve.formats.inflate import inflate
from nbdserve.formats.unit_cache import UnitCache
from nbdserve.storage.base import Storage
from nbdserve.units import KIB, MIB, SECTOR_SIZE

MARK: Final = b"#V2.0 Format"
"""In the script of every image of this version, whatever command follows it."""
MAX_BLOCK_SIZE: Final = 16 * MIB
MAX_TABLE_BYTES: Final = 16 * MIB
"""Offsets of two million blocks: 128 GiB in the usual ones of 64 KiB."""
_SLACK: Final = 64 * KIB
"""More than the header and trailer of a zlib stream, and what data that cannot be compressed grows by."""
_BATCH: Final = 1 << 16

HEADER: Final[Any] = c.Struct("script" / c.Bytes(128), "block_size" / c.Int32ub, "n_blocks" / c.Int32ub)


class CloopDriver(FormatDriver):
    """One open cloop image."""

    name: ClassVar[str] = "cloop"

    def __init__(self, storage: Storage, block_size: int, offsets: Int64Array) -> None:
        self.path, self.storage, self.data = storage.path, storage, storage
        self.read_only = True
        self.block_size = block_size
        self.size = block_size * (len(offsets) - 1)
        self.cluster_size = self.granularity = 1
        self._offsets = offsets
        self._at: memoryview[int] = offsets.data.cast("B").cast("q")
        self._units = UnitCache(storage)

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image; it can only be read."""
        if not read_only:
            raise ImageError(
                storage.path, "such images can only be read", field="format", value="cloop", hint="--read-only"
            )
        if storage.size < HEADER.sizeof():
            raise CorruptImageError(
                storage.path, "the file is too short for a cloop header", field="file size", value=storage.size
            )
        header = HEADER.parse(bytes(await storage.read(0, HEADER.sizeof())))
        if MARK not in header.script:
            raise UnsupportedImageError(
                storage.path, "no cloop image of version 2.0", field="header", value=header.script[:32]
            )
        block_size = header.block_size
        if not 0 < block_size <= MAX_BLOCK_SIZE or block_size % SECTOR_SIZE:
            raise UnsupportedImageError(
                storage.path,
                f"must be a multiple of {SECTOR_SIZE} and at most {MAX_BLOCK_SIZE}",
                field="block_size",
                value=block_size,
            )
        table_bytes = (header.n_blocks + 1) * 8
        if table_bytes > MAX_TABLE_BYTES or HEADER.sizeof() + table_bytes > storage.size:
            raise CorruptImageError(
                storage.path,
                f"its table has {table_bytes} bytes, the file {storage.size} (at most {MAX_TABLE_BYTES} are read)",
                field="n_blocks",
                value=header.n_blocks,
            )
        stored = np.frombuffer(await storage.read(HEADER.sizeof(), table_bytes), ">u8")
        _check_offsets(stored, block_size, storage)
        return cls(storage, block_size, stored.astype(np.int64))

    def info(self) -> ImageInfo:
        """The facts of this layer."""
        return ImageInfo(self.name, self.size)

    def lookup(self, offset: int, length: int) -> Run:
        """The block, compressed."""
        index = offset // self.block_size
        return COMPRESSED, min(length, (index + 1) * self.block_size - offset), self._at[index]

    async def iter_runs(self, start: int, end: int) -> RunStream:
        """One run for each block."""
        while start < end:
            first = start // self.block_size
            stop = min(first + _BATCH, -(-end // self.block_size))
            starts = np.arange(first, stop, dtype=np.int64) * self.block_size
            starts[0] = start
            until = min(end, stop * self.block_size)
            kind = np.full(len(starts), COMPRESSED, np.uint8)
            yield RunArray(starts, np.diff(np.append(starts, until)), kind, self._offsets[first:stop])
            start = until

    async def read_compressed(self, offset: int) -> tuple[int, bytes]:
        """The block that contains ``offset``."""
        index = offset // self.block_size
        host_offset = self._at[index]
        data = await self._units.read(
            index, host_offset, self._at[index + 1] - host_offset, partial(inflate, size=self.block_size)
        )
        return index * self.block_size, data

    async def close(self) -> None:
        """Release the file."""
        await self.storage.close()


def _check_offsets(stored: np.ndarray[Any, np.dtype[np.uint64]], block_size: int, storage: Storage) -> None:
    """CorruptImageError for the first offset that is below the one before it, or further away than a block can be."""
    most = 2 * block_size + _SLACK
    outside = stored > np.uint64(storage.size)
    lengths = np.diff(np.where(outside, 0, stored).astype(np.int64))
    bad = outside.copy()
    bad[1:] |= (lengths < 0) | (lengths > most)
    if bad.any():
        index = int(bad.argmax())
        raise CorruptImageError(
            storage.path,
            f"must be inside the file, and at most {most} bytes behind the one before",
            field=f"offsets[{index}]",
            value=int(stored[index]),
        )
