"""Runs in columns: merging must neither lose bytes nor join what is apart in the host."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, RunArray

_Unit = tuple[int, int]


def _array(runs: list[tuple[int, int, int]]) -> RunArray:
    """From ``(length, kind, host_offset)``."""
    lengths = np.array([length for length, _, _ in runs], np.int64)
    return RunArray(
        np.cumsum(lengths) - lengths,
        lengths,
        np.array([kind for _, kind, _ in runs], np.uint8),
        np.array([host_offset for _, _, host_offset in runs], np.int64),
    )


def _rows(runs: RunArray) -> list[tuple[int, int, int, int]]:
    columns = (runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), runs.host_offset.tolist())
    return list(zip(*columns, strict=True))


def _units(runs: RunArray) -> list[_Unit]:
    """Kind and host offset of every byte."""
    units = []
    for _, length, kind, host_offset in _rows(runs):
        for inside in range(length):
            units.append((kind, host_offset + inside if host_offset >= 0 and kind != COMPRESSED else host_offset))
    return units


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from((DATA, ZERO, UNALLOCATED, COMPRESSED)), st.integers(-1, 12)),
        min_size=1,
        max_size=12,
    )
)
def test_merging_changes_no_byte_and_leaves_nothing_to_merge(runs: list[tuple[int, int, int]]) -> None:
    before = _array(runs)
    after = before.coalesced()
    assert _units(after) == _units(before)
    rows = _rows(after)
    for (start, length, kind, host_offset), (next_start, _, next_kind, next_host_offset) in pairwise(rows):
        assert next_start == start + length
        joined = next_host_offset == host_offset + length if host_offset >= 0 else next_host_offset < 0
        assert kind == COMPRESSED or kind != next_kind or not joined


def test_compressed_clusters_stay_apart() -> None:
    assert len(_array([(4, COMPRESSED, 0), (4, COMPRESSED, 4)]).coalesced()) == 2


def test_a_single_run_and_none() -> None:
    assert _rows(RunArray.of(8, 4, DATA, 100)) == [(8, 4, DATA, 100)]
    assert _rows(RunArray.of(8, 4, ZERO)) == [(8, 4, ZERO, -1)]
    assert len(RunArray.empty()) == len(RunArray.empty().coalesced()) == 0
