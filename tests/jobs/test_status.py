"""The tables are QEMU's, row by row."""

from __future__ import annotations

import pytest

from nbdserve.jobs.status import ACCEPTED_IN, TRANSITIONS, JobStatus, JobVerb

ORDER = [
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]
NEXT = {
    "undefined": "01000000000",
    "created": "00100000101",
    "running": "00011010100",
    "paused": "00100000000",
    "ready": "00000110100",
    "standby": "00001000000",
    "waiting": "00000001100",
    "pending": "00000000110",
    "aborting": "00000000110",
    "concluded": "00000000001",
    "null": "00000000000",
}
VERBS = {
    "cancel": "01111111000",
    "pause": "01111100000",
    "resume": "01111100000",
    "set-speed": "01111100000",
    "complete": "00001000000",
    "finalize": "00000001000",
    "dismiss": "00000000010",
}


def test_every_state_and_verb_has_a_row() -> None:
    assert list(JobStatus) == ORDER == list(NEXT) == list(TRANSITIONS)
    assert list(JobVerb) == list(VERBS) == list(ACCEPTED_IN)


@pytest.mark.parametrize("status", ORDER)
def test_what_may_follow(status: str) -> None:
    row = "".join("01"[other in TRANSITIONS[JobStatus(status)]] for other in ORDER)
    assert row == NEXT[status]


@pytest.mark.parametrize("verb", VERBS)
def test_where_a_verb_is_accepted(verb: str) -> None:
    assert "".join("01"[status in ACCEPTED_IN[JobVerb(verb)]] for status in ORDER) == VERBS[verb]
