"""Decompressed units of one image: made on a worker thread, the last few kept."""

from __future__ import annotations

import asyncio
import errno
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from nbdserve.errors import RequestError
from nbdserve.storage.base import Storage
from nbdserve.storage.pool import MAX_THREADS, worker_pool
from nbdserve.units import MIB

CACHE_BYTES: Final = 8 * MIB
"""Kept per image. The unit read last is kept whatever its size: sequential reads smaller than a unit need it."""

AT_ONCE: Final = 2 * MAX_THREADS
"""Units of one image in the making: one may take 50 MiB, stored and expanded, and clients ask for many."""


class UnitCache:
    """Reads of one unit at the same time share the work; so many bytes are kept that a sequential read pays once."""

    def __init__(self, storage: Storage, limit: int = CACHE_BYTES) -> None:
        self._storage = storage
        self._limit = limit
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0
        self._running: dict[int, asyncio.Task[bytes]] = {}
        self._places = asyncio.Semaphore(AT_ONCE)

    async def read(self, key: int, host_offset: int, length: int, decompress: Callable[[bytearray], bytes]) -> bytes:
        """The unit ``key``: what ``decompress`` makes of the ``length`` bytes stored at ``host_offset``.

        The caller has bounded ``length``. RequestError(EIO) when they are not all in the file, or ``decompress``
        raises it.
        """
        data = self._kept.get(key)
        if data is not None:
            self._kept.move_to_end(key)
            return data
        task = self._running.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._read(key, host_offset, length, decompress))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))
        return await asyncio.shield(task)

    async def _read(self, key: int, host_offset: int, length: int, decompress: Callable[[bytearray], bytes]) -> bytes:
        if host_offset + length > self._storage.size:
            raise RequestError(
                errno.EIO,
                f"{self._storage.path}: compressed data at {host_offset:#x} ends past the end of the file",
            )
        async with self._places:
            stored = bytearray(length)
            if not self._storage.try_read_into(host_offset, memoryview(stored)):
                await self._storage.read_into(host_offset, memoryview(stored))
            try:
                data = await worker_pool().run(decompress, stored)
            except RequestError as error:
                raise RequestError(error.errno, f"{self._storage.path}: at {host_offset:#x}: {error}") from None
        self._kept[key] = data
        self._bytes += len(data)
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= len(self._kept.popitem(last=False)[1])
        return data
