"""kill -9 under load, a few times (NBDSERVE_KILLS)."""

from __future__ import annotations

import os
from pathlib import Path

from tests.crash.kill import GEOMETRIES, run
from tests.support.images import needs_qemu

KILLS = int(os.environ.get("NBDSERVE_KILLS", "8"))


@needs_qemu
def test_every_promise_survives_kill_9(tmp_path: Path) -> None:
    result = run(KILLS, int(os.environ.get("NBDSERVE_SEED", "1")), GEOMETRIES, tmp_path)
    assert result.loops == KILLS
    assert result.operations > KILLS
