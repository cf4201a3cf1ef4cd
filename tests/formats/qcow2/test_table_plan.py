"""Places for new tables; ``test_rewrite.py`` and ``test_snapshot_changes.py`` have them written."""

from __future__ import annotations

import numpy as np
import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2.check_analysis import Analysis
from nbdserve.formats.qcow2.check_walk import read_metadata
from nbdserve.formats.qcow2.create import create_qcow2
from nbdserve.formats.qcow2.rewrite import read_state
from nbdserve.formats.qcow2.table_plan import MovedTables, State, TablePlan
from tests.support.recording import ByteStorage

NONE = MovedTables(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.int64))


async def _plan(storage: ByteStorage, counts: dict[int, int]) -> tuple[TablePlan, State]:
    state = await read_state(storage)
    analysis = Analysis(storage, await read_metadata(storage, state.header))
    final = np.zeros(analysis.total, np.int32)
    for cluster, count in counts.items():
        final[cluster] = count
    return TablePlan("a", state.header, state, analysis, final, final == 0), state


async def test_what_is_new_is_counted_and_what_is_old_is_not() -> None:
    storage = ByteStorage()
    await create_qcow2(storage, 1 << 20, {"cluster_size": "512"})
    used = len(storage.content) // 512
    plan, state = await _plan(storage, dict.fromkeys(range(used), 1))
    before = plan.final.copy()
    plan.place_tables(NONE, [])
    plan.place_refcounts(before)
    plan.check_counts()
    assert plan.final.min() == 0
    assert plan.final[state.header.refcount_table_offset // 512] == 0
    written = {offset // 512 for offset, _ in plan.pieces()}
    assert written.isdisjoint(range(used)), "nothing that is in use is overwritten"
    assert all(plan.final[cluster] == 1 for cluster in written)


async def test_a_count_beyond_the_width_is_refused() -> None:
    storage = ByteStorage()
    await create_qcow2(storage, 1 << 20, {"cluster_size": "512", "refcount_bits": "2"})
    plan, _ = await _plan(storage, {9: 4})
    with pytest.raises(ConfigError, match="refcount of 4, 2 bits count up to 3"):
        plan.check_counts()
