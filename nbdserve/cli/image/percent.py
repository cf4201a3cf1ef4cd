"""``-p`` as qemu-img prints it."""

from __future__ import annotations

import sys

from nbdserve.cli.image.progress import watched
from nbdserve.jobs.job import Job


async def run_shown(job: Job, *, progress: bool) -> None:
    """Run ``job`` to its end; with ``progress`` the percentage done is printed over itself. Raises the job's error."""
    if not progress:
        await job.result()
        return
    _print(0.0)
    try:
        await watched(
            job, lambda: _print(100 * job.current_progress / job.total_progress if job.total_progress else 0.0)
        )
        _print(100.0)
    finally:
        print(flush=True)


def _print(percent: float) -> None:
    sys.stdout.write(f"    ({percent:.2f}/100%)\r")
    sys.stdout.flush()
