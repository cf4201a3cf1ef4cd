"""What changes a disk is dirty, whichever way it takes, before it is acknowledged; without bitmaps nobody watches."""

from __future__ import annotations

import asyncio
import random

import pytest

from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import overlay, raw_node
from tests.server.clients import Gated

GRANULARITY = 4 * KIB


def dirty(node: Node, name: str = "b") -> set[int]:
    bitmap = node.bitmaps.get(name)
    return {at for at in range(-(-bitmap.size // GRANULARITY)) if bitmap.is_dirty(at * GRANULARITY)}


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_random_changes(kind: str) -> None:
    """The content differs from what it was only where the bitmap is dirty."""
    source = random.Random(7)
    base = MemoryStorage(source.randbytes(MIB))
    policy = {"unmap": True}
    node = await (raw_node(base, **policy) if kind == "raw" else overlay(base, MIB, cluster_size=64 * KIB, **policy))
    node.bitmaps.add("b", GRANULARITY)
    before = bytes(await node.read(0, MIB))
    model: set[int] = set()
    waiting: list[asyncio.Future[None]] = []
    for _ in range(80):
        offset = source.randrange(MIB)
        length = min(MIB - offset, source.choice([1, 512, 5000, 70_000]))
        way = source.randrange(4)
        if way == 0:
            await node.write(offset, source.randbytes(length))
        elif way == 1:
            await node.zero(offset, length)
        elif way == 2:
            await node.discard(offset, length)
        else:
            done = asyncio.get_running_loop().create_future()
            outcome = node.submit_write(
                offset, memoryview(source.randbytes(length)), lambda error, done=done: done.set_result(error)
            )
            if outcome == WRITE_TAKEN:
                waiting.append(done)
            elif outcome != WRITE_DONE:
                continue
        model |= set(range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1))
    await asyncio.gather(*waiting)
    assert dirty(node) == model
    after = await node.read(0, MIB)
    for at in set(range(MIB // GRANULARITY)) - model:
        part = slice(at * GRANULARITY, (at + 1) * GRANULARITY)
        assert after[part] == before[part]
    await node.close()


async def test_a_write_is_dirty_when_it_is_acknowledged() -> None:
    disk = Gated(size=MIB)
    node = await raw_node(disk)
    node.bitmaps.add("b", GRANULARITY)
    seen: list[set[int]] = []
    done = asyncio.Event()

    def acknowledge(error: Exception | None) -> None:
        seen.append(dirty(node))
        done.set()

    assert node.submit_write(8 * KIB, memoryview(b"x"), acknowledge) == WRITE_TAKEN
    await asyncio.wait_for(done.wait(), 60)
    assert seen == [{2}]
    await node.write(5, b"")
    assert dirty(node) == {2}
    await node.close()


async def test_nobody_watches_without_bitmaps() -> None:
    node = await raw_node(MemoryStorage(size=MIB))
    plain = node.submit_write
    first, second = node.bitmaps.add("b"), node.bitmaps.add(None)
    assert node.submit_write != plain
    node.bitmaps.discard(first)
    assert node.submit_write != plain
    node.bitmaps.discard(second)
    assert node.submit_write == plain
    assert node.submit_write(0, memoryview(b"x"), lambda error: None) == WRITE_DONE
    await node.close()


async def test_what_a_resize_adds_is_dirty() -> None:
    node = await overlay(None, MIB, cluster_size=64 * KIB)
    node.bitmaps.add("b", GRANULARITY)
    await node.write(0, b"x")
    await node.resize(MIB + 8 * KIB)
    assert node.bitmaps.size == MIB + 8 * KIB
    assert dirty(node) == {0, 256, 257}
    node.bitmaps.discard(node.bitmaps.get("b"))
    await node.resize(2 * MIB)
    node.bitmaps.add("b", GRANULARITY)
    await node.write(2 * MIB - 1, b"x")
    assert dirty(node) == {511}
    await node.close()


async def test_the_default_granularity_is_the_cluster_size_between_4_and_64_kib() -> None:
    for cluster_size, expected in ((512, 4), (16 * KIB, 16), (2 * MIB, 64)):
        node = await overlay(None, 4 * MIB, cluster_size=cluster_size)
        assert node.bitmaps.default_granularity == expected * KIB
        await node.close()
    assert (await raw_node(MemoryStorage(size=MIB))).bitmaps.default_granularity == 64 * KIB
