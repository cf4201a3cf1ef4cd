"""kill -9 under load, a few times (NBDSERVE_KILLS), and with a job at work (NBDSERVE_JOB_KILLS)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

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
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_a_server_in_the_middle_of_a_job(tmp_path: Path, number: signal.Signals) -> None:
    loops = int(os.environ.get("NBDSERVE_JOB_KILLS", "1"))
    kinds = kill_jobs.KINDS if loops > 1 else ("active commit",)
    result = kill_jobs.run(loops, int(os.environ.get("NBDSERVE_SEED", "1")), kinds, tmp_path, number=number)
    assert result.loops == loops
    assert result.operations > loops
