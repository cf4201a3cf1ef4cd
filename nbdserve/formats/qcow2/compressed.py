"""Compressed clusters: read, inflate within limits, and keep the last few.

zlib is a raw deflate stream with a window of at most 4 KiB, zstd one frame. The stored length is known only up to the
next 512-byte sector, so the input has junk behind it; the output is exactly one cluster.
"""

from __future__ import annotations

import asyncio
import errno
from collections import OrderedDict
from functools import partial
from typing import Final

import zstandard

from nbdserve.errors import RequestError
from nbdserve.formats.inflate import DEFLATE_4K_WINDOW, inflate
from nbdserve.formats.qcow2.layout import COMPRESSION_ZSTD, compressed_range
from nbdserve.storage.base import Storage
from nbdserve.storage.pool import worker_pool
from nbdserve.units import MIB

CACHE_BYTES: Final = 8 * MIB


def decompress(stored: bytes | bytearray, cluster_size: int, compression_type: int) -> bytes:
    """The cluster. RequestError(EIO) unless the data makes exactly ``cluster_size`` bytes; never produces more."""
    if compression_type != COMPRESSION_ZSTD:
        return inflate(stored, cluster_size, window_bits=DEFLATE_4K_WINDOW)
    try:
        # The size a frame declares is allocated unseen; -1 is a frame without one, which is capped.
        declared = zstandard.frame_content_size(stored)
        if declared not in (-1, cluster_size):
            raise RequestError(errno.EIO, f"compressed cluster: {declared} bytes instead of {cluster_size}")
        data = zstandard.ZstdDecompressor().decompress(stored, max_output_size=cluster_size)
    except zstandard.ZstdError as error:
        raise RequestError(errno.EIO, f"compressed cluster: {error}") from None
    if len(data) != cluster_size:
        raise RequestError(errno.EIO, f"compressed cluster: {len(data)} bytes instead of {cluster_size}")
    return data


class CompressedClusters:
    """Reads compressed clusters of one image. Reads of one cluster at the same time share the work."""

    def __init__(self, storage: Storage, cluster_bits: int, compression_type: int) -> None:
        self._storage = storage
        self._cluster_bits = cluster_bits
        self._compression_type = compression_type
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._most = max(2, CACHE_BYTES >> cluster_bits)
        self._running: dict[int, asyncio.Task[bytes]] = {}

    async def read(self, entry: int) -> bytes:
        """The cluster an L2 entry with COMPRESSED_FLAG stands for. RequestError(EIO) if the stored data is not one."""
        data = self._kept.get(entry)
        if data is not None:
            self._kept.move_to_end(entry)
            return data
        task = self._running.get(entry)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._read(entry))
            self._running[entry] = task
            task.add_done_callback(partial(self._ended, entry))
        return await asyncio.shield(task)

    def forget(self, entry: int) -> None:
        """Other data is where this entry says from now on: its space was free, and has been used again."""
        self._kept.pop(entry, None)
        self._running.pop(entry, None)

    def _ended(self, entry: int, task: asyncio.Task[bytes]) -> None:
        if self._running.get(entry) is not task:
            return
        del self._running[entry]
        if not task.cancelled() and task.exception() is None:
            self._kept[entry] = task.result()
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)

    async def _read(self, entry: int) -> bytes:
        cluster_size = 1 << self._cluster_bits
        host_offset, length = compressed_range(entry, self._cluster_bits)
        length = min(length, self._storage.size - host_offset, 2 * cluster_size)
        if length <= 0:
            raise RequestError(errno.EIO, f"{self._storage.path}: compressed data past the end at {host_offset:#x}")
        stored = await self._storage.read(host_offset, length)
        return await worker_pool().run(decompress, stored, cluster_size, self._compression_type)
