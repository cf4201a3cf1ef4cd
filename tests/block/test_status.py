"""Block status: exact, inside the request, never falsely zero, and cut at one end for all contexts."""

from __future__ import annotations

import errno
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.node import Node
from nbdserve.block.status import HOLE, READS_ZERO, Projection, allocation_flags, block_status, depth_values
from nbdserve.errors import RequestError
from nbdserve.extents import RunStream
from nbdserve.storage.memory import PAGE_SIZE, MemoryStorage
from nbdserve.units import GIB, KIB, TIB
from tests.block.layers import Scripted, guest, overlay, raw_node
from tests.block.test_chain import chains
from tests.block.test_mapping import decides

BOTH: list[Projection] = [allocation_flags, depth_values]
ZEROES = HOLE | READS_ZERO


@given(chains, st.integers(1, 5), st.data())
async def test_every_extent_is_true_of_every_byte(layers: list[Scripted], limit: int, data: st.DataObject) -> None:
    node, content = Node(layers), guest(layers)
    start = data.draw(st.integers(0, node.size - 1))
    length = data.draw(st.integers(1, node.size - start))
    lists = await block_status(node, start, length, BOTH, limit)
    totals = {sum(size for size, _ in extents) for extents in lists}
    assert len(totals) == 1, "all contexts end at one place"
    assert 0 < totals.pop() <= length
    for extents in lists:
        assert 1 <= len(extents) <= limit
        assert all(size > 0 for size, _ in extents)
        assert all(first[1] != second[1] for first, second in pairwise(extents)), "merged"
    for flags, depth, extents in ((True, False, lists[0]), (False, True, lists[1])):
        position = start
        for size, status in extents:
            for offset in range(position, position + size):
                layer, kind = decides(layers, offset)
                if flags:
                    assert status == (ZEROES if kind in (1, 2) else 0)
                    assert not status & READS_ZERO or content[offset] == 0
                if depth:
                    assert status == (0 if kind == 2 else layer + 1)
            position += size


async def test_the_status_of_an_overlay_tells_its_layers_apart() -> None:
    base = MemoryStorage(size=256 * KIB, path="base.raw")
    await base.write(64 * KIB, b"b" * 64 * KIB)
    node = await overlay(base, 320 * KIB, cluster_size=64 * KIB)
    await node.write(128 * KIB, b"t")
    flags, depth = await block_status(node, 0, node.size, BOTH, 100)
    assert flags == [(64 * KIB, ZEROES), (128 * KIB, 0), (128 * KIB, ZEROES)]
    assert depth == [(128 * KIB, 2), (64 * KIB, 1), (64 * KIB, 2), (64 * KIB, 0)]


async def test_the_list_that_is_full_first_cuts_them_all() -> None:
    layers = [Scripted("D.D.D.", "a"), Scripted("DDDDDD", "b")]
    flags, depth = await block_status(Node(layers), 0, 24, BOTH, 2)
    assert depth == [(4, 1), (4, 2)]
    assert flags == [(8, 0)]


async def test_a_sparse_disk_of_ten_terabytes_is_one_extent() -> None:
    node = await raw_node(MemoryStorage(size=10 * TIB))
    assert await block_status(node, 0, 10 * TIB, [allocation_flags], 10) == [[(10 * TIB, ZEROES)]]


async def test_data_beyond_four_gigabytes_is_found_where_it_is() -> None:
    storage = MemoryStorage(size=10 * TIB)
    await storage.write(5 * GIB, b"x")
    node = await raw_node(storage)
    assert await block_status(node, 0, 10 * TIB, [allocation_flags], 10) == [
        [(5 * GIB, ZEROES), (PAGE_SIZE, 0), (10 * TIB - 5 * GIB - PAGE_SIZE, ZEROES)]
    ]


async def test_a_corrupt_mapping_fails_the_request() -> None:
    class Corrupt(Scripted):
        async def iter_runs(self, start: int, end: int) -> RunStream:
            raise RequestError(errno.EIO, "invalid L2 entry")
            yield

    with pytest.raises(RequestError, match="invalid L2 entry"):
        await block_status(Node([Corrupt("D", "a")]), 0, 4, BOTH, 10)
