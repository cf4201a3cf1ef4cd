"""Copy-on-read: the top layer is filled with what lies below, and nobody sees it."""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbdserve.block.node import Node
from nbdserve.block.populate import populate
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.block.layers import overlay

CLUSTER = 4 * KIB
SIZE = 64 * KIB


async def _chain() -> Node:
    """Three layers; the base is all data, the one between has a cluster of data and one of zeroes."""
    base = MemoryStorage(b"b" * SIZE, path="base")
    below = await overlay(base, SIZE)
    await below.write(CLUSTER, b"m" * CLUSTER)
    await below.zero(2 * CLUSTER, CLUSTER)
    top = await overlay(None, SIZE)
    top.top.has_backing = True  # type: ignore[attr-defined]
    return Node([top.top, *below.layers])


def _kind(node: Node, cluster: int) -> int:
    run = node.top.lookup(cluster * CLUSTER, CLUSTER)
    assert run is not None
    return run[0]


async def _all(node: Node, below: int) -> None:
    offset = 0
    while offset < node.size:
        done = await populate(node, offset, node.size - offset, below)
        assert done > 0
        offset += done


@pytest.mark.parametrize(("below", "kinds"), [(2, "UDZU"), (3, "DDZD")])
async def test_what_the_layers_between_decide_is_copied(below: int, kinds: str) -> None:
    node = await _chain()
    before = await node.read(0, SIZE)
    await _all(node, below)
    assert [_kind(node, cluster) for cluster in range(4)] == [
        {"U": UNALLOCATED, "D": DATA, "Z": ZERO}[kind] for kind in kinds
    ]
    assert await node.read(0, SIZE) == before
    rest = node.layers[2:] if below == 2 else []
    assert await Node([node.top, *rest]).read(0, SIZE) == before
    assert not node.is_stable


async def test_what_the_top_layer_has_stays() -> None:
    node = await _chain()
    await node.write(CLUSTER, b"t" * CLUSTER)
    await node.zero(0, CLUSTER)
    await _all(node, 3)
    assert await node.read(0, 3 * CLUSTER) == bytes(CLUSTER) + b"t" * CLUSTER + bytes(CLUSTER)


async def test_a_write_that_comes_first_is_not_undone() -> None:
    node = await _chain()
    await node.write(4 * CLUSTER, b"b" * CLUSTER)  # tables and free clusters are in memory
    async with node.locks.exclusive(CLUSTER, 2 * CLUSTER):
        filling = asyncio.create_task(populate(node, CLUSTER, CLUSTER, 3))
        for _ in range(10):
            await asyncio.sleep(0)
        allocation = node.top.allocate(CLUSTER, CLUSTER)
        assert allocation is not None
        await node.data.write(allocation.host_offset, b"t" * CLUSTER)
        node.publish(allocation)
    assert await filling == CLUSTER
    assert await node.read(CLUSTER, CLUSTER) == b"t" * CLUSTER


async def test_a_part_of_a_cluster_at_the_end_of_the_disk() -> None:
    base = MemoryStorage(b"b" * (CLUSTER + 512), path="base")
    top = await overlay(None, CLUSTER + 512)
    top.top.has_backing = True  # type: ignore[attr-defined]
    node = Node([top.top, RawDriver(base, 0, base.size, read_only=True)])
    await _all(node, 2)
    assert await Node([node.top]).read(0, CLUSTER + 512) == b"b" * (CLUSTER + 512)


async def test_a_failure_gives_the_space_back(monkeypatch: pytest.MonkeyPatch) -> None:
    node = await _chain()

    async def full(offset: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(node.data, "write", full)
    with pytest.raises(OSError, match="full"):
        await populate(node, CLUSTER, CLUSTER, 3)
    monkeypatch.undo()
    assert _kind(node, 1) == UNALLOCATED
    assert await node.read(CLUSTER, CLUSTER) == b"m" * CLUSTER


async def test_zeroes_are_a_change_that_a_flush_makes_stable() -> None:
    node = await _chain()
    await node.flush()
    await populate(node, 2 * CLUSTER, CLUSTER, 2)
    assert _kind(node, 2) == ZERO
    assert not node.is_stable


async def test_a_cancelled_write_gives_the_space_back(monkeypatch: pytest.MonkeyPatch) -> None:
    node = await _chain()
    writing, abandoned = asyncio.Event(), []

    async def slow(offset: int, data: memoryview) -> None:
        writing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(node.data, "write", slow)
    monkeypatch.setattr(node.top, "abandon", abandoned.append)
    filling = asyncio.create_task(populate(node, CLUSTER, CLUSTER, 3))
    await writing.wait()
    filling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await filling
    assert [allocation.offset for allocation in abandoned] == [CLUSTER]
    assert _kind(node, 1) == UNALLOCATED
