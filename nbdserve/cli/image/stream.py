"""A pipe as the target of a copy: bytes leave in the order of their offsets."""

from __future__ import annotations

import asyncio
from typing import BinaryIO

from nbdserve.block.bulk import Ranges
from nbdserve.buffers import ZEROES


class StreamTarget:
    """Writes what has come so far as soon as everything before it has been written."""

    path = "standard output"

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self._moved = asyncio.Condition()

    async def write_all(self, ranges: Ranges) -> None:
        """Write them, each in its turn."""
        for offset, data in ranges:
            await self._write(offset, data)

    async def _write(self, offset: int, data: memoryview) -> None:
        async with self._moved:
            await self._moved.wait_for(lambda: self._position == offset)
            await asyncio.to_thread(self._stream.write, data)
            self._position += len(data)
            self._moved.notify_all()

    async def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Zeroes are bytes like others here."""
        end = offset + length
        while offset < end:
            part = min(end - offset, len(ZEROES))
            await self._write(offset, memoryview(ZEROES)[:part])
            offset += part
