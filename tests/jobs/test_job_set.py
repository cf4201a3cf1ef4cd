from __future__ import annotations

import asyncio

import pytest

from nbdserve.errors import JobError
from nbdserve.jobs.job_set import JobSet
from nbdserve.jobs.status import JobStatus
from tests.jobs.examples import Scripted, Told, settle


async def test_a_job_is_found_until_it_is_dismissed() -> None:
    jobs = JobSet()
    job = Scripted("one", auto_dismiss=False)
    jobs.add(job)
    assert (jobs.get("one"), list(jobs), len(jobs)) == (job, [job], 1)
    job.go_on.set()
    job.start()
    await job.wait()
    assert jobs.get("one").status is JobStatus.CONCLUDED
    job.dismiss()
    with pytest.raises(JobError, match="Job not found"):
        jobs.get("one")


async def test_ids() -> None:
    jobs = JobSet()
    for good in ("a", "qmpbackup.disk1.disk1.qcow2", "A-b_c.9"):
        jobs.add(Scripted(good))
    for bad in ("", "1a", "a b", "-a", "a/b", "a\n"):
        with pytest.raises(JobError) as raised:
            jobs.add(Scripted(bad))
        assert str(raised.value) == f"Invalid job ID '{bad}'"
    with pytest.raises(JobError, match="Job ID 'a' already in use"):
        jobs.add(Scripted("a"))


async def test_every_listener_is_told_until_it_leaves() -> None:
    jobs = JobSet()
    first, second = Told(), Told()
    jobs.listen(first)
    jobs.listen(second)
    job = Scripted("one")
    jobs.add(job)
    job.start()
    await settle()
    jobs.unlisten(second)
    job.go_on.set()
    await job.wait()
    assert first.words() == ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"]
    assert second.words() == ["created", "running"]


async def test_jobs_go_on_when_nobody_listens() -> None:
    jobs = JobSet()
    told = Told()
    jobs.listen(told)
    job = Scripted("one", auto_dismiss=False)
    jobs.add(job)
    jobs.unlisten(told)
    job.start()
    job.go_on.set()
    await job.wait()
    assert jobs.get("one").error is None


async def test_closing_cancels_what_is_there() -> None:
    jobs = JobSet()
    made = {name: Scripted(name, auto_finalize=False, auto_dismiss=False) for name in ("new", "run", "pend", "done")}
    for job in made.values():
        jobs.add(job)
    for name in ("run", "pend", "done"):
        made[name].start()
    made["pend"].go_on.set()
    made["done"].go_on.set()
    await settle()
    made["done"].finalize()
    await made["done"].wait()
    await asyncio.wait_for(jobs.close(), 60)
    assert made["done"].calls == ["run", "prepare", "commit", "clean"]
    assert made["run"].calls == ["abort", "clean"]
    assert made["pend"].calls == ["run", "abort", "clean"]
    assert all(job.status in (JobStatus.CONCLUDED, JobStatus.NULL) for job in made.values())
    with pytest.raises(JobError, match="The server ends"):
        jobs.add(Scripted("late"))
    assert "late" not in [job.id for job in jobs]
