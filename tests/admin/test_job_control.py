import asyncio
from typing import Any

import pytest

from nbdserve.admin.errors import QmpError
from nbdserve.admin.events import Events
from nbdserve.admin.job_control import JobControl, error_of
from nbdserve.errors import JobError
from nbdserve.jobs.job import Job
from tests.admin.test_nodes import entry


class Backup(Job):
    type = "backup"
    failure: Exception | None = None

    async def run(self) -> None:
        self.total_progress = self.current_progress = 7
        if self.failure is not None:
            self.failed_io("write", self.failure, "report")
            raise self.failure


def told(events: Events) -> list[Any]:
    log: list[Any] = []
    events.subscribe(lambda event: log.append((event["event"], event["data"])))
    return log


async def test_events_of_a_job() -> None:
    jobs = JobControl(Events())
    log = told(jobs.events)
    node = await entry("n")
    successes: list[str] = []
    job = Backup("j", speed=5, auto_finalize=False)
    jobs.add(job, node, succeeded=lambda: successes.append("j"))
    assert node.users == ["job 'j'"]
    with pytest.raises(QmpError, match="Node 'n' is busy: block device is in use by block job: backup"):
        jobs.check_free(node)
    with pytest.raises(JobError, match="already in use"):
        jobs.add(Backup("j"), node)
    assert node.users == ["job 'j'"]
    job.start()
    while job.status != "pending":
        await asyncio.sleep(0)
    job.finalize()
    await job.wait()
    assert node.users == []
    assert successes == ["j"]
    state = {"type": "backup", "device": "j", "len": 7, "offset": 7, "speed": 5}
    assert ("BLOCK_JOB_PENDING", {"type": "backup", "id": "j"}) in log
    assert ("BLOCK_JOB_COMPLETED", state) in log
    statuses = [data["status"] for name, data in log if name == "JOB_STATUS_CHANGE"]
    assert statuses == ["created", "running", "waiting", "pending", "concluded", "null"]
    with pytest.raises(QmpError, match="Block job 'j' not found") as caught:
        jobs.get_block_job("j")
    assert caught.value.kind == "DeviceNotActive"


async def test_a_failure_and_a_cancellation() -> None:
    jobs = JobControl(Events())
    log = told(jobs.events)
    job = Backup("j")
    job.failure = OSError(28, "No space left on device")
    jobs.add(job)
    job.start()
    await job.wait()
    assert error_of(job) == "No space left on device"
    assert ("BLOCK_JOB_ERROR", {"device": "j", "operation": "write", "action": "report"}) in log
    (ended,) = [data for name, data in log if name == "BLOCK_JOB_COMPLETED"]
    assert ended["error"] == "No space left on device"
    cancelled = Backup("k")
    jobs.add(cancelled)
    cancelled.pause()
    cancelled.start()
    cancelled.cancel(force=True)
    await cancelled.wait()
    assert "BLOCK_JOB_CANCELLED" in [name for name, _ in log]


async def test_what_a_new_job_may_have() -> None:
    jobs = JobControl(Events())
    node = await entry("n")
    for identity in (None, "", "1j", "a b"):
        with pytest.raises(JobError, match=f"Invalid job ID '{identity or ''}'"):
            jobs.new_id(identity, node)
    jobs.check_target(node, await entry("m"))
    node.users.append("export 'e'")
    with pytest.raises(QmpError, match="Node 'n' is in use by export 'e'"):
        jobs.check_target(node, await entry("m"))
    assert jobs.new_id("j", node) == "j"
    job = Backup("j")
    jobs.add(job)
    with pytest.raises(JobError, match="Job ID 'j' already in use"):
        jobs.new_id("j", node)
    job.force_cancel()
    await job.wait()
