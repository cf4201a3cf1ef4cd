"""Copying what a bitmap says, while it changes."""

from __future__ import annotations

import asyncio

import pytest

from nbdserve.block.node import Node
from nbdserve.block.pieces import Piece
from nbdserve.jobs.live_copy import CHUNK, GRANULARITY, LiveCopy
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import overlay, raw_node
from tests.jobs.examples import Scripted


async def _copy(source: Node, target: Node, **options: str) -> LiveCopy:
    return LiveCopy(Scripted(), source, target, source.size, **options)  # type: ignore[arg-type]


async def test_only_what_is_marked_is_copied() -> None:
    source = await raw_node(MemoryStorage(b"s" * 3 * MIB))
    target = await raw_node(MemoryStorage(bytes(3 * MIB)))
    copy = await _copy(source, target)
    copy.changed(CHUNK - 1, 2)
    copy.changed(3 * MIB - 1, 100)
    assert copy.remaining == 3 * GRANULARITY
    await copy.sweep()
    assert copy.remaining == 0
    expected = bytearray(3 * MIB)
    for start in (CHUNK - GRANULARITY, CHUNK, 3 * MIB - GRANULARITY):
        expected[start : start + GRANULARITY] = b"s" * GRANULARITY
    assert await target.read(0, 3 * MIB) == expected


@pytest.mark.parametrize(
    ("above", "zeroes", "marked"), [(None, True, 8), (None, False, 3), (1, True, 3), (1, False, 2)]
)
async def test_what_is_marked_of_a_chain(above: int | None, zeroes: bool, marked: int) -> None:
    base = MemoryStorage(b"b" * GRANULARITY + bytes(7 * GRANULARITY), path="base")
    node = await overlay(base, 8 * GRANULARITY, cluster_size=GRANULARITY)
    node.layers[1].lookup = lambda offset, length: (0 if offset < GRANULARITY else 2, length, offset)  # type: ignore[method-assign]

    async def runs(start: int, end: int):  # type: ignore[no-untyped-def]
        from nbdserve.extents import DATA, UNALLOCATED, RunArray  # noqa: PLC0415

        if start < GRANULARITY:
            yield RunArray.of(start, min(end, GRANULARITY) - start, DATA, start)
        if end > GRANULARITY:
            first = max(start, GRANULARITY)
            yield RunArray.of(first, end - first, UNALLOCATED)

    node.layers[1].iter_runs = runs  # type: ignore[method-assign]
    await node.write(GRANULARITY, b"x" * 2 * GRANULARITY)
    await node.zero(4 * GRANULARITY, GRANULARITY)
    copy = await _copy(node, await raw_node(MemoryStorage(bytes(8 * GRANULARITY))))
    await copy.mark(above=above, zeroes=zeroes)
    assert copy.remaining == marked * GRANULARITY
    await node.close()


async def test_what_changes_while_it_is_read_is_copied_again() -> None:
    storage = MemoryStorage(b"a" * 256 * KIB)
    source = await raw_node(storage)
    target = await raw_node(MemoryStorage(bytes(256 * KIB)))
    copy = await _copy(source, target)
    source.watch(copy)
    real = source.read_pieces

    async def late(offset: int, buffer: memoryview) -> list[Piece]:
        pieces = await real(offset, buffer)
        source.read_pieces = real  # type: ignore[method-assign]
        await source.write(offset, b"new")
        return pieces

    source.read_pieces = late  # type: ignore[method-assign]
    await copy.mark()
    await copy.sweep()
    assert copy.remaining == GRANULARITY
    await copy.sweep()
    assert copy.remaining == 0
    assert await target.read(0, 4) == b"newa"


async def test_an_area_in_flight_is_not_copied_twice_at_once() -> None:
    """A write that is under way with old bytes must not overtake the one with the new bytes."""
    gate = asyncio.Event()

    class Slow(MemoryStorage):
        writing = most = 0

        def try_write(self, offset: int, data: ReadBuffer) -> bool:
            return False

        async def write(self, offset: int, data: ReadBuffer) -> None:
            self.writing += 1
            self.most = max(self.most, self.writing)
            await gate.wait()
            super().try_write(offset, data)
            self.writing -= 1

    storage = Slow(bytes(256 * KIB))
    source = await raw_node(MemoryStorage(b"a" * 256 * KIB))
    copy = await _copy(source, await raw_node(storage))
    source.watch(copy)
    await copy.mark()
    first = asyncio.create_task(copy.sweep())
    while not storage.writing:
        await asyncio.sleep(0)
    await source.write(0, b"b" * 256 * KIB)
    second = [copy._next(0), copy._next(0, busy=True)]
    assert second == [None, (0, 256 * KIB)]
    gate.set()
    await first
    while copy.remaining:
        await copy.sweep()
    assert storage.most == 1
    assert await copy._target.read(0, 256 * KIB) == b"b" * 256 * KIB


async def test_what_was_not_copied_is_marked_again() -> None:
    class Broken(MemoryStorage):
        def try_write(self, offset: int, data: ReadBuffer) -> bool:
            return False

        async def write(self, offset: int, data: ReadBuffer) -> None:
            raise OSError(5, "broken")

    source = await raw_node(MemoryStorage(b"a" * 4 * MIB))
    copy = await _copy(source, await raw_node(Broken(bytes(4 * MIB))))
    await copy.mark()
    with pytest.raises(OSError, match="broken"):
        await copy.sweep()
    assert copy.remaining == 4 * MIB
