"""The jobs there are, by id. They belong to the program, not to the client who started them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Final

from nbdserve.errors import JobError
from nbdserve.jobs.job import Job, JobEvent, Listener
from nbdserve.jobs.status import JobStatus

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
"""What QEMU takes for an id of the user's."""


class JobSet:
    """Jobs by id, in order of creation, and those who want to know what becomes of them."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._listeners: dict[Listener, None] = {}
        self._closed = False

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def __len__(self) -> int:
        return len(self._jobs)

    def check_id(self, job_id: str) -> None:
        """JobError when no new job may have this id: it is none, or it is taken; and after ``close``."""
        if self._closed:
            raise JobError("The server ends, and begins no job any more")
        if not _ID.fullmatch(job_id):
            raise JobError(f"Invalid job ID '{job_id}'")
        if job_id in self._jobs:
            raise JobError(f"Job ID '{job_id}' already in use")

    def add(self, job: Job) -> None:
        """``job`` is known from now on, until it is dismissed. JobError as ``check_id``."""
        self.check_id(job.id)
        self._jobs[job.id] = job
        job.announce(self._tell)

    def get(self, job_id: str) -> Job:
        """The job with this id. JobError."""
        job = self._jobs.get(job_id)
        if job is None:
            raise JobError("Job not found")
        return job

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` for every event of every job, until ``unlisten``. It does not raise."""
        self._listeners[listener] = None

    def unlisten(self, listener: Listener) -> None:
        """Undo ``listen``."""
        self._listeners.pop(listener, None)

    def _tell(self, event: JobEvent) -> None:
        if event.status is JobStatus.NULL:
            self._jobs.pop(event.job.id, None)
        for listener in list(self._listeners):
            listener(event)

    async def close(self) -> None:
        """Cancel what has not committed yet, and wait until every job is over and has cleaned up.

        No other job is added from here on: the disks are closed next.
        """
        self._closed = True
        jobs = [job for job in self if job.status is not JobStatus.CONCLUDED]
        for job in jobs:
            job.force_cancel()
        await asyncio.gather(*(job.wait() for job in jobs))
