"""Jobs that do what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

from nbdserve.jobs.job import Job, JobEvent


class Scripted(Job):
    """Works until it is told to go on, and notes what is called."""

    type: ClassVar[str] = "backup"

    def __init__(self, id: str = "job", *, fails_in: Sequence[str] = (), **options: Any) -> None:
        super().__init__(id, **options)
        self.calls: list[str] = []
        self.go_on = asyncio.Event()
        self.fails_in = fails_in

    def _step(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails_in:
            raise OSError(5, f"{name} went wrong")

    async def run(self) -> None:
        while not self.go_on.is_set():
            await self.throttle(1)
            await asyncio.sleep(0)
        self._step("run")

    async def prepare(self) -> None:
        await asyncio.sleep(0)
        self._step("prepare")

    async def commit(self) -> None:
        self._step("commit")

    async def abort(self) -> None:
        self._step("abort")

    async def clean(self) -> None:
        self._step("clean")


class Mirror(Scripted):
    """Becomes ready, and ends when it is told to complete, or cancelled softly."""

    type: ClassVar[str] = "mirror"
    completes = True

    async def run(self) -> None:
        self.become_ready()
        while not (self.complete_requested or self.cancel_requested):
            await self.throttle(1)
            await asyncio.sleep(0)
        self._step("pivot" if self.complete_requested else "run")

    def on_cancel(self, force: bool) -> bool:
        return force or self.status not in ("ready", "standby")


class Told:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.events: list[JobEvent] = []

    def __call__(self, event: JobEvent) -> None:
        self.events.append(event)

    def words(self, job: Job | None = None) -> list[str]:
        """What was told, in words: states, and kinds of the other events in capitals."""
        return [
            str(event.status) if event.kind == "status-change" else str(event.kind).upper()
            for event in self.events
            if job in (None, event.job)
        ]


async def settle(turns: int = 20) -> None:
    """Let everything that can go on do so."""
    for _ in range(turns):
        await asyncio.sleep(0)
