"""The map of a chain in columns, against the byte-by-byte model."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.mapping import ChainMap, file_map, map_chain, split_by_holes
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, RunArray
from nbdserve.storage.memory import PAGE_SIZE, MemoryStorage
from tests.block.layers import CLUSTER, Scripted, rows
from tests.block.test_chain import chains

_KINDS = {"D": DATA, "Z": ZERO, ".": UNALLOCATED, "C": COMPRESSED}


def decides(layers: list[Scripted], offset: int) -> tuple[int, int]:
    """``(depth, kind)`` of a guest byte."""
    depth = 0
    for depth, layer in enumerate(layers):
        if offset >= layer.size:
            return depth - 1, UNALLOCATED
        kind = _KINDS[layer.clusters[offset // CLUSTER]]
        if kind != UNALLOCATED:
            return depth, kind
    return depth, UNALLOCATED


@given(chains, st.data())
async def test_the_map_tells_of_every_byte_which_layer_decides(layers: list[Scripted], data: st.DataObject) -> None:
    size = layers[0].size
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    position = start
    async for part in map_chain(layers, start, end):
        assert len(part) > 0
        for at, length, depth, kind, host_offset in rows(part):
            assert at == position
            assert length > 0
            for offset in range(at, at + length):
                assert (depth, kind) == decides(layers, offset), offset
            if kind == DATA:
                assert host_offset == at, "these layers are mapped one to one"
            elif kind == COMPRESSED:
                assert host_offset == at - at % CLUSTER
            else:
                assert host_offset == -1
            position += length
    assert position == end


async def test_neighbours_of_one_layer_are_merged() -> None:
    layers = [Scripted("..DD..", "a"), Scripted("DDDDD.", "b")]
    for layer in layers:
        layer.batch = 10
    found = [row async for part in map_chain(layers, 0, 24) for row in rows(part)]
    assert found == [
        (0, 8, 1, DATA, 0),
        (8, 8, 0, DATA, 8),
        (16, 4, 1, DATA, 16),
        (20, 4, 1, UNALLOCATED, -1),
    ]


def test_a_cut_moves_the_host_offset_along_but_not_that_of_a_compressed_cluster() -> None:
    runs = RunArray(
        np.array([0, 10], np.int64),
        np.array([10, 10], np.int64),
        np.array([DATA, COMPRESSED], np.uint8),
        np.array([100, 500], np.int64),
    )
    assert rows(ChainMap.of_layer(runs, 2).cut(4, 15)) == [(4, 6, 2, DATA, 104), (10, 5, 2, COMPRESSED, 500)]
    assert rows(ChainMap.of_layer(runs, 0).cut(12, 13)) == [(12, 1, 0, COMPRESSED, 500)]


def test_apart_in_the_host_means_apart_in_the_map() -> None:
    runs = RunArray(
        np.array([0, 4, 8], np.int64),
        np.array([4, 4, 4], np.int64),
        np.array([DATA, DATA, DATA], np.uint8),
        np.array([100, 104, 300], np.int64),
    )
    assert rows(ChainMap.of_layer(runs, 0).coalesced()) == [(0, 8, 0, DATA, 100), (8, 4, 0, DATA, 300)]


async def test_the_map_of_a_file_alternates_and_ends_in_a_hole() -> None:
    storage = MemoryStorage(size=3 * PAGE_SIZE)
    await storage.write(PAGE_SIZE, b"x")
    runs = await file_map(storage)
    assert list(zip(runs.start.tolist(), runs.kind.tolist(), runs.host_offset.tolist(), strict=True)) == [
        (0, ZERO, -1),
        (PAGE_SIZE, DATA, PAGE_SIZE),
        (2 * PAGE_SIZE, ZERO, -1),
    ]
    assert runs.start[-1] + runs.length[-1] == 1 << 62
    empty = await file_map(MemoryStorage())
    assert (empty.start.tolist(), empty.kind.tolist()) == ([0], [ZERO])


def test_data_is_split_where_its_file_has_holes() -> None:
    part = ChainMap.of_layer(
        RunArray(
            np.array([0, 10, 20], np.int64),
            np.array([10, 10, 5], np.int64),
            np.array([DATA, ZERO, DATA], np.uint8),
            np.array([100, -1, 40], np.int64),
        ),
        0,
    )
    holes = RunArray(
        np.array([0, 50, 104, 107], np.int64),
        np.array([50, 54, 3, 1000], np.int64),
        np.array([DATA, ZERO, DATA, ZERO], np.uint8),
        np.array([0, -1, 104, -1], np.int64),
    )
    split, is_hole = split_by_holes(part, 0, holes)
    assert [(start, length, host_offset) for start, length, _, _, host_offset in rows(split)] == [
        (0, 4, 100),
        (4, 3, 104),
        (7, 3, 107),
        (10, 10, -1),
        (20, 5, 40),
    ]
    assert is_hole.tolist() == [True, False, True, False, False]
    other, none = split_by_holes(part, 1, holes)
    assert rows(other) == rows(part)
    assert not none.any()
