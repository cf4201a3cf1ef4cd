"""``-p`` as qemu-img prints it."""

from __future__ import annotations

import asyncio
import sys
from typing import Final

from nbdserve.jobs.job import Job

_REDRAW_SECONDS: Final = 0.1


async def run_shown(job: Job, *, progress: bool) -> None:
    """Run ``job`` to its end; with ``progress`` the percentage done is printed over itself. Raises the job's error."""
    if not progress:
        await job.result()
        return
    running = asyncio.ensure_future(job.result())
    _print(0.0)
    try:
        while not running.done():
            await asyncio.wait([running], timeout=_REDRAW_SECONDS)
            _print(100 * job.current_progress / job.total_progress if job.total_progress else 0.0)
        await running
        _print(100.0)
    except asyncio.CancelledError:
        running.cancel()
        await asyncio.wait([running])
        raise
    finally:
        print(flush=True)


def _print(percent: float) -> None:
    sys.stdout.write(f"    ({percent:.2f}/100%)\r")
    sys.stdout.flush()
