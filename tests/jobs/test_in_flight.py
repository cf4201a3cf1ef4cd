"""Pieces of work under way at a time."""

from __future__ import annotations

import asyncio

import pytest

from nbdserve.jobs.in_flight import InFlight
from tests.jobs.examples import settle


async def test_no_more_than_so_many() -> None:
    work, gate, begun = InFlight(2), asyncio.Event(), []

    async def piece(number: int) -> None:
        begun.append(number)
        await gate.wait()

    async def all_of_them() -> None:
        for number in range(5):
            await work.room()
            work.begin(piece(number))
        await work.drain()

    task = asyncio.create_task(all_of_them())
    await settle()
    assert begun == [0, 1]
    gate.set()
    await task
    assert begun == [0, 1, 2, 3, 4]


async def test_the_first_error_ends_the_work() -> None:
    work, ended = InFlight(2), []

    async def fail(number: int) -> None:
        raise OSError(number, "broken")

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    work.begin(wait())
    work.begin(fail(1))
    with pytest.raises(OSError, match="broken"):
        await work.room()
    with pytest.raises(OSError, match="broken"):
        work.check()
    assert not ended
    await work.cancel()
    assert ended == ["cancelled"]
    with pytest.raises(OSError, match="broken"):
        await work.drain()
