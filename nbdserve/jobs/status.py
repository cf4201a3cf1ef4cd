"""The states of a job and the verbs each accepts: QEMU's tables (``JobStatus`` and ``JobVerb`` of its ``job.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class JobStatus(StrEnum):
    """Where a job is in its life."""

    UNDEFINED = "undefined"
    """Not told to anybody yet."""
    CREATED = "created"
    """Known, and not started."""
    RUNNING = "running"
    PAUSED = "paused"
    """Held at a pause point while it was running."""
    READY = "ready"
    """Source and target are equal, and are kept so until ``complete`` or ``cancel``."""
    STANDBY = "standby"
    """Held at a pause point while it was ready."""
    WAITING = "waiting"
    """Done, and waiting for the other jobs of its transaction."""
    PENDING = "pending"
    """All of the transaction are done; ``finalize`` makes the result visible."""
    ABORTING = "aborting"
    """Failed or cancelled: what it made is being taken back."""
    CONCLUDED = "concluded"
    """Over; there until ``dismiss``, so that a client that was away can learn of the result."""
    NULL = "null"
    """Gone."""


class JobVerb(StrEnum):
    """What a user may ask of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


_S = JobStatus

TRANSITIONS: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {
    _S.UNDEFINED: frozenset({_S.CREATED}),
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}
"""From each state, the states that may follow it."""

_STARTED = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

ACCEPTED_IN: Final[Mapping[JobVerb, frozenset[JobStatus]]] = {
    JobVerb.CANCEL: _STARTED | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: _STARTED,
    JobVerb.RESUME: _STARTED,
    JobVerb.SET_SPEED: _STARTED,
    JobVerb.COMPLETE: frozenset({_S.READY}),
    JobVerb.FINALIZE: frozenset({_S.PENDING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
}
"""For each verb, the states in which it is accepted."""
