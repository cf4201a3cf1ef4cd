"""kill -9 under load, a few times (NBDSERVE_KILLS), and with a job at work (NBDSERVE_JOB_KILLS)."""

from __future__ import annotations

import os
from pathlib import Path

from tests.crash import kill_jobs
from tests.crash.kill import GEOMETRIES, run
from tests.support.images import needs_qemu

KILLS = int(os.environ.get("NBDSERVE_KILLS", "8"))


@needs_qemu
def test_every_promise_survives_kill_9(tmp_path: Path) -> None:
    result = run(KILLS, int(os.environ.get("NBDSERVE_SEED", "1")), GEOMETRIES, tmp_path)
    assert result.loops == KILLS
    assert result.operations > KILLS


@needs_qemu
def test_a_job_under_way_breaks_no_promise(tmp_path: Path) -> None:
    loops = int(os.environ.get("NBDSERVE_JOB_KILLS", "2"))
    kinds = kill_jobs.KINDS if loops > 2 else ("active commit", "stream to base")
    result = kill_jobs.run(loops, int(os.environ.get("NBDSERVE_SEED", "1")), kinds, tmp_path)
    assert result.loops == loops
    assert result.operations > loops
