"""Jobs: looking at them, and the verbs for all types of them."""

from __future__ import annotations

from typing import Final

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.job_control import error_of, is_block_job
from nbdserve.admin.schema import Arguments, Int, Nothing, Result
from nbdserve.jobs.status import JobStatus


class JobId(Arguments):
    """Which job."""

    id: str


class Device(Arguments):
    """Which job: its id, by its older name."""

    device: str


class Speed(Device):
    """Bytes a second; 0: any."""

    speed: Int


class Cancel(Device):
    """``force``: also a job that is ready is not wanted."""

    force: bool = False


class JobInfo(Result):
    """A job of any type."""

    id: str
    type: str
    status: str
    current_progress: int
    total_progress: int
    error: str | None = None


class BlockJobInfo(Result):
    """A job on disks."""

    type: str
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: str
    ready: bool
    status: str
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None


async def query_jobs(control: Control, arguments: Nothing) -> list[JobInfo]:
    """All of them."""
    return [
        JobInfo(
            id=job.id,
            type=job.type,
            status=job.status,
            current_progress=job.current_progress,
            total_progress=job.total_progress,
            error=error_of(job),
        )
        for job in control.jobs.jobs
    ]


async def query_block_jobs(control: Control, arguments: Nothing) -> list[BlockJobInfo]:
    """Those on disks."""
    return [
        BlockJobInfo(
            type=job.type,
            device=job.id,
            len=job.total_progress,
            offset=job.current_progress,
            busy=job.busy,
            paused=job.status in (JobStatus.PAUSED, JobStatus.STANDBY),
            speed=job.speed,
            io_status=job.io_status,
            ready=job.status in (JobStatus.READY, JobStatus.STANDBY),
            status=job.status,
            auto_finalize=job.auto_finalize,
            auto_dismiss=job.auto_dismiss,
            error=error_of(job),
        )
        for job in control.jobs.jobs
        if is_block_job(job)
    ]


async def job_pause(control: Control, arguments: JobId) -> None:
    """Hold it."""
    control.jobs.jobs.get(arguments.id).pause()


async def job_resume(control: Control, arguments: JobId) -> None:
    """Let it go on."""
    control.jobs.jobs.get(arguments.id).resume()


async def job_cancel(control: Control, arguments: JobId) -> None:
    """End it: the result is not wanted."""
    control.jobs.jobs.get(arguments.id).cancel(force=True)


async def job_complete(control: Control, arguments: JobId) -> None:
    """End one that is ready."""
    control.jobs.jobs.get(arguments.id).complete()


async def job_dismiss(control: Control, arguments: JobId) -> None:
    """Forget one that is over."""
    control.jobs.jobs.get(arguments.id).dismiss()


async def job_finalize(control: Control, arguments: JobId) -> None:
    """Make the result of one that is done count."""
    control.jobs.jobs.get(arguments.id).finalize()


async def block_job_set_speed(control: Control, arguments: Speed) -> None:
    """Slow it down, or not."""
    control.jobs.get_block_job(arguments.device).set_speed(arguments.speed)


async def block_job_cancel(control: Control, arguments: Cancel) -> None:
    """End it; one that is ready ends well, unless forced."""
    job = control.jobs.get_block_job(arguments.device)
    if job.user_paused and not arguments.force:
        raise QmpError(f"The block job for device '{arguments.device}' is currently paused")
    job.cancel(arguments.force)


async def block_job_pause(control: Control, arguments: Device) -> None:
    """``job-pause``."""
    control.jobs.get_block_job(arguments.device).pause()


async def block_job_resume(control: Control, arguments: Device) -> None:
    """``job-resume``."""
    control.jobs.get_block_job(arguments.device).resume()


async def block_job_complete(control: Control, arguments: Device) -> None:
    """``job-complete``."""
    control.jobs.get_block_job(arguments.device).complete()


async def block_job_dismiss(control: Control, arguments: JobId) -> None:
    """``job-dismiss``."""
    control.jobs.get_block_job(arguments.id).dismiss()


async def block_job_finalize(control: Control, arguments: JobId) -> None:
    """``job-finalize``."""
    control.jobs.get_block_job(arguments.id).finalize()


COMMANDS: Final = (
    Command("query-jobs", query_jobs, returns=list[JobInfo]),
    Command("job-pause", job_pause, JobId),
    Command("job-resume", job_resume, JobId),
    Command("job-cancel", job_cancel, JobId),
    Command("job-complete", job_complete, JobId),
    Command("job-dismiss", job_dismiss, JobId),
    Command("job-finalize", job_finalize, JobId),
    Command("query-block-jobs", query_block_jobs, returns=list[BlockJobInfo]),
    Command("block-job-set-speed", block_job_set_speed, Speed),
    Command("block-job-cancel", block_job_cancel, Cancel),
    Command("block-job-pause", block_job_pause, Device),
    Command("block-job-resume", block_job_resume, Device),
    Command("block-job-complete", block_job_complete, Device),
    Command("block-job-dismiss", block_job_dismiss, JobId),
    Command("block-job-finalize", block_job_finalize, JobId),
)
