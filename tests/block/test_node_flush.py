"""A node: what a flush covers, who shares one, and closing."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

import pytest

from nbdserve.block.node import (
    Node,
)
from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN, WRITE_WAIT
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import Scripted, raw_node


def _never(error: Exception | None) -> None:
    raise AssertionError("a write that was not taken has ended")


class Flushes(MemoryStorage):
    """Counts flushes."""

    flushes = 0

    async def flush(self) -> None:
        self.flushes += 1


@pytest.mark.parametrize("writethrough", [False, True])
async def test_a_flush_follows_each_change_that_asks_for_it(writethrough: bool) -> None:
    storage = Flushes(bytes(64 * KIB))
    node = await raw_node(storage, writethrough=writethrough, unmap=True)
    await node.write(0, b"x")
    await node.zero(0, 512)
    await node.discard(0, 512)
    assert storage.flushes == (3 if writethrough else 0)
    storage.flushes = 0
    await node.write(0, b"x", fua=True)
    await node.zero(0, 512, fua=True)
    await node.discard(0, 512, fua=True)
    assert storage.flushes == 3
    await node.flush()
    assert storage.flushes == 3, "nothing has changed since"
    assert node.submit_write(0, memoryview(b"y"), _never) == (WRITE_WAIT if writethrough else WRITE_DONE)
    assert node.is_stable == writethrough
    await node.flush()
    assert storage.flushes == (3 if writethrough else 4)


async def test_discard_with_fua_flushes_even_where_discards_are_ignored() -> None:
    storage = Flushes(b"x" * 4096)
    node = await raw_node(storage)
    await node.discard(0, 4096, fua=True)
    assert storage.flushes == 1
    assert await node.read(0, 4096) == b"x" * 4096


async def test_a_read_only_node_has_nothing_to_flush() -> None:
    storage = Flushes(bytes(512))
    await Node([RawDriver(storage, 0, 512, read_only=True)], writethrough=True).flush()
    assert storage.flushes == 0


async def test_caching_reads_everything_and_changes_nothing() -> None:
    seen: list[tuple[int, int]] = []

    class Watched(MemoryStorage):
        async def read_into(self, offset: int, buffer: memoryview) -> None:
            seen.append((offset, len(buffer)))

    node = await raw_node(Watched(size=4 * MIB))
    await node.cache(100, 2 * MIB + 7)
    assert seen == [(100, MIB), (100 + MIB, MIB), (100 + 2 * MIB, 7)]
    await node.cache(0, 0)


async def test_every_layer_is_closed_and_the_first_error_is_raised() -> None:
    closed: list[str] = []

    class Layer(Scripted):
        async def close(self) -> None:
            closed.append(self.path)
            raise OSError(errno.EIO, self.path)

    with pytest.raises(OSError, match="layer a"):
        await Node([Layer("D", "a"), Layer("D", "b")]).close()
    assert closed == ["layer a", "layer b"]


class Slow(MemoryStorage):
    """A flush takes until it is let go, and may fail."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.started = 0
        self.go = asyncio.Semaphore(0)
        self.error: OSError | None = None

    async def flush(self) -> None:
        self.started += 1
        await self.go.acquire()
        if self.error is not None:
            raise self.error


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_flushes_between_which_nothing_changed_are_one() -> None:
    storage = Slow(bytes(4096))
    node = await raw_node(storage)
    await node.write(0, b"x")
    flushes = [asyncio.create_task(node.flush()) for _ in range(10)]
    await _turns()
    flushes.append(asyncio.create_task(node.flush()))
    await _turns()
    storage.go.release()
    await asyncio.wait_for(asyncio.gather(*flushes), 60)
    assert storage.started == 1
    assert node.is_stable
    await asyncio.wait_for(node.flush(), 60)
    assert storage.started == 1


@pytest.mark.parametrize("way", ["write", "submit", "zero", "discard"])
async def test_a_change_that_ends_after_a_flush_began_is_not_covered_by_it(way: str) -> None:
    storage = Slow(bytes(8192))
    node = await raw_node(storage, unmap=True)
    await node.write(0, b"x")
    first = asyncio.create_task(node.flush())
    await _turns()
    if way == "submit":
        assert node.submit_write(0, memoryview(b"late"), _never) == WRITE_DONE
    elif way == "write":
        await node.write(0, b"late")
    elif way == "zero":
        await node.zero(0, 512)
    else:
        await node.discard(0, 512)
    second = asyncio.create_task(node.flush())
    await _turns()
    assert storage.started == 2, "the running one does not count"
    storage.go.release()
    await asyncio.wait_for(first, 60)
    await _turns()
    assert not second.done()
    assert not node.is_stable
    storage.go.release()
    await asyncio.wait_for(second, 60)
    assert node.is_stable


async def test_a_write_under_way_while_a_flush_runs_is_not_counted_as_stable() -> None:
    class Held(Slow):
        def try_write(self, offset: int, data: ReadBuffer) -> bool:
            return False

        async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
            await self.go.acquire()
            for offset, data in pieces:
                MemoryStorage.try_write(self, offset, data)

    storage = Held(bytes(4096))
    node = await raw_node(storage)
    ends: list[Exception | None] = []
    await node.write(0, b"x")
    flush = asyncio.create_task(node.flush())
    await _turns()
    assert node.submit_write(0, memoryview(b"taken"), ends.append) == WRITE_TAKEN
    await _turns()
    for _ in range(2):
        storage.go.release()
    await asyncio.wait_for(flush, 60)
    await _turns()
    assert ends == [None]
    assert not node.is_stable
    storage.go.release()
    await asyncio.wait_for(node.flush(), 60)
    assert node.is_stable


async def test_a_failing_flush_is_reported_to_all_who_share_it_and_to_the_next() -> None:
    storage = Slow(bytes(4096))
    node = await raw_node(storage)
    await node.write(0, b"x")
    storage.error = OSError(errno.EIO, "lost")
    flushes = [asyncio.create_task(node.flush()) for _ in range(5)]
    await _turns()
    flushes[0].cancel()
    storage.go.release()
    results = await asyncio.gather(*flushes, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, OSError) and result.errno == errno.EIO for result in results[1:])
    assert storage.started == 1
    assert not node.is_stable
    storage.go.release()
    with pytest.raises(OSError, match="lost"):
        await node.flush()
    assert storage.started == 2


async def test_a_change_that_failed_is_not_taken_for_stable() -> None:
    class Full(Flushes):
        async def write(self, offset: int, data: ReadBuffer) -> None:
            raise OSError(errno.ENOSPC, "full")

    storage = Full(bytes(4096))
    node = await raw_node(storage)
    await node.flush()
    assert node.is_stable
    with pytest.raises(OSError, match="full"):
        await node.write(0, b"x")
    assert not node.is_stable
    await node.flush()
    assert storage.flushes == 2
