from __future__ import annotations

import asyncio
import errno
import itertools

import pytest

from nbdserve.errors import JobError
from nbdserve.jobs.job import Job
from nbdserve.jobs.status import ACCEPTED_IN, JobStatus, JobVerb
from tests.jobs.examples import Mirror, Scripted, Told, settle


def announced(job: Job) -> Told:
    told = Told()
    job.announce(told)
    return told


async def in_state(status: JobStatus) -> Job:
    """A job that is in ``status``, by the way a user would bring it there."""
    if status in (JobStatus.READY, JobStatus.STANDBY):
        job: Scripted = Mirror()
    else:
        job = Scripted(auto_finalize=False, auto_dismiss=False)
    if status is JobStatus.UNDEFINED:
        return job
    announced(job)
    if status is JobStatus.CREATED:
        return job
    job.start()
    await settle()
    if status in (JobStatus.PAUSED, JobStatus.STANDBY):
        job.pause()
    elif status is JobStatus.WAITING:
        Scripted("other", transaction=job.transaction)
        job.go_on.set()
    elif status in (JobStatus.PENDING, JobStatus.CONCLUDED, JobStatus.NULL):
        job.go_on.set()
    elif status is JobStatus.ABORTING:
        held = Scripted("other", transaction=job.transaction)
        announced(held)
        held.start()
        held.run = asyncio.Event().wait  # type: ignore[assignment, method-assign]
        held._cancel = held.stop = lambda force=True: None  # type: ignore[method-assign]
        job.cancel()
    await settle()
    if status in (JobStatus.CONCLUDED, JobStatus.NULL):
        job.finalize()
        await settle()
    if status is JobStatus.NULL:
        job.dismiss()
    assert job.status == status
    return job


def use(job: Job, verb: JobVerb) -> None:
    if verb is JobVerb.SET_SPEED:
        job.set_speed(1000)
    else:
        getattr(job, verb)()


@pytest.mark.parametrize(("status", "verb"), list(itertools.product(JobStatus, JobVerb)))
async def test_a_verb_is_refused_where_the_table_has_none(status: JobStatus, verb: JobVerb) -> None:
    job = await in_state(status)
    if status in ACCEPTED_IN[verb]:
        if verb is JobVerb.RESUME and not job.user_paused:
            with pytest.raises(JobError, match="Can't resume a job that was not paused"):
                use(job, verb)
        elif verb is JobVerb.PAUSE and job.user_paused:
            with pytest.raises(JobError, match="Job is already paused"):
                use(job, verb)
        else:
            use(job, verb)
    else:
        with pytest.raises(JobError) as raised:
            use(job, verb)
        assert str(raised.value) == f"Job 'job' in state '{status}' cannot accept command verb '{verb}'"
    job.force_cancel()
    await settle()


async def test_a_job_that_goes_well() -> None:
    job = Scripted()
    told = announced(job)
    job.go_on.set()
    job.start()
    await job.wait()
    assert told.words() == ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"]
    assert job.calls == ["run", "prepare", "commit", "clean"]
    assert job.error is None
    assert job.error_text is None


@pytest.mark.parametrize(
    ("step", "calls", "words"),
    [
        ("run", ["run", "abort", "clean"], ["aborting"]),
        ("prepare", ["run", "prepare", "abort", "clean"], ["waiting", "pending", "aborting"]),
    ],
)
async def test_a_job_that_fails(step: str, calls: list[str], words: list[str]) -> None:
    job = Scripted(fails_in=[step])
    told = announced(job)
    job.go_on.set()
    job.start()
    await job.wait()
    assert told.words() == ["created", "running", *words, "COMPLETED", "concluded", "null"]
    assert job.calls == calls
    assert job.error_text == f"{step} went wrong"


@pytest.mark.parametrize("step", ["commit", "clean"])
async def test_an_error_at_the_end_is_reported_and_the_rest_is_done(step: str) -> None:
    job = Scripted(fails_in=[step])
    announced(job)
    job.go_on.set()
    job.start()
    await job.wait()
    assert job.calls == ["run", "prepare", "commit", "clean"]
    assert job.error_text == f"{step} went wrong"


async def test_a_job_waits_to_be_finalized_and_dismissed() -> None:
    job = Scripted(auto_finalize=False, auto_dismiss=False)
    told = announced(job)
    job.go_on.set()
    job.start()
    await settle()
    assert told.words() == ["created", "running", "waiting", "pending", "PENDING"]
    assert job.calls == ["run"]
    job.finalize()
    await job.wait()
    assert job.status is JobStatus.CONCLUDED
    job.dismiss()
    assert told.words()[5:] == ["COMPLETED", "concluded", "null"]


async def test_a_job_that_was_never_started_is_cancelled() -> None:
    job = Scripted(auto_dismiss=False)
    told = announced(job)
    job.cancel()
    await job.wait()
    assert told.words() == ["created", "aborting", "CANCELLED", "concluded", "null"]
    assert job.calls == ["abort", "clean"]


async def test_a_running_job_is_cancelled() -> None:
    job = Scripted()
    told = announced(job)
    job.start()
    await settle()
    job.cancel()
    await job.wait()
    assert told.words() == ["created", "running", "aborting", "CANCELLED", "concluded", "null"]
    assert isinstance(job.error, OSError)
    assert job.error.errno == errno.ECANCELED


async def test_a_paused_job_is_cancelled() -> None:
    job = Scripted()
    told = announced(job)
    job.start()
    await settle()
    job.pause()
    await settle()
    job.cancel()
    await job.wait()
    assert told.words() == ["created", "running", "paused", "running", "aborting", "CANCELLED", "concluded", "null"]


async def test_a_pending_job_is_cancelled() -> None:
    job = Scripted(auto_finalize=False)
    announced(job)
    job.go_on.set()
    job.start()
    await settle()
    job.cancel()
    await job.wait()
    assert job.calls == ["run", "abort", "clean"]


async def test_cancelling_while_it_prepares_takes_it_back() -> None:
    job = Scripted()
    told = announced(job)
    original = job.prepare

    async def prepare() -> None:
        await original()
        job.cancel()
        await settle()

    job.prepare = prepare  # type: ignore[method-assign]
    job.go_on.set()
    job.start()
    await job.wait()
    assert job.calls == ["run", "prepare", "abort", "clean"]
    assert told.words()[-4:] == ["aborting", "CANCELLED", "concluded", "null"]


async def test_cancelling_while_it_commits_changes_nothing() -> None:
    job = Scripted()
    told = announced(job)
    original = job.commit

    async def commit() -> None:
        job.cancel()
        await settle()
        await original()

    job.commit = commit  # type: ignore[method-assign]
    job.go_on.set()
    job.start()
    await job.wait()
    assert job.calls == ["run", "prepare", "commit", "clean"]
    assert told.words()[-3:] == ["COMPLETED", "concluded", "null"]


async def test_pause_and_resume() -> None:
    job = Scripted()
    told = announced(job)
    job.pause()
    job.go_on.set()
    job.start()
    await settle()
    assert job.status is JobStatus.PAUSED
    assert not job.busy
    job.resume()
    await job.wait()
    assert told.words()[:5] == ["created", "running", "paused", "running", "waiting"]


async def test_the_program_holds_a_job_unseen_by_the_user() -> None:
    job = Scripted()
    announced(job)
    job.start()
    job.hold()
    await settle()
    assert job.status is JobStatus.PAUSED
    with pytest.raises(JobError):
        job.resume()
    job.pause()
    job.release()
    await settle()
    assert job.status is JobStatus.PAUSED
    job.resume()
    await settle()
    assert job.status is JobStatus.RUNNING
    job.force_cancel()
    await job.wait()


async def test_a_mirror_completes() -> None:
    job = Mirror()
    told = announced(job)
    job.start()
    await settle()
    job.pause()
    await settle()
    assert job.status is JobStatus.STANDBY
    job.resume()
    await settle()
    job.complete()
    await job.wait()
    assert told.words()[:7] == ["created", "running", "ready", "READY", "standby", "ready", "waiting"]
    assert job.calls[0] == "pivot"


async def test_a_mirror_cancelled_softly_ends_well() -> None:
    job = Mirror()
    told = announced(job)
    job.start()
    await settle()
    job.cancel()
    with pytest.raises(JobError, match="The active block job 'job' cannot be completed"):
        job.complete()
    await job.wait()
    assert job.calls == ["run", "prepare", "commit", "clean"]
    assert "COMPLETED" in told.words()


async def test_a_mirror_cancelled_by_force_does_not() -> None:
    job = Mirror()
    told = announced(job)
    job.start()
    await settle()
    job.cancel(force=True)
    await job.wait()
    assert job.calls == ["abort", "clean"]
    assert "CANCELLED" in told.words()


async def test_a_job_that_cannot_be_completed() -> None:
    job = Mirror()
    job.completes = False  # type: ignore[misc]
    announced(job)
    job.start()
    await settle()
    with pytest.raises(JobError, match="cannot be completed"):
        job.complete()
    job.force_cancel()
    await job.wait()


class Copying(Scripted):
    async def run(self) -> None:
        for _ in range(5):
            await self.throttle(1000)
            self.current_progress += 1000


async def test_the_speed_is_kept() -> None:
    job = Copying(speed=50_000)
    announced(job)
    began = asyncio.get_running_loop().time()
    job.start()
    await asyncio.wait_for(job.wait(), 60)
    assert asyncio.get_running_loop().time() - began > 0.07


async def test_a_new_speed_counts_at_once() -> None:
    job = Copying(speed=10)
    announced(job)
    job.start()
    await settle()
    assert (job.current_progress, job.busy) == (1000, False)
    job.set_speed(0)
    await asyncio.wait_for(job.wait(), 60)
    assert job.current_progress == 5000


async def test_a_slow_job_is_paused_and_cancelled_at_once() -> None:
    job = Copying(speed=10)
    announced(job)
    job.start()
    await settle()
    job.pause()
    await settle()
    assert job.status is JobStatus.PAUSED
    job.cancel()
    await asyncio.wait_for(job.wait(), 60)


async def test_a_job_that_fails_from_outside_cleans_up_also_when_it_is_cancelled() -> None:
    gate, left = asyncio.Event(), []

    class Cleaning(Scripted):
        async def run(self) -> None:
            try:
                await super().run()
            finally:
                await gate.wait()
                left.append("run")

    job = Cleaning()
    announced(job)
    job.start()
    await settle()
    error = OSError(5, "lost")
    job.fail(error)
    job.fail(OSError(6, "lost once more"))
    await settle()
    job.force_cancel()
    await settle()
    assert not job.ended
    gate.set()
    await job.wait()
    assert left == ["run"]
    assert job.error is error
    assert job.calls == ["abort", "clean"]


async def test_a_negative_speed() -> None:
    job = Scripted()
    announced(job)
    with pytest.raises(JobError, match="Parameter 'speed' expects a non-negative value"):
        job.set_speed(-1)


@pytest.mark.parametrize(
    ("policy", "code", "goes_on", "io_status", "action"),
    [
        ("report", errno.EIO, False, "ok", "report"),
        ("auto", errno.EIO, False, "ok", "report"),
        ("ignore", errno.EIO, True, "ok", "ignore"),
        ("stop", errno.EIO, True, "failed", "stop"),
        ("stop", errno.ENOSPC, True, "nospace", "stop"),
        ("enospc", errno.ENOSPC, True, "nospace", "stop"),
        ("enospc", errno.EIO, False, "ok", "report"),
    ],
)
async def test_what_to_do_about_an_error(policy: str, code: int, goes_on: bool, io_status: str, action: str) -> None:
    job = Scripted()
    told = announced(job)
    job.start()
    await settle()
    assert job.failed_io("write", OSError(code, "no"), policy) is goes_on
    assert job.io_status == io_status
    assert (told.events[-1].kind, told.events[-1].operation, told.events[-1].action) == ("error", "write", action)
    await settle()
    assert (job.status is JobStatus.PAUSED) == (action == "stop")
    if action == "stop":
        job.resume()
        await settle()
        assert (job.status, job.io_status) == (JobStatus.RUNNING, "ok")
    job.force_cancel()
    await job.wait()


async def test_the_result_for_a_caller_who_waits() -> None:
    job = Scripted()
    job.go_on.set()
    await job.result()
    assert job.status is JobStatus.NULL
    failing = Scripted(fails_in=["run"])
    failing.go_on.set()
    with pytest.raises(OSError, match="run went wrong"):
        await failing.result()


async def test_a_caller_who_is_cancelled_leaves_a_clean_job() -> None:
    job = Scripted()
    caller = asyncio.create_task(job.result())
    await settle()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert job.calls == ["abort", "clean"]
