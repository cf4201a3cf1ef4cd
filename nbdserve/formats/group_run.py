"""Work that serves all who wait for it at once: a commit for many flushes, one barrier for many blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

FollowUp: TypeAlias = Callable[[], Awaitable[None]]
"""What comes after a run, and nobody waits for. It does not raise."""


class GroupRun:
    """One run of ``work`` at a time. Who comes while one is under way waits for the next, for it may not be covered.

    A run is not cut short when somebody who waits for it is cancelled.
    """

    def __init__(self, work: Callable[[], Awaitable[FollowUp | None]]) -> None:
        self._work = work
        self._waiting: asyncio.Future[None] | None = None
        self._runner: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Wait for a run that begins after this call; what it raises is raised."""
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_future()
        waiting = self._waiting
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run())
        await asyncio.shield(waiting)

    async def idle(self) -> None:
        """Wait until no run is under way, nor what follows it."""
        if self._runner is not None:
            await asyncio.shield(self._runner)

    async def _run(self) -> None:
        while self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            try:
                follow_up = await self._work()
            except Exception as error:
                waiting.set_exception(error)
                waiting.exception()  # nobody may be waiting any more
                continue
            waiting.set_result(None)
            if follow_up is not None:
                await follow_up()
