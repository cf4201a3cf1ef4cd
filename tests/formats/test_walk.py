from __future__ import annotations

import pytest

from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.formats.walk import loaded_runs
from tests.block.layers import Scripted


@pytest.mark.parametrize(("start", "end", "loads"), [(0, 20, [0, 8, 16]), (5, 18, [5, 8, 16]), (6, 6, [])])
async def test_all_runs_and_each_table_once(start: int, end: int, loads: list[int]) -> None:
    layer = Scripted("DZ.DD", "a", loaded=False)
    position, kinds = start, []
    async for offset, (kind, length, _) in loaded_runs(layer, start, end):
        assert offset == position
        position += length
        kinds.append(kind)
    assert position == end
    assert kinds == [
        (DATA, ZERO, UNALLOCATED, DATA, DATA)[at // 4] for at in sorted({start, *range(0, 20, 4)}) if start <= at < end
    ]
    assert layer.loads == loads
