"""One run for all who wait, whoever of them is cancelled."""

from __future__ import annotations

import asyncio

import pytest

from nbdserve.formats.group_run import FollowUp, GroupRun


class Work:
    """Runs wait until ``go_on`` is set; ``error`` is raised then."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self.error: OSError | None = None

    async def __call__(self) -> FollowUp:
        self.log.append("run")
        self.begun.set()
        await self.go_on.wait()
        if self.error is not None:
            raise self.error

        async def follow_up() -> None:
            await asyncio.sleep(0)
            self.log.append("follow up")

        return follow_up


async def test_who_comes_meanwhile_shares_the_next_run() -> None:
    work = Work()
    runs = GroupRun(work)
    await runs.idle()
    first = asyncio.create_task(runs.join())
    await work.begun.wait()
    others = [asyncio.create_task(runs.join()) for _ in range(5)]
    await asyncio.sleep(0)
    work.go_on.set()
    await asyncio.gather(first, *others)
    await runs.idle()
    assert work.log == ["run", "follow up"] * 2


async def test_an_error_is_that_of_all_who_wait_and_of_nobody_else() -> None:
    work = Work()
    runs = GroupRun(work)
    work.error = OSError("of the run")
    work.go_on.set()
    for outcome in await asyncio.gather(runs.join(), runs.join(), return_exceptions=True):
        assert outcome is work.error
    work.error = None
    await runs.join()


@pytest.mark.parametrize("who", ["join", "idle"])
async def test_who_is_cancelled_stops_nobody_else(who: str) -> None:
    work = Work()
    runs = GroupRun(work)
    joined = asyncio.create_task(runs.join())
    await work.begun.wait()
    other = asyncio.create_task(getattr(runs, who)())
    await asyncio.sleep(0)
    other.cancel()
    with pytest.raises(asyncio.CancelledError):
        await other
    work.go_on.set()
    async with asyncio.timeout(60):
        await joined
        await runs.idle()
    assert work.log[:2] == ["run", "follow up"]
