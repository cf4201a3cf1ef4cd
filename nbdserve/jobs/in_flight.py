"""The pieces of a job's work that are under way at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class InFlight:
    """At most ``limit`` tasks. The first error of one is raised by what is called next, and nothing is begun then."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    def check(self) -> None:
        """Raise what has gone wrong."""
        if self._failure is not None:
            raise self._failure

    async def room(self) -> None:
        """Wait until another task may begin."""
        while len(self._running) >= self._limit:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        self.check()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Start ``work``; there is ``room``."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        self._failure = self._failure or error

    async def drain(self) -> None:
        """Wait until all have ended."""
        while self._running:
            await asyncio.wait(self._running)
        self.check()

    async def cancel(self) -> None:
        """Cancel all, and wait until they have ended."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
