from __future__ import annotations

import asyncio

import pytest

from nbdserve.jobs.status import JobStatus
from nbdserve.jobs.transaction import Transaction
from tests.jobs.examples import Scripted, Told, settle


def group(*fails_in: str, **options: bool) -> tuple[list[Scripted], Told]:
    """Jobs of one transaction, announced; for each the step that fails, or nothing."""
    transaction, told = Transaction(), Told()
    jobs = [
        Scripted(f"job{number}", fails_in=[step] if step else [], transaction=transaction, **options)
        for number, step in enumerate(fails_in)
    ]
    for job in jobs:
        job.announce(told)
    return jobs, told


async def test_nobody_commits_before_all_are_done() -> None:
    (first, second), _ = group("", "")
    first.start()
    second.start()
    first.go_on.set()
    await settle()
    assert (first.status, second.status) == (JobStatus.WAITING, JobStatus.RUNNING)
    second.go_on.set()
    await asyncio.gather(first.wait(), second.wait())
    assert first.calls == second.calls == ["run", "prepare", "commit", "clean"]


async def test_all_prepare_before_one_commits() -> None:
    jobs, told = group("", "", "")
    for job in jobs:
        job.go_on.set()
        job.start()
    await asyncio.gather(*(job.wait() for job in jobs))
    pending = [number for number, word in enumerate(told.words()) if word == "pending"]
    concluded = [number for number, word in enumerate(told.words()) if word == "concluded"]
    assert max(pending) < min(concluded)


@pytest.mark.parametrize("step", ["run", "prepare"])
async def test_one_failure_takes_all_back(step: str) -> None:
    jobs, told = group("", step, "")
    for job in jobs:
        job.start()
    jobs[0].go_on.set()
    await settle()
    for job in jobs[1:]:
        job.go_on.set()
    await asyncio.gather(*(job.wait() for job in jobs))
    for job in jobs:
        assert job.calls[-2:] == ["abort", "clean"]
        assert "commit" not in job.calls
    assert told.words(jobs[1])[-3:] == ["COMPLETED", "concluded", "null"]
    assert told.words(jobs[0])[-3] == "CANCELLED" or step == "prepare"


async def test_a_failure_stops_those_at_work() -> None:
    (failing, working), told = group("run", "")
    failing.start()
    working.start()
    failing.go_on.set()
    await asyncio.wait_for(working.wait(), 60)
    assert working.calls == ["abort", "clean"]
    assert "CANCELLED" in told.words(working)


async def test_a_job_that_was_never_started_goes_with_the_others() -> None:
    (failing, created), told = group("run", "")
    failing.start()
    failing.go_on.set()
    await asyncio.wait_for(created.wait(), 60)
    assert told.words(created) == ["created", "aborting", "CANCELLED", "concluded", "null"]


async def test_cancelling_one_cancels_all() -> None:
    (first, second), _ = group("", "")
    first.start()
    second.start()
    first.go_on.set()
    await settle()
    first.cancel()
    await asyncio.gather(first.wait(), second.wait())
    assert first.calls == ["run", "abort", "clean"]
    assert second.calls == ["abort", "clean"]


async def test_finalizing_one_finalizes_all() -> None:
    (first, second), told = group("", "", auto_finalize=False)
    for job in (first, second):
        job.start()
        job.go_on.set()
    await settle()
    assert told.words().count("PENDING") == 2
    second.finalize()
    await asyncio.gather(first.wait(), second.wait())
    assert first.calls == second.calls == ["run", "prepare", "commit", "clean"]


async def test_finalizing_twice_commits_once() -> None:
    (first, second), _ = group("", "", auto_finalize=False)
    for job in (first, second):
        job.start()
        job.go_on.set()
    await settle()
    first.finalize()
    second.finalize()
    await asyncio.gather(first.wait(), second.wait())
    assert first.calls == ["run", "prepare", "commit", "clean"]
