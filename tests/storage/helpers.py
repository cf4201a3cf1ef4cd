"""What several tests of files need."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


def refuse(number: int, counter: list[int]) -> Callable[..., int]:
    def call(*_: object) -> int:
        counter.append(1)
        raise OSError(number, os.strerror(number))

    return call


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)
