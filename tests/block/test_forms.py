"""Forms of requests that do not wait, for nodes that are held back or have shrunk; ``test_drain`` has the clients."""

from __future__ import annotations

import pytest

from nbdserve.block import forms
from nbdserve.block.node import Node
from nbdserve.block.watchers import Watcher
from nbdserve.block.writer import WRITE_DONE, WRITE_WAIT
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import overlay


def _never(error: Exception | None) -> None:
    raise AssertionError("only a write that was taken ends later")


async def _node() -> Node:
    return Node([await RawDriver.open(MemoryStorage(size=64 * KIB), {}, read_only=False)])


async def test_nothing_is_done_on_a_node_that_is_held_back() -> None:
    node = await _node()
    buffer = memoryview(bytearray(4))
    assert node.submit_write(0, memoryview(b"data"), lambda error: None) == WRITE_DONE
    assert node.try_write(0, memoryview(b"data"))
    forms.refuse_all(node)
    assert not node.try_write(0, memoryview(b"more"))
    assert node.submit_write(0, memoryview(b"more"), lambda error: None) == WRITE_WAIT
    assert node.try_read_into(0, buffer) == forms.READ_WAIT
    assert node.try_read_pieces(0, buffer) is None
    assert node.locate_read(0, 4) is None
    assert await node.read(0, 4) == b"data"


async def test_outside_of_a_disk_that_has_shrunk_nothing_is_done() -> None:
    node = await _node()
    node.size = 32 * KIB
    forms.refuse_outside(node)
    buffer = memoryview(bytearray(4))
    for offset, inside in ((32 * KIB - 4, True), (32 * KIB - 3, False), (40 * KIB, False)):
        assert (node.try_read_into(offset, buffer) != forms.READ_WAIT) is inside
        assert (node.try_read_pieces(offset, buffer) is not None) is inside
        assert (node.locate_read(offset, 4) is not None) is inside
        assert node.try_write(offset, memoryview(b"data")) is inside
        written = node.submit_write(offset, memoryview(b"data"), lambda error: None)
        assert (written == WRITE_DONE) is inside


async def test_a_raw_disk_is_overwritten_at_once_where_its_window_lies() -> None:
    storage = MemoryStorage(size=64 * KIB)
    node = Node([await RawDriver.open(storage, {"offset": 4 * KIB}, read_only=False)])
    before = node.changes
    assert node.try_write(100, memoryview(b"data"))
    assert node.changes == before + 1, "a flush has something to do"
    assert (await storage.read(0, 64 * KIB))[4 * KIB + 100 : 4 * KIB + 104] == b"data"
    buffer = bytearray(4)
    assert node.try_read_into(100, memoryview(buffer)) == forms.READ_DATA
    assert buffer == b"data"


async def test_clusters_are_overwritten_at_once_when_their_place_is_known_and_as_long_as_it_holds() -> None:
    node = await overlay(None, MIB)
    cluster = node.top.cluster_size
    await node.write(0, b"a" * 2 * cluster)
    old, new = memoryview(b"b" * KIB), memoryview(b"c" * KIB)
    assert not node.try_write(0, old), "nobody has asked where it is"
    assert node.submit_write(0, old, _never) == WRITE_DONE
    assert node.try_write(KIB, new)
    assert not node.try_write(cluster - 100, new), "two clusters"
    assert await node.read(0, 3 * KIB) == b"b" * KIB + b"c" * KIB + b"a" * KIB
    await node.zero(0, cluster)
    assert not node.try_write(0, new)
    assert await node.read(0, cluster) == bytes(cluster)


@pytest.mark.parametrize("way", ["read_only", "writethrough", "detect_zeroes", "watched"])
async def test_a_write_that_others_must_know_of_is_never_done_at_once(way: str) -> None:
    storage = MemoryStorage(size=64 * KIB)
    layer = await RawDriver.open(storage, {}, read_only=way == "read_only")
    node = Node([layer], writethrough=way == "writethrough", detect_zeroes="on" if way == "detect_zeroes" else "off")
    if way == "watched":
        node.watch(Watcher())
    assert not node.try_write(0, memoryview(b"data"))
    assert await storage.read(0, 64 * KIB) == bytes(64 * KIB)
