"""Jobs that end together: the results of all count, or of none."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdserve.jobs.job import Job


class Transaction:
    """A group of jobs; one in no group has one of its own."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.committing = False
        """All have prepared, and nothing is taken back any more."""
        self._aborting = False
        self._finalizing = False
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, job: Job) -> None:
        """``job`` belongs to the group. Before any of them is started."""
        self.jobs.append(job)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Go on with ``work`` in the background."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def proceed(self) -> None:
        """A job has done its work. If it is the last one, go on to the end, or wait for somebody to ``finalize``."""
        if self._aborting or not all(job.ended for job in self.jobs):
            return
        for job in self.jobs:
            job.become_pending()
        if all(job.auto_finalize for job in self.jobs):
            await self.finalize()

    async def finalize(self) -> None:
        """Prepare all jobs, and commit them, or abort all if one of them cannot."""
        if self._finalizing or self._aborting:
            return
        self._finalizing = True
        for job in self.jobs:
            await job.attempt_prepare()
            failed = next((other for other in self.jobs if other.failed), None)
            if failed is not None:
                await self._abort(failed)
                return
        self.committing = True
        await self._conclude()

    async def abort(self, failed: Job) -> None:
        """``failed`` has: the others are cancelled, and then all of them are taken back."""
        if not (self._aborting or self._finalizing):  # ``finalize`` looks for itself
            await self._abort(failed)

    async def _abort(self, failed: Job) -> None:
        self._aborting = True
        failed.become_aborting()
        for job in self.jobs:
            if job is not failed:
                job.stop()
        for job in self.jobs:
            await job.wait_ended()
        await self._conclude()

    async def _conclude(self) -> None:
        for job in self.jobs:
            await job.conclude()
