"""Remembered clusters: what is remembered is right, and forgotten when the mapping changes."""

from __future__ import annotations

import random

import pytest

from nbdserve.block import places
from nbdserve.block.forms import READ_DATA, READ_ZERO
from nbdserve.block.node import Node
from nbdserve.block.places import Places
from nbdserve.block.writer import WRITE_DONE
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB
from tests.block.layers import overlay

CLUSTER = 65536


async def _filled(clusters: int) -> Node:
    node = await overlay(None, clusters * CLUSTER, cluster_size=CLUSTER, unmap=True)
    for number in range(clusters):
        await node.write(number * CLUSTER, bytes([number + 1]) * CLUSTER)
    return node


def _read(node: Node, offset: int, length: int = 512) -> tuple[int, bytes]:
    buffer = bytearray(length)
    return node.try_read_into(offset, memoryview(buffer)), bytes(buffer)


def _write(node: Node, offset: int, data: bytes) -> bool:
    """Whether it was done in a remembered or looked-up place."""
    assert node.submit_write(offset, memoryview(data), lambda error: None) == WRITE_DONE
    return offset // CLUSTER in node.places.writable


async def test_a_read_is_remembered_for_its_whole_cluster() -> None:
    node = await _filled(3)
    assert _read(node, CLUSTER + 512) == (READ_DATA, b"\2" * 512)
    assert list(node.places.readable) == [1]
    node.top.lookup = None  # type: ignore[assignment,method-assign]  # nobody asks it again
    assert _read(node, 2 * CLUSTER - 512) == (READ_DATA, b"\2" * 512)


async def test_a_range_of_two_clusters_is_looked_up() -> None:
    node = await _filled(3)
    _read(node, 0)
    _read(node, CLUSTER)
    outcome, content = _read(node, CLUSTER - 256)
    assert outcome != READ_DATA or content == b"\1" * 256 + b"\2" * 256


async def test_an_overwrite_is_remembered() -> None:
    node = await _filled(2)
    assert _write(node, CLUSTER, b"x" * 512)
    assert list(node.places.writable) == [1]
    assert _write(node, 2 * CLUSTER - 1, b"y")
    assert await node.read(CLUSTER, CLUSTER) == b"x" * 512 + b"\2" * (CLUSTER - 513) + b"y"


@pytest.mark.parametrize("unmap", [True, False])
async def test_zeroing_and_discarding_forget(unmap: bool) -> None:
    node = await _filled(4)
    for number in range(4):
        _read(node, number * CLUSTER)
        assert _write(node, number * CLUSTER, b"x")
    await node.zero(CLUSTER, CLUSTER, unmap=unmap)
    await node.discard(2 * CLUSTER, CLUSTER)
    assert _read(node, CLUSTER)[0] == _read(node, 2 * CLUSTER)[0] == READ_ZERO
    assert sorted(node.places.readable) == sorted(node.places.writable) == [0, 3]
    for number in (1, 2):
        assert not _write(node, number * CLUSTER, b"y")
        assert await node.read(number * CLUSTER, CLUSTER) == b"y" + bytes(CLUSTER - 1)


async def test_copy_on_write_moves_a_remembered_cluster() -> None:
    base = MemoryStorage(b"b" * 4 * CLUSTER)
    node = await overlay(base, base.size, cluster_size=CLUSTER)
    assert _read(node, CLUSTER) == (READ_DATA, b"b" * 512)
    await node.write(CLUSTER, b"top")
    assert _read(node, CLUSTER, 4) == (READ_DATA, b"topb")
    assert _write(node, CLUSTER, b"TOP")
    assert await base.read(CLUSTER, 3) == b"bbb"


async def test_the_last_cluster_ends_with_the_disk() -> None:
    node = await overlay(None, CLUSTER + 512, cluster_size=CLUSTER)
    await node.write(CLUSTER, b"e" * 512)
    assert _read(node, CLUSTER) == (READ_DATA, b"e" * 512)
    assert 1 in node.places.readable


async def test_no_more_than_the_bound_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_MOST", 3)
    node = await _filled(8)
    for number in range(8):
        _read(node, number * CLUSTER)
        _write(node, number * CLUSTER, b"x")
        assert len(node.places.readable) <= 3
        assert len(node.places.writable) <= 3


@pytest.mark.parametrize("length", [1, CLUSTER, 3 * CLUSTER, 1 << 40])
async def test_forget_takes_every_cluster_it_touches(length: int) -> None:
    node = await _filled(6)
    known = node.places
    for number in range(6):
        _read(node, number * CLUSTER)
    offset = random.Random(length).randrange(CLUSTER)
    known.forget(CLUSTER + offset, length)
    last = (CLUSTER + offset + length - 1) // CLUSTER
    assert sorted(known.readable) == [number for number in range(6) if not 1 <= number <= last]


async def test_small_clusters_are_not_remembered() -> None:
    assert not Places.worthwhile((await overlay(None, MIB, cluster_size=512)).layers)
    assert Places.worthwhile((await overlay(None, MIB, cluster_size=4096)).layers)
    storage = MemoryStorage(b"r" * 512)
    assert not Places.worthwhile([RawDriver(storage, 0, 512, read_only=False)])


async def test_clusters_that_are_no_power_of_two_are_not_remembered() -> None:
    driver = RawDriver(MemoryStorage(size=MIB), 0, MIB, read_only=False)
    driver.cluster_size = 63 * 512
    assert not Places.worthwhile([driver])
    driver.cluster_size = 64 * 512
    assert Places.worthwhile([driver])
