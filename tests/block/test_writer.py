"""Batched writes: planned without waiting, written together, each answered once."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

import pytest

from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN, WRITE_WAIT
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.block.layers import overlay, raw_node

CLUSTER = 4096


class Trips(MemoryStorage):
    """Tells what was written together; a trip waits until it is let go, and may fail."""

    def __init__(self, content: bytes = b"", path: str = "trips") -> None:
        super().__init__(content, path=path)
        self.trips: list[list[tuple[int, int]]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.begun = asyncio.Event()
        self.bad: set[int] = set()
        """Offsets that cannot be written."""

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return False

    async def write(self, offset: int, data: ReadBuffer) -> None:
        super().try_write(offset, data)

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        self.trips.append([(offset, len(data)) for offset, data in pieces])
        self.begun.set()
        await asyncio.sleep(0)
        await self.go.wait()
        for offset, data in pieces:
            if offset in self.bad:
                raise OSError(errno.ENOSPC, "full")
            super().try_write(offset, data)


class Client:
    """Submits writes and collects how they end."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.ended: dict[int, list[Exception | None]] = {}

    def submit(self, offset: int, data: bytes) -> bool:
        """Whether the write was taken. The buffer is used again at once."""
        ends: list[Exception | None] = []
        buffer = bytearray(data)
        outcome = self.node.submit_write(offset, memoryview(buffer), ends.append)
        buffer[:] = b"\xdb" * len(buffer)
        assert outcome != WRITE_DONE, "these storages do nothing at once"
        if outcome == WRITE_TAKEN:
            self.ended[offset] = ends
        return outcome == WRITE_TAKEN

    async def all_ended(self) -> None:
        async with asyncio.timeout(60):
            while not all(self.ended.values()):
                await asyncio.sleep(0)

    def outcomes(self) -> dict[int, bool]:
        assert all(len(ends) == 1 for ends in self.ended.values()), "each write ends once"
        return {offset: ends[0] is None for offset, ends in self.ended.items()}


async def _nothing_is_locked(node: Node) -> None:
    lock = node.locks.exclusive(0, 1 << 62)
    await asyncio.wait_for(node.locks.acquire(lock), 60)
    node.locks.release(lock)


async def test_writes_that_come_together_go_in_one_trip_and_later_ones_in_the_next() -> None:
    storage = Trips(bytes(64 * KIB))
    client = Client(await raw_node(storage))
    storage.go.clear()
    for offset in (0, 8192, 512):
        assert client.submit(offset, b"a" * 512)
    await storage.begun.wait()
    for offset in (4096, 1024):
        assert client.submit(offset, b"b" * 512)
    storage.go.set()
    await client.all_ended()
    assert storage.trips == [[(0, 512), (8192, 512), (512, 512)], [(4096, 512), (1024, 512)]]
    assert all(client.outcomes().values())
    assert await client.node.read(512, 1024) == b"a" * 512 + b"b" * 512


async def test_one_bad_write_fails_alone() -> None:
    storage = Trips(bytes(64 * KIB))
    client = Client(await raw_node(storage))
    storage.bad = {1024}
    for offset in (0, 1024, 2048):
        assert client.submit(offset, b"x" * 512)
    await client.all_ended()
    assert client.outcomes() == {0: True, 1024: False, 2048: True}
    await _nothing_is_locked(client.node)


async def test_small_writes_into_one_new_cluster_allocate_it_once() -> None:
    base = MemoryStorage(b"b" * CLUSTER * 4, path="base.raw")
    storage = Trips(path="top")
    node = await overlay(base, CLUSTER * 4, storage=storage)
    client = Client(node)
    await node.write(CLUSTER * 3, b"x")  # the tables are in memory
    storage.trips.clear()
    for offset in range(0, CLUSTER, 512):
        assert client.submit(offset, bytes([65 + offset // 512]) * 500)
    await client.all_ended()
    assert len(storage.trips) == 1
    expected = b"".join(bytes([65 + number]) * 500 + b"b" * 12 for number in range(8))
    assert await node.read(0, CLUSTER * 2) == expected + b"b" * CLUSTER
    assert not (await node.top.check()).corruptions
    await _nothing_is_locked(node)


async def test_overlapping_writes_into_a_new_cluster_end_as_one_of_them() -> None:
    for base in (None, MemoryStorage(b"b" * CLUSTER * 2, path="base.raw")):
        node = await overlay(base, CLUSTER * 2, storage=Trips(path="top"))
        await node.write(CLUSTER, b"x")
        client = Client(node)
        slow = [
            asyncio.create_task(node.write(100 + number, bytes([65 + number]) * 100))
            for number in range(5)
            if not client.submit(100 + number, bytes([65 + number]) * 100)
        ]
        await client.all_ended()
        await asyncio.gather(*slow)
        content = await node.read(0, CLUSTER)
        outside = b"b" if base else b"\0"
        assert content[:100] == outside * 100
        assert set(content[104:200]) <= set(b"ABCDE")
        await _nothing_is_locked(node)


async def test_what_is_being_written_is_not_seen_before_it_is_there() -> None:
    storage = Trips(path="top")
    base = MemoryStorage(b"b" * CLUSTER * 2, path="base.raw")
    node = await overlay(base, CLUSTER * 2, storage=storage)
    await node.write(CLUSTER, b"x")
    client = Client(node)
    storage.go.clear()
    storage.begun.clear()
    assert client.submit(0, b"new")
    await storage.begun.wait()
    buffer = memoryview(bytearray(3))
    node.try_read_into(0, buffer)
    assert bytes(buffer) == b"bbb"
    storage.go.set()
    await client.all_ended()
    assert await node.read(0, 4) == b"newb"


async def test_a_failed_allocation_leaves_the_old_content_and_is_given_back() -> None:
    storage = Trips(path="top")
    base = MemoryStorage(b"b" * CLUSTER * 4, path="base.raw")
    node = await overlay(base, CLUSTER * 4, storage=storage)
    await node.write(CLUSTER * 3, b"x")
    await node.flush()
    storage.trips.clear()
    client = Client(node)
    storage.bad = set(range(0, 1 << 20))
    assert client.submit(100, b"new")
    assert client.submit(200, b"new")
    await client.all_ended()
    assert client.outcomes() == {100: False, 200: False}
    storage.bad = set()
    assert await node.read(0, CLUSTER) == b"b" * CLUSTER
    await _nothing_is_locked(node)
    await node.write(100, b"new")
    await node.flush()
    assert await node.read(99, 5) == b"bnewb"
    result = await node.top.check()
    assert not result.corruptions


@pytest.mark.parametrize("storage", [MemoryStorage, Trips])
async def test_nothing_of_one_copied_cluster_shows_in_the_next(storage: type[MemoryStorage]) -> None:
    """The buffer is the same: not where the backing file has ended, and not past the end of the disk."""
    secret = b"s" * CLUSTER
    base = MemoryStorage(secret * 2 + b"b" * 512, path="base.raw")
    node = await overlay(base, 4 * CLUSTER, storage=storage(path="top"))
    await node.write(0, b"x")
    await _submit_new(node, CLUSTER + 10)
    await _submit_new(node, 2 * CLUSTER + 10)
    assert await node.read(CLUSTER, CLUSTER) == secret[:10] + b"new" + secret[13:]
    assert await node.read(2 * CLUSTER, CLUSTER) == b"b" * 10 + b"new" + b"b" * 499 + bytes(CLUSTER - 512)
    base = MemoryStorage(secret * 3, path="base.raw")
    node = await overlay(base, 2 * CLUSTER + 512, storage=storage(path="top"))
    await node.write(0, b"x")
    await _submit_new(node, CLUSTER + 10)
    await _submit_new(node, 2 * CLUSTER)
    run = node.top.lookup(2 * CLUSTER, 512)
    assert run is not None
    assert await node.data.read(run[2], CLUSTER) == b"new" + secret[:509] + bytes(CLUSTER - 512)


async def _submit_new(node: Node, offset: int) -> None:
    ended = asyncio.Event()
    outcome = node.submit_write(offset, memoryview(b"new"), lambda error: ended.set())
    assert outcome != WRITE_WAIT
    if outcome == WRITE_TAKEN:
        await asyncio.wait_for(ended.wait(), 60)


async def test_a_write_into_a_range_that_is_held_is_left_to_its_caller() -> None:
    node = await raw_node(Trips(bytes(8192)))
    client = Client(node)
    async with node.locks.exclusive(0, 4096):
        assert not client.submit(4000, b"x" * 200)
        assert client.submit(4096, b"y" * 200)
    await client.all_ended()
    assert await node.read(4000, 200) == bytes(96) + b"y" * 104


async def test_a_flush_covers_the_writes_that_ended_before_it() -> None:
    node = await overlay(None, CLUSTER * 4, storage=Trips(path="top"))
    await node.write(CLUSTER, b"x")
    client = Client(node)
    assert client.submit(0, b"stable")
    await client.all_ended()
    await node.flush()
    image = bytes(await node.top.storage.read(0, node.top.storage.size))
    again = await type(node.top).open(MemoryStorage(image), {}, read_only=True)
    assert await Node([again]).read(0, 6) == b"stable"


@pytest.mark.parametrize("queued", [False, True])
async def test_a_flush_waits_for_what_is_being_written_so_that_one_is_enough(queued: bool) -> None:
    storage = Trips(path="top")
    node = await overlay(None, CLUSTER * 8, storage=storage)
    await node.write(CLUSTER * 7, b"x")
    storage.go.clear()
    client = Client(node)
    assert client.submit(0, b"under way")
    if queued:
        storage.begun.clear()
        async with asyncio.timeout(60):
            await storage.begun.wait()
        assert client.submit(CLUSTER, b"in the queue")
    flushing = asyncio.create_task(node.flush())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not flushing.done()
    storage.go.set()
    await asyncio.wait_for(flushing, 60)
    assert client.outcomes() == dict.fromkeys(client.ended, True)
    assert node.is_stable


async def test_a_flush_does_not_wait_for_ever_while_others_write() -> None:
    node = await overlay(None, CLUSTER * 64, storage=Trips(path="top"))
    await node.write(CLUSTER * 63, b"x")
    client, offsets = Client(node), iter(range(60))

    def write_on(error: Exception | None) -> None:
        number = next(offsets, None)
        if number is not None:
            node.submit_write(number * CLUSTER, memoryview(b"more"), write_on)

    write_on(None)
    assert client.submit(CLUSTER * 62, b"mine")
    await asyncio.wait_for(node.flush(), 60)
    assert client.outcomes() == {CLUSTER * 62: True}
    assert next(offsets, None) is not None, "others are still writing"
