"""Jobs as commands see them: what they use, and what clients are told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from nbdserve.admin.errors import DEVICE_NOT_ACTIVE, QmpError, description_of
from nbdserve.admin.events import Events, EventType
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Result
from nbdserve.jobs.job import Job, JobEvent, JobEventKind
from nbdserve.jobs.job_set import JobSet
from nbdserve.jobs.status import JobStatus

BLOCK_JOBS: Final = frozenset({"backup", "commit", "mirror", "stream"})
"""Types that ``block-job-`` commands and ``BLOCK_JOB_`` events know."""


class StatusChange(Result):
    """Of JOB_STATUS_CHANGE."""

    id: str
    status: str


class BlockJobState(Result):
    """Of BLOCK_JOB_READY and BLOCK_JOB_CANCELLED."""

    type: str
    device: str
    len: int
    offset: int
    speed: int


class BlockJobEnd(BlockJobState):
    """Of BLOCK_JOB_COMPLETED."""

    error: str | None = None


class BlockJobPending(Result):
    """Of BLOCK_JOB_PENDING."""

    type: str
    id: str


class BlockJobError(Result):
    """Of BLOCK_JOB_ERROR."""

    device: str
    operation: str
    action: str


JOB_STATUS_CHANGE = EventType("JOB_STATUS_CHANGE", StatusChange)
BLOCK_JOB_READY = EventType("BLOCK_JOB_READY", BlockJobState)
BLOCK_JOB_PENDING = EventType("BLOCK_JOB_PENDING", BlockJobPending)
BLOCK_JOB_COMPLETED = EventType("BLOCK_JOB_COMPLETED", BlockJobEnd)
BLOCK_JOB_CANCELLED = EventType("BLOCK_JOB_CANCELLED", BlockJobState)
BLOCK_JOB_ERROR = EventType("BLOCK_JOB_ERROR", BlockJobError)

JOB_EVENTS: Final = (
    JOB_STATUS_CHANGE,
    BLOCK_JOB_READY,
    BLOCK_JOB_PENDING,
    BLOCK_JOB_COMPLETED,
    BLOCK_JOB_CANCELLED,
    BLOCK_JOB_ERROR,
)
"""All there are of jobs."""


def is_block_job(job: Job) -> bool:
    """Whether ``block-job-`` commands know it."""
    return job.type in BLOCK_JOBS


@dataclass(eq=False)
class JobControl:
    """The jobs, which go on when the client that began them is gone."""

    events: Events
    jobs: JobSet = field(default_factory=JobSet)
    _uses: dict[Job, list[NodeEntry]] = field(default_factory=dict)
    _succeeded: dict[Job, Callable[[], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.jobs.listen(self._tell)

    def check_free(self, entry: NodeEntry) -> None:
        """QmpError when a job works on the node."""
        for job in self.jobs:
            if entry in self._uses.get(job, ()):
                raise QmpError(f"Node '{entry.name}' is busy: block device is in use by block job: {job.type}")

    def check_target(self, entry: NodeEntry, source: NodeEntry) -> None:
        """QmpError when a new job may not copy ``source`` to the node: somebody uses it, or it is read-only."""
        if entry.is_made_of(source):
            raise QmpError(f"Node '{entry.name}' is on node '{source.name}', and cannot be a copy of it")
        self.check_free(entry)
        if entry.users:
            raise QmpError(f"Node '{entry.name}' is in use by {entry.users[0]}")
        if entry.node.read_only:
            raise QmpError(f"Block node is read-only: '{entry.name}' cannot be written")

    def new_id(self, job_id: str | None, entry: NodeEntry) -> str:
        """The id of a new job on the node. QmpError when a job works on that already, JobError for the id.

        Ask before the job is made, for making it takes the node. Without an id it would be that of the device, of which
        a node is none.
        """
        self.jobs.check_id(job_id or "")
        self.check_free(entry)
        return job_id or ""

    def add(self, job: Job, *uses: NodeEntry, succeeded: Callable[[], None] | None = None) -> None:
        """Let ``job`` be known, and keep the nodes it uses from being deleted. JobError as ``JobSet.add``.

        ``succeeded`` is called when it has ended well, before anybody is told.
        """
        self._uses[job] = list(uses)
        if succeeded is not None:
            self._succeeded[job] = succeeded
        for entry in uses:
            entry.users.append(_label(job))
        try:
            self.jobs.add(job)
        except BaseException:
            self._release(job)
            raise

    def get_block_job(self, identity: str) -> Job:
        """QmpError when there is no such job."""
        for job in self.jobs:
            if job.id == identity and is_block_job(job):
                return job
        raise QmpError(f"Block job '{identity}' not found", DEVICE_NOT_ACTIVE)

    def _release(self, job: Job) -> None:
        self._succeeded.pop(job, None)
        for entry in self._uses.pop(job, []):
            entry.users.remove(_label(job))

    def _tell(self, event: JobEvent) -> None:
        job = event.job
        if event.kind is JobEventKind.COMPLETED and job.error is None and job in self._succeeded:
            self._succeeded[job]()
        if event.kind is JobEventKind.STATUS_CHANGE:
            if event.status in (JobStatus.CONCLUDED, JobStatus.NULL):
                self._release(job)
            self.events.emit(JOB_STATUS_CHANGE, StatusChange(id=job.id, status=event.status))
        elif is_block_job(job):
            self._tell_block_job(event)

    def _tell_block_job(self, event: JobEvent) -> None:
        job = event.job
        state = {
            "type": job.type,
            "device": job.id,
            "len": job.total_progress,
            "offset": job.current_progress,
            "speed": job.speed,
        }
        match event.kind:
            case JobEventKind.READY:
                self.events.emit(BLOCK_JOB_READY, BlockJobState.model_validate(state))
            case JobEventKind.CANCELLED:
                self.events.emit(BLOCK_JOB_CANCELLED, BlockJobState.model_validate(state))
            case JobEventKind.COMPLETED:
                self.events.emit(BLOCK_JOB_COMPLETED, BlockJobEnd.model_validate(state | {"error": error_of(job)}))
            case JobEventKind.PENDING:
                self.events.emit(BLOCK_JOB_PENDING, BlockJobPending(type=job.type, id=job.id))
            case JobEventKind.ERROR:
                problem = BlockJobError(device=job.id, operation=event.operation, action=event.action)
                self.events.emit(BLOCK_JOB_ERROR, problem)


def error_of(job: Job) -> str | None:
    """Why it failed, if it has."""
    return None if job.error is None else description_of(job.error)


def _label(job: Job) -> str:
    return f"job '{job.id}'"
