"""A job: work that takes its time, can be watched, paused, slowed and cancelled, and ends in one of two ways.

The life of a job: ``run`` does the work. When all jobs of its transaction have done theirs, each is asked to
``prepare``, which may still fail; then all ``commit``, or, if one has failed or was cancelled, all ``abort``. ``clean``
is called in any case. Everything happens on the event loop the job was started on.
"""

from __future__ import annotations

import asyncio
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, TypeAlias

from nbdserve.errors import JobError
from nbdserve.jobs.status import ACCEPTED_IN, TRANSITIONS, JobStatus, JobVerb
from nbdserve.jobs.transaction import Transaction


class JobEventKind(StrEnum):
    """What listeners are told."""

    STATUS_CHANGE = "status-change"
    READY = "ready"
    PENDING = "pending"
    """The job waits for ``finalize``."""
    COMPLETED = "completed"
    """It is over: well, or with ``Job.error``."""
    CANCELLED = "cancelled"
    ERROR = "error"
    """A read or write failed; ``action`` says what the job does about it."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something happened to ``job``, whose ``status`` was this at that moment."""

    kind: JobEventKind
    job: Job
    status: JobStatus
    operation: str = ""
    """``read`` or ``write``, of an ERROR."""
    action: str = ""
    """``report``, ``ignore`` or ``stop``, of an ERROR."""


Listener: TypeAlias = Callable[[JobEvent], None]


def _tell_nobody(event: JobEvent) -> None:
    """The listener of a job in no set."""


class Job(ABC):
    """One job. The verbs raise JobError, in QEMU's words, when the job cannot follow them now."""

    type: ClassVar[str]
    """QEMU's JobType: ``backup``, ``commit``, ``stream``, ``mirror``, ``create``, ``amend``; a name of ours else."""
    completes: ClassVar[bool] = False
    """``complete`` means something to this type."""

    def __init__(
        self,
        id: str,
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        transaction: Transaction | None = None,
    ) -> None:
        self.id = id
        self.speed = speed
        """Bytes a second; 0: as fast as it goes."""
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.status = JobStatus.UNDEFINED
        self.current_progress = 0
        self.total_progress = 0
        """In the units of ``current_progress``, bytes as a rule; may grow while the job runs."""
        self.error: Exception | None = None
        self.io_status = "ok"
        """``ok``, or, while an error holds the job, ``failed`` or ``nospace``."""
        self.cancel_requested = False
        """``cancel`` was called, with or without force; a job that was ready may end well nevertheless."""
        self.cancelled = False
        """The result is not wanted."""
        self.complete_requested = False
        self.user_paused = False
        self.busy = False
        """Working, and neither paused nor held back by ``speed``."""
        self._notify: Listener = _tell_nobody
        self._pauses = 0
        self._changed = asyncio.Event()
        """Set when whoever sleeps in the job should look around."""
        self._free_at = 0.0
        self._body: asyncio.Task[None] | None = None
        self._main: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._over = asyncio.Event()
        self.transaction = transaction or Transaction()
        self.transaction.add(self)

    # --- what a type of job defines ----------------------------------------------------------------------------------

    @abstractmethod
    async def run(self) -> None:
        """Do the work, with ``await throttle(length)`` before each piece. An exception is the failure of the job.

        It is cancelled like any task when the result is not wanted any more.
        """

    async def prepare(self) -> None:
        """Last steps that may fail, when all jobs of the transaction have done their work."""

    async def commit(self) -> None:
        """Make the result count. Called for all jobs of the transaction, or ``abort`` is."""

    async def abort(self) -> None:
        """Take back what ``run`` and ``prepare`` did."""

    async def clean(self) -> None:
        """Release what the job holds; called after ``commit`` or ``abort``, also when ``run`` was never begun."""

    def on_cancel(self, force: bool) -> bool:
        """Whether this ``cancel`` means that the result is not wanted.

        A mirror that is ready says False to one without force: ``run`` sees ``cancel_requested`` and ends well.
        """
        return True

    # --- for run() ---------------------------------------------------------------------------------------------------

    @property
    def pause_requested(self) -> bool:
        """The next ``pause_point`` will hold the job: finish what is in flight first."""
        return self._pauses > 0

    async def pause_point(self) -> None:
        """Wait while the job is paused. One caller at a time, with nothing of the job in flight."""
        if not self._pauses:
            return
        before = self.status
        self._transition(JobStatus.STANDBY if before is JobStatus.READY else JobStatus.PAUSED)
        try:
            while self._pauses:
                await self._sleep(None)
        finally:
            self._transition(before)

    async def throttle(self, length: int) -> None:
        """Wait while the job is paused, and until ``speed`` lets it work on ``length`` more bytes."""
        await self.pause_point()
        now = asyncio.get_running_loop().time
        while self.speed and (wait := self._free_at - now()) > 0:
            await self._sleep(wait)
            await self.pause_point()
        if self.speed:
            self._free_at = max(self._free_at, now()) + length / self.speed

    async def sleep(self, seconds: float) -> None:
        """Do nothing for a while; returns early when a verb was used on the job."""
        await self.pause_point()
        await self._sleep(seconds)
        await self.pause_point()

    async def _sleep(self, seconds: float | None) -> None:
        self.busy = False
        try:
            self._changed.clear()
            async with asyncio.timeout(seconds):  # wait_for loses a cancellation that comes with the event
                await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            self.busy = True

    def fail(self, error: Exception) -> None:
        """End ``run`` at once, with ``error``: what the job works for is lost. Who calls this is not ``run``."""
        if self.failed:
            return
        self.error = error
        if self._body is not None:
            self._body.cancel()

    def become_ready(self) -> None:
        """Source and target are equal from now on."""
        self._transition(JobStatus.READY)
        self._emit(JobEventKind.READY)

    def failed_io(self, operation: str, error: Exception, policy: str) -> bool:
        """A ``read`` or ``write`` failed; whether to go on (after the next ``pause_point`` try again, or skip it).

        ``policy`` is QEMU's BlockdevOnError: ``report``, ``ignore``, ``stop``, ``enospc`` (stop for a full disk),
        ``auto`` (as ``report``).
        """
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if policy == "enospc":
            policy = "stop" if full else "report"
        action = "report" if policy == "auto" else policy
        self._emit(JobEventKind.ERROR, operation=operation, action=action)
        if action == "stop":
            self.io_status = "nospace" if full else "failed"
            if not self.user_paused:
                self.user_paused = True
                self._pauses += 1
        return action != "report"

    # --- verbs -------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Hold the job at its next pause point."""
        self._accept(JobVerb.PAUSE)
        if self.user_paused:
            raise JobError("Job is already paused")
        self.user_paused = True
        self.hold()

    def resume(self) -> None:
        """Undo ``pause``, or the stop after an error."""
        self._accept(JobVerb.RESUME)
        if not self.user_paused:
            raise JobError("Can't resume a job that was not paused")
        self._resume_user()

    def _resume_user(self) -> None:
        self.io_status = "ok"
        self.user_paused = False
        self.release()

    def hold(self) -> None:
        """As ``pause``, for the program itself: counted, and unseen by ``resume``."""
        self._pauses += 1
        self._changed.set()

    def release(self) -> None:
        """Undo one ``hold``."""
        self._pauses -= 1
        self._changed.set()

    def set_speed(self, speed: int) -> None:
        """Bytes a second; 0: as fast as it goes."""
        self._accept(JobVerb.SET_SPEED)
        if speed < 0:
            raise JobError("Parameter 'speed' expects a non-negative value")
        self.speed = speed
        self._free_at = 0.0
        self._changed.set()

    def complete(self) -> None:
        """End a job that is ready, and let the result take the place of the source."""
        self._accept(JobVerb.COMPLETE)
        if not self.completes or self.cancel_requested:
            raise JobError(f"The active block job '{self.id}' cannot be completed")
        self.complete_requested = True
        self._changed.set()

    def cancel(self, force: bool = False) -> None:
        """End the job; what it has done so far is taken back, unless it is ready and not forced."""
        self._accept(JobVerb.CANCEL)
        self._cancel(self.on_cancel(force) or force)

    def force_cancel(self) -> None:
        """``cancel`` with force, in any state; of a job that has begun to commit nothing is taken back."""
        self._cancel(True)

    def _cancel(self, force: bool) -> None:
        if self.transaction.committing or self._over.is_set():
            return
        self.stop(force)
        if self.cancelled and self.ended:
            self.transaction.spawn(self.transaction.abort(self))

    def stop(self, force: bool = True) -> None:
        """Make ``run`` end soon, without telling the transaction. With force the result is not wanted."""
        if self.user_paused:
            self._resume_user()
        if self.ended and not force:
            return  # the work is done: only force takes it back
        self.cancel_requested = True
        self._changed.set()
        if force and not self.cancelled:
            self.cancelled = True
            if self._main is None:
                self._ended.set()
            elif self._body is not None and self.error is None:  # else ``fail`` has done so
                self._body.cancel()

    def finalize(self) -> None:
        """Make the results of the whole transaction count."""
        self._accept(JobVerb.FINALIZE)
        self.transaction.spawn(self.transaction.finalize())

    def dismiss(self) -> None:
        """Forget a job that is over."""
        self._accept(JobVerb.DISMISS)
        self._transition(JobStatus.NULL)

    def _accept(self, verb: JobVerb) -> None:
        if self.status not in ACCEPTED_IN[verb]:
            raise JobError(f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'")

    # --- the life ----------------------------------------------------------------------------------------------------

    def announce(self, notify: Listener) -> None:
        """Tell ``notify`` of everything from the creation on. Once."""
        self._notify = notify
        self._transition(JobStatus.CREATED)

    def start(self) -> None:
        """Begin; ``pause`` before this holds the job at once."""
        self._transition(JobStatus.RUNNING)
        self.busy = True
        self._main = asyncio.get_running_loop().create_task(self._live())

    async def _live(self) -> None:
        self._body = asyncio.get_running_loop().create_task(self._work())
        if self.failed:
            self._body.cancel()
        await asyncio.wait([self._body])
        self.busy = False
        if self._body.cancelled():
            if self.error is None:
                self.cancel_requested = self.cancelled = True
        elif (error := self._body.exception()) is not None:
            self.error = error if isinstance(error, Exception) else JobError(repr(error))
        self._ended.set()
        if self.failed:
            await self.transaction.abort(self)
        else:
            self._transition(JobStatus.WAITING)
            await self.transaction.proceed()

    async def _work(self) -> None:
        await self.pause_point()
        await self.run()

    @property
    def failed(self) -> bool:
        """It will abort, or has."""
        return self.cancelled or self.error is not None

    @property
    def ended(self) -> bool:
        """``run`` has returned, or will never begin."""
        return self._ended.is_set()

    async def wait_ended(self) -> None:
        """Until ``ended``."""
        await self._ended.wait()

    async def wait(self) -> None:
        """Until the job is over: concluded, or gone."""
        await self._over.wait()

    async def result(self) -> None:
        """Run the job to its end, for a caller that has nothing else to do; raises ``error``.

        When the caller is cancelled, so is the job, and this returns after it has cleaned up.
        """
        if self.status is JobStatus.UNDEFINED:
            self.announce(_tell_nobody)
        self.start()
        try:
            await self.wait()
        except asyncio.CancelledError:
            self.force_cancel()
            await self.wait()
            raise
        if self.error is not None:
            raise self.error

    @property
    def error_text(self) -> str | None:
        """What went wrong, as clients are told."""
        error = self.error
        if isinstance(error, OSError) and error.strerror:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return None if error is None else str(error) or type(error).__name__

    async def attempt_prepare(self) -> None:
        """``prepare``, for the transaction; a failure is the job's."""
        try:
            await self.prepare()
        except Exception as error:
            self.error = error

    async def conclude(self) -> None:
        """``commit`` or ``abort``, ``clean``, and the end of the job, for the transaction."""
        if self.failed:
            self.become_aborting()
        for step in (self.abort if self.failed else self.commit, self.clean):
            try:
                await step()
            except Exception as error:
                self.error = self.error or error
        self._emit(JobEventKind.CANCELLED if self.cancelled else JobEventKind.COMPLETED)
        self._transition(JobStatus.CONCLUDED)
        if self.auto_dismiss or self._main is None:
            self._transition(JobStatus.NULL)
        self._over.set()

    def become_pending(self) -> None:
        """All jobs of the transaction have done their work."""
        self._transition(JobStatus.PENDING)
        if not self.auto_finalize:
            self._emit(JobEventKind.PENDING)

    def become_aborting(self) -> None:
        """It has failed, or another of the transaction has."""
        if self.error is None:
            self.error = OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        if self.status is not JobStatus.ABORTING:
            self._transition(JobStatus.ABORTING)

    def _transition(self, status: JobStatus) -> None:
        assert status in TRANSITIONS[self.status], f"{self.status} -> {status}"
        self.status = status
        self._emit(JobEventKind.STATUS_CHANGE)

    def _emit(self, kind: JobEventKind, *, operation: str = "", action: str = "") -> None:
        self._notify(JobEvent(kind, self, self.status, operation, action))
