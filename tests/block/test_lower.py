"""The lower layers as a disk of their own, under the clients of the whole."""

from __future__ import annotations

import asyncio

from nbdserve.block.forms import READ_DATA
from nbdserve.block.lower import LowerNode
from nbdserve.block.node import Node
from nbdserve.units import KIB
from tests.block.layers import overlay

CLUSTER = 64 * KIB


async def _chain() -> Node:
    """A qcow2 over a qcow2, the lower one with data in its first two clusters."""
    base = await overlay(None, 4 * CLUSTER, cluster_size=CLUSTER)
    await base.write(0, b"b" * 2 * CLUSTER)
    top = await overlay(None, 4 * CLUSTER, cluster_size=4 * KIB)
    top.top.has_backing = True  # type: ignore[attr-defined]
    return Node([top.top, base.top])


async def test_what_is_written_below_shows_where_nothing_is_above() -> None:
    node = await _chain()
    lower = LowerNode(node, 1)
    await node.write(0, b"t" * 4 * KIB)
    await lower.write(0, b"l" * 8 * KIB)
    assert await node.read(0, 12 * KIB) == b"t" * 4 * KIB + b"l" * 4 * KIB + b"b" * 4 * KIB
    assert lower.size == 4 * CLUSTER
    assert not lower.read_only


async def test_places_remembered_above_are_forgotten_when_they_change_below() -> None:
    node = await _chain()
    lower = LowerNode(node, 1)
    buffer = memoryview(bytearray(512))
    assert node.try_read_into(CLUSTER, buffer) == READ_DATA
    assert node.places.readable
    await lower.zero(CLUSTER, CLUSTER)
    assert not node.places.readable
    assert node.try_read_into(0, buffer) == READ_DATA
    allocation = lower.top.allocate(0, CLUSTER)
    assert allocation is not None
    await lower.data.write(allocation.host_offset, b"n" * CLUSTER)
    lower.publish(allocation)
    assert node.try_read_into(0, buffer) == READ_DATA
    assert buffer == b"n" * 512


async def test_a_cluster_is_not_moved_while_a_client_reads_it() -> None:
    node = await _chain()
    lower = LowerNode(node, 1)
    async with node.locks.shared(2 * CLUSTER, 3 * CLUSTER):
        write = asyncio.create_task(lower.write(2 * CLUSTER, b"n" * 512, fua=True))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not write.done()
    await write
    assert await node.read(2 * CLUSTER, 512) == b"n" * 512


async def test_space_is_kept_for_replies_that_refer_to_it() -> None:
    node = await _chain()
    lower = LowerNode(node, 1)
    lower.unmap = True
    run = lower.top.lookup(0, CLUSTER)
    await lower.zero(0, CLUSTER)
    kept = lower.top.lookup(0, CLUSTER)
    assert run is not None
    assert kept is not None
    assert kept[2] == run[2]
