"""Watchers are told of every change, in every form of request, and of nothing else."""

from __future__ import annotations

import asyncio
import errno
from typing import ClassVar

import pytest

from nbdserve.block.node import Node
from nbdserve.block.watchers import Watcher
from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN, WRITE_WAIT
from nbdserve.errors import RequestError
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.block.layers import overlay, raw_node


class Recorder(Watcher):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.sizes: list[tuple[int, int]] = []

    def changed(self, offset: int, length: int) -> None:
        self.seen.append((offset, length))

    def resized(self, old_size: int, size: int) -> None:
        self.sizes.append((old_size, size))


class Guard(Watcher):
    """Keeps what was there before."""

    goes_before: ClassVar[bool] = True

    def __init__(self, node: Node) -> None:
        self.node = node
        self.kept: list[tuple[int, bytes]] = []
        self.error: Exception | None = None

    async def before(self, offset: int, length: int) -> None:
        if self.error is not None:
            raise self.error
        self.kept.append((offset, bytes(await self.node.read(offset, length))))


class Broken(MemoryStorage):
    """Cannot be written."""

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return False

    async def write(self, offset: int, data: ReadBuffer) -> None:
        raise OSError(errno.EIO, "broken")


class Waiting(MemoryStorage):
    """Writes only when waited for."""

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return False

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await asyncio.sleep(0)
        super().try_write(offset, data)


def _never(error: Exception | None) -> None:
    raise AssertionError("it was not taken")


async def test_every_kind_of_change_is_told_once() -> None:
    node = await raw_node(MemoryStorage(bytes(64 * KIB)), unmap=True)
    watcher = Recorder()
    node.watch(watcher)
    assert node.submit_write(0, memoryview(b"x" * 512), _never) == WRITE_DONE
    await node.write(1024, b"y" * 100)
    await node.zero(2048, 200)
    await node.discard(4096, 4096)
    await node.write(8192, b"z", fua=True)
    await node.read(0, 512)
    await node.flush()
    assert watcher.seen == [(0, 512), (1024, 100), (2048, 200), (4096, 4096), (8192, 1)]
    node.unwatch(watcher)
    await node.write(0, b"x")
    assert node.submit_write(0, memoryview(b"x" * 512), _never) == WRITE_DONE
    assert len(watcher.seen) == 5


async def test_a_change_is_told_after_it_is_made_and_before_it_is_acknowledged() -> None:
    node = await raw_node(Waiting(bytes(4 * KIB)))
    order: list[str] = []

    class Ordered(Watcher):
        def changed(self, offset: int, length: int) -> None:
            buffer = bytearray(length)
            assert node.data.try_read_into(offset, memoryview(buffer))
            order.append(buffer.decode())

    node.watch(Ordered())
    taken = asyncio.get_running_loop().create_future()

    def done(error: Exception | None) -> None:
        assert error is None
        order.append("acknowledged")
        taken.set_result(None)

    assert node.submit_write(0, memoryview(b"abcd"), done) == WRITE_TAKEN
    assert order == []
    await taken
    assert order == ["abcd", "acknowledged"]


async def test_a_change_that_failed_may_have_changed_something() -> None:
    node = await raw_node(Broken(bytes(4 * KIB)))
    watcher = Recorder()
    node.watch(watcher)
    with pytest.raises(OSError, match="broken"):
        await node.write(512, b"x" * 512)
    ended = asyncio.get_running_loop().create_future()
    assert node.submit_write(1024, memoryview(b"x" * 512), ended.set_result) == WRITE_TAKEN
    assert isinstance(await ended, OSError)
    assert watcher.seen == [(512, 512), (1024, 512)]


async def test_a_guard_sees_what_was_there_before_every_change() -> None:
    node = await overlay(MemoryStorage(b"b" * 64 * KIB, path="base"), 64 * KIB, unmap=True)
    guard = Guard(node)
    node.watch(guard)
    assert node.submit_write(0, memoryview(b"x" * 4096), _never) == WRITE_WAIT
    await node.write(0, b"x" * 4096)
    await node.write(0, b"y" * 4096)
    await node.zero(4096, 4096)
    await node.discard(4096, 4096)
    assert guard.kept == [(0, b"b" * 4096), (0, b"x" * 4096), (4096, b"b" * 4096), (4096, bytes(4096))]
    guard.error = RequestError(errno.ENOSPC, "no room for the copy")
    with pytest.raises(RequestError, match="no room"):
        await node.write(0, b"z" * 4096)
    assert await node.read(0, 4096) == b"y" * 4096
    node.unwatch(guard)
    assert node.submit_write(0, memoryview(b"x" * 4096), _never) == WRITE_DONE
    await node.close()


async def test_a_guard_reads_while_the_node_is_being_drained() -> None:
    node = await raw_node(MemoryStorage(b"a" * 4 * KIB))
    reading = asyncio.Event()

    class Late(Guard):
        async def before(self, offset: int, length: int) -> None:
            reading.set()
            while not node.gate.closed:
                await asyncio.sleep(0)
            await super().before(offset, length)

    guard = Late(node)
    node.watch(guard)
    write = asyncio.create_task(node.write(0, b"b" * 512))
    await reading.wait()
    async with asyncio.timeout(60), node.drained():
        assert write.done()
    assert guard.kept == [(0, b"a" * 512)]


async def test_one_that_comes_while_drained_misses_nothing_after() -> None:
    node = await raw_node(MemoryStorage(bytes(4 * KIB)))
    watcher = Recorder()
    async with node.drained():
        node.watch(watcher)
    assert node.submit_write(0, memoryview(b"x" * 512), _never) == WRITE_DONE
    assert watcher.seen == [(0, 512)]


async def test_a_new_size_is_told() -> None:
    node = await raw_node(MemoryStorage(b"x" * 4 * KIB))
    watcher = Recorder()
    node.watch(watcher)
    await node.resize(8 * KIB)
    await node.resize(2 * KIB)
    assert watcher.sizes == [(4 * KIB, 8 * KIB), (8 * KIB, 2 * KIB)]
