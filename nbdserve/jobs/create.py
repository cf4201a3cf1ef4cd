"""Making an image, or changing what was decided then, as a job."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar

from nbdserve.jobs.job import Job


class Create(Job):
    """Does ``make``. It stays known when it is over, until it is dismissed, as QEMU's."""

    type: ClassVar[str] = "create"

    def __init__(self, id: str, make: Callable[[], Awaitable[None]]) -> None:
        super().__init__(id, auto_dismiss=False)
        self._make = make
        self.total_progress = 1

    async def run(self) -> None:
        try:
            await self._make()
        finally:
            self.current_progress = 1


class Amend(Create):
    """The same for a change of an image there is."""

    type: ClassVar[str] = "amend"
