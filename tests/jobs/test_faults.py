"""One system call of a job's files fails (NBDSERVE_FAULTS=all: each of them in turn)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.jobs.faults import OPERATIONS, run_with_fault

ALL = os.environ.get("NBDSERVE_FAULTS") == "all"


@pytest.mark.parametrize("name", OPERATIONS)
async def test_nobody_is_worse_off_for_a_fault(tmp_path: Path, name: str) -> None:
    for number in (errno.EIO, errno.ENOSPC):
        at = failures = 0
        while True:
            folder = tmp_path / f"{number} {at}"
            folder.mkdir()
            outcome = await run_with_fault(folder, name, at, number, qemu=at % 7 == 0)
            failures += outcome.failed
            if not outcome.fired or (number == errno.ENOSPC and not ALL):
                break
            at += 1 if ALL else 2 * at + 5
        assert failures > 0
        assert not (outcome.failed and number == errno.EIO), "without a fault"
