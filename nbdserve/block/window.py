"""An image within an image: the disk of one as the file of another.

A window of a qcow2 disk (qemu-nbd ``--offset``) is a raw image whose file is that disk; a qcow2 inside a tar is a qcow2
image whose file is a raw window of the tar. Both are a driver opened on a ``NodeStorage``.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np

from nbdserve.block.forms import READ_DATA, READ_SPLIT, READ_ZERO
from nbdserve.block.mapping import ChainMap, map_chain
from nbdserve.block.node import Node
from nbdserve.block.pieces import zero_pieces
from nbdserve.block.writer import WRITE_TAKEN, WRITE_WAIT
from nbdserve.buffers import fill_zeroes
from nbdserve.errors import RequestError
from nbdserve.extents import DATA, UNALLOCATED, ZERO, RunArray
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.storage.pool import JobFuture

_NOT_OWN: Final = -1
"""The depth of what a layer below the image under a window decides."""


class NodeStorage(Storage):
    """The disk of ``node`` as bytes. Its size is fixed: to write past the end is ENOSPC. Owns the node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.path = node.path
        self.read_only = node.read_only
        self.size = node.size
        self._closed = False

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if not buffer or offset + len(buffer) > self.size:
            return False
        try:
            outcome = self.node.try_read_into(offset, buffer)
            pieces = self.node.try_read_pieces(offset, buffer) if outcome == READ_SPLIT else None
        except RequestError:
            return False  # a corrupt mapping: the caller's other way reports it
        if outcome == READ_ZERO:
            fill_zeroes(buffer)
        elif pieces is not None:
            zero_pieces(buffer, pieces)
        else:
            return outcome == READ_DATA
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._check_open()
        inside = max(0, min(len(buffer), self.size - offset))
        with _as_os_error():
            await self.node.read_into(offset, buffer[:inside])
        fill_zeroes(buffer[inside:])

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self._check_writable(offset + len(data))
        if not data:
            return
        view = memoryview(data)
        taken: JobFuture[None] = JobFuture(loop=asyncio.get_running_loop())
        with _as_os_error():
            outcome = self.node.submit_write(offset, view, lambda error: taken.complete(None, error))
            if outcome == WRITE_TAKEN:
                await taken
            elif outcome == WRITE_WAIT:
                await self.node.write(offset, view)

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        """All at once, for the node's writer to gather; an error is raised when none of them is under way any more."""
        writes = [self.write(offset, data) for offset, data in pieces]
        for outcome in await asyncio.gather(*writes, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        self._check_writable(offset + length)
        with _as_os_error():
            await self.node.zero(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        self._check_writable(0)
        length = min(length, self.size - offset)
        if length > 0:
            with _as_os_error():
                await self.node.discard(offset, length)

    async def flush(self) -> None:
        self._check_open()
        with _as_os_error():
            await self.node.flush()

    async def truncate(self, size: int) -> None:
        """Nothing happens: like a block device, the disk keeps its size."""
        self._check_writable(size)

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        self._check_open()
        end = offset + length
        inside = max(offset, min(end, self.size))
        return await host_runs(map_node(self.node, offset, inside), inside, end, max_runs)

    def allocated_size(self) -> int | None:
        return self.node.top.storage.allocated_size()

    async def close(self) -> None:
        """Close the node, which flushes what is not stable yet."""
        if not self._closed:
            self._closed = True
            await self.node.close()

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, f"{self.path} is closed")

    def _check_writable(self, end: int) -> None:
        self._check_open()
        if self.read_only:
            raise OSError(errno.EROFS, f"{self.path} is open read-only")
        if end > self.size:
            raise OSError(errno.ENOSPC, f"{self.path}: its disk of {self.size} bytes does not grow")


async def host_runs(maps: AsyncIterator[ChainMap], inside: int, end: int, max_runs: int) -> RunArray:
    """``Storage.host_map`` of a disk with these maps, which end at ``inside``; zeroes follow up to ``end``."""
    found = [RunArray.empty()]
    async for part in maps:
        data = (part.kind != ZERO) & (part.kind != UNALLOCATED)
        kind = np.where(data, DATA, ZERO).astype(np.uint8)
        found.append(RunArray(part.start, part.length, kind, np.where(data, part.start, -1)).coalesced())
        if sum(map(len, found)) > max_runs:
            break
    else:
        if inside < end:
            found.append(RunArray.of(inside, end - inside, ZERO))
    runs = RunArray(
        np.concatenate([runs.start for runs in found]),
        np.concatenate([runs.length for runs in found]),
        np.concatenate([runs.kind for runs in found]),
        np.concatenate([runs.host_offset for runs in found]),
    ).coalesced()
    cut = slice(max_runs)
    return RunArray(runs.start[cut], runs.length[cut], runs.kind[cut], runs.host_offset[cut])


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What a storage may raise, for what a node raises."""
    try:
        yield
    except RequestError as error:
        raise OSError(error.errno, str(error)) from error


async def map_node(node: Node, start: int, end: int) -> AsyncIterator[ChainMap]:
    """``map_chain`` of the node; for a window that of the image under it.

    As QEMU tells it, a window sees what the top layer of the image under it has, and not how deep the rest is: the
    depth of that is -1, which counts as in no layer. Its kind is told.
    """
    below = node.data
    if len(node.layers) > 1 or not isinstance(node.top, RawDriver) or not isinstance(below, NodeStorage):
        async for part in map_chain(node.layers, start, end):
            yield part
        return
    _, _, host_offset = node.top.lookup(start, end - start)
    shift = host_offset - start
    async for part in map_node(below.node, start + shift, end + shift):
        depth = np.where(part.depth == 0, 0, _NOT_OWN).astype(np.int8)
        yield ChainMap(part.start - shift, part.length, depth, part.kind, part.host_offset)
