"""Runs over many slices: batches, holes in the L1 table, and slices that are only in memory."""

from __future__ import annotations

import pytest

from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.two_level import runs
from tests.formats.two_level.disks import LARGE, Shape


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("batch", [1, 1 << 12, runs.BATCH_BYTES])
async def test_batches_join(shape: Shape, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "BATCH_BYTES", batch)
    storage = await shape.made()
    node = await shape.opened(storage)
    cluster = node.top.cluster_size
    places = sorted({0, shape.size // 3 // cluster * cluster, shape.size // 2 // cluster * cluster, shape.size - 512})
    for place in places[:2]:
        await node.write(place, b"d" * 100)
    await node.flush()
    for place in places[2:]:
        await node.write(place, b"m" * 100)  # in memory only
    data = []
    position = 0
    async for piece in node.top.iter_runs(0, shape.size):
        assert int(piece.start[0]) == position
        position = int(piece.start[-1] + piece.length[-1])
        data += [int(at) for at, kind in zip(piece.start, piece.kind, strict=True) if kind == DATA]
        assert set(piece.kind.tolist()) <= {DATA, UNALLOCATED}
    assert position == shape.size
    assert data == [place // cluster * cluster for place in places]
