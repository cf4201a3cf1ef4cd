"""Keeping a moment: each part is copied once, before it changes."""

from __future__ import annotations

import asyncio

import pytest

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.filters.copy_before_write import GRANULARITY, CopyBeforeWrite
from nbdserve.block.node import Node
from nbdserve.storage.memory import MemoryStorage
from tests.block.layers import raw_node
from tests.jobs.test_mirror import Full

SIZE = 4 * GRANULARITY


async def _pair(target: MemoryStorage | None = None) -> tuple[Node, Node, DirtyBitmap]:
    todo = DirtyBitmap(None, SIZE, GRANULARITY)
    todo.set(0, SIZE)
    return (
        await raw_node(MemoryStorage(b"a" * SIZE)),
        await raw_node(target or MemoryStorage(bytes(SIZE))),
        todo,
    )


async def test_a_granule_is_copied_before_its_first_change_only() -> None:
    source, target, todo = await _pair()
    source.watch(moment := CopyBeforeWrite(source, target, todo))
    await source.write(GRANULARITY - 1, b"bb")
    await source.write(0, b"c" * GRANULARITY)
    assert moment.copied == 2 * GRANULARITY
    assert await target.read(0, SIZE) == b"a" * 2 * GRANULARITY + bytes(2 * GRANULARITY)


@pytest.mark.parametrize("breaks", ["change", "copy"])
async def test_a_copy_that_fails(breaks: str) -> None:
    storage = Full(bytes(SIZE))
    storage.error = OSError(28, "full")
    source, target, todo = await _pair(storage)
    errors: list[Exception] = []
    source.watch(moment := CopyBeforeWrite(source, target, todo, on_error=errors.append if breaks == "copy" else None))
    if breaks == "change":
        with pytest.raises(OSError, match="full"):
            await source.write(0, b"b" * 512)
        assert await source.read(0, 512) == b"a" * 512
    else:
        await source.write(0, b"b" * 512)
        assert errors == [storage.error]
    assert moment.failed == "write"
    assert todo.count() == SIZE


async def test_a_client_waits_for_the_copy_under_way_and_a_drain_for_both() -> None:
    """The copy is inside the gate; were it outside, the drain would hold it up, and the client that waits for it."""
    go = asyncio.Event()

    class Slow(MemoryStorage):
        def try_write(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
            return False

        async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
            await go.wait()
            super().try_write(offset, data)

    source, target, todo = await _pair(Slow(bytes(SIZE)))
    source.watch(moment := CopyBeforeWrite(source, target, todo))
    copy = asyncio.create_task(moment.keep(0, GRANULARITY))
    await asyncio.sleep(0)
    write = asyncio.create_task(source.write(0, b"b" * 512))

    async def drain() -> None:
        async with source.drained():
            pass

    draining = asyncio.create_task(drain())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not (copy.done() or write.done() or draining.done())
    go.set()
    async with asyncio.timeout(60):
        await asyncio.gather(copy, write, draining)
    assert await target.read(0, 512) == b"a" * 512
    assert await source.read(0, 512) == b"b" * 512
