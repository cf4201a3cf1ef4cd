"""The disk of one moment, read while clients change the other."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.filters.copy_before_write import GRANULARITY, CopyBeforeWrite
from nbdserve.block.filters.snapshot_access import snapshot_access
from nbdserve.block.node import Node
from nbdserve.block.status import HOLE, READS_ZERO, allocation_flags, block_status
from nbdserve.protocol.constants import CMD_READ
from nbdserve.storage.memory import MemoryStorage
from tests.block.layers import overlay, raw_node
from tests.server.clients import serving

SIZE = 16 * GRANULARITY


async def _moment() -> tuple[Node, CopyBeforeWrite, Node]:
    source = await overlay(MemoryStorage(b"a" * (SIZE // 2), path="base"), SIZE)
    todo = DirtyBitmap(None, SIZE, GRANULARITY)
    todo.set(0, SIZE)
    moment = CopyBeforeWrite(source, await overlay(None, SIZE), todo, on_error=lambda error: None)
    async with source.drained():
        source.watch(moment)
    return source, moment, snapshot_access(moment, "moment")


async def test_it_shows_what_was_there_and_says_where_it_is() -> None:
    source, moment, node = await _moment()
    await source.write(GRANULARITY, b"b" * 512)
    await source.zero(3 * GRANULARITY, GRANULARITY)
    await source.write(SIZE - GRANULARITY, b"b" * GRANULARITY)
    assert await node.read(0, SIZE) == b"a" * (SIZE // 2) + bytes(SIZE // 2)
    assert moment.copied == 3 * GRANULARITY, "reading copies nothing"
    (extents,) = await block_status(node, 0, SIZE, [allocation_flags], 100)
    assert extents[0] == (SIZE // 2, 0)
    assert {flags for _, flags in extents[1:]} <= {0, HOLE | READS_ZERO}
    assert node.read_only
    with pytest.raises(OSError, match="read-only"):
        await node.data.write(0, b"x")
    await node.close()
    assert await source.read(GRANULARITY, 512) == b"b" * 512


async def test_under_random_writes() -> None:
    source, _, node = await _moment()
    before = await source.read(0, SIZE)
    rng = random.Random(5)
    stop = asyncio.Event()

    async def write() -> None:
        while not stop.is_set():
            offset = rng.randrange(0, SIZE - 4096, 512)
            await source.write(offset, rng.randbytes(8) * 512)
            await asyncio.sleep(0)

    writers = [asyncio.create_task(write()) for _ in range(3)]
    for _ in range(150):
        offset = rng.randrange(SIZE - 1)
        length = rng.randrange(1, min(SIZE - offset, 3 * GRANULARITY) + 1)
        assert await node.read(offset, length) == before[offset : offset + length]
        await asyncio.sleep(0)
    stop.set()
    await asyncio.gather(*writers)
    assert await node.read(0, SIZE) == before
    assert await source.read(0, SIZE) != before


async def test_a_client_who_writes_waits_for_one_who_reads() -> None:
    source, _, node = await _moment()
    real, go = source.read_pieces, asyncio.Event()

    async def slow(offset: int, buffer: memoryview) -> object:
        if not go.is_set():
            await go.wait()
        return await real(offset, buffer)

    source.read_pieces = slow  # type: ignore[method-assign,assignment]
    read = asyncio.create_task(node.read(0, 512))
    await asyncio.sleep(0)
    source.read_pieces = real  # type: ignore[method-assign]
    write = asyncio.create_task(source.write(0, b"b" * 512))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not write.done()
    go.set()
    assert await read == b"a" * 512
    await write


async def test_a_moment_that_is_lost_is_not_shown_wrongly() -> None:
    source, moment, node = await _moment()

    async def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    moment._target.write = full  # type: ignore[method-assign,assignment]
    await source.write(0, b"b" * 512)
    with pytest.raises(OSError, match=r"the moment is lost: .*full"):
        await node.read(0, 512)


async def test_clients_can_have_it(tmp_path: Path) -> None:
    source, _, node = await _moment()
    async with serving(tmp_path, source, node) as served:
        client = await served.connect("b")
        await source.write(0, b"b" * 4096)
        assert bytes((await client.ask(CMD_READ, 0, 4096)).data) == b"a" * 4096
        client.close()


async def test_a_granule_at_the_end_of_the_disk() -> None:
    source = await raw_node(MemoryStorage(b"a" * (GRANULARITY + 512)))
    todo = DirtyBitmap(None, source.size, GRANULARITY)
    todo.set(0, source.size)
    moment = CopyBeforeWrite(source, await raw_node(MemoryStorage(bytes(source.size))), todo)
    source.watch(moment)
    node = snapshot_access(moment, "moment")
    await source.write(GRANULARITY, b"b" * 512)
    assert await node.read(0, node.size) == b"a" * node.size
