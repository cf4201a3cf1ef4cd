"""How far a job is, for people."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Final

from nbdserve.jobs.job import Job

_REDRAW_SECONDS: Final = 0.1


async def run_job(job: Job, what: str, *, progress: bool) -> None:
    """Run ``job`` to its end, with a bar on standard error if ``progress``. Raises the job's error."""
    if not progress:
        await job.result()
        return
    # Imported for those who want to see it: 60 ms.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), auto_refresh=False) as bar:
        shown = bar.add_task(what, total=job.total_progress)

        def show() -> None:
            bar.update(shown, completed=job.current_progress, total=job.total_progress)
            bar.refresh()

        await watched(job, show)


async def watched(job: Job, show: Callable[[], None]) -> None:
    """Run ``job`` to its end, and call ``show`` from time to time and at the end. Raises the job's error."""
    running = asyncio.ensure_future(job.result())
    try:
        while not running.done():
            await asyncio.wait([running], timeout=_REDRAW_SECONDS)
            show()
    except asyncio.CancelledError:
        running.cancel()
        await asyncio.wait([running])
        raise
    await running
