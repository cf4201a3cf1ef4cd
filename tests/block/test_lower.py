"""The lower layers as a disk of their own, under the clients of the whole."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nbdserve.block.forms import READ_DATA
from nbdserve.block.lower import LowerNode
from nbdserve.block.node import Node
from nbdserve.formats.vdi.driver import VdiDriver
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import overlay
from tests.support import images

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


@images.needs_qemu
async def test_room_that_is_made_below_is_made_between_the_requests_above(tmp_path: Path) -> None:
    path = tmp_path / "base.vdi"
    images.create(path, 4 * MIB, fmt="vdi")
    images.qemu_io(path, "vdi", ["write -P 7 1M 1M"])
    top = await overlay(None, 4 * MIB, cluster_size=CLUSTER)
    top.top.has_backing = True  # type: ignore[attr-defined]
    node = Node([top.top, await VdiDriver.open(await FileStorage.open(str(path)), {}, read_only=False)])
    lower = LowerNode(node, 1)
    assert await node.read(MIB, 512) == b"\7" * 512
    assert node.try_read_into(MIB, memoryview(bytearray(512))) == READ_DATA
    async with node.gate:
        write = asyncio.create_task(lower.write(3 * MIB, b"n" * 512))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not node.layers[1].keeps_places
    await write
    assert node.layers[1].keeps_places
    assert not node.places.readable
    assert await node.read(MIB, MIB) == b"\7" * MIB
    assert await node.read(3 * MIB, 513) == b"n" * 512 + b"\0"
    await node.close()
