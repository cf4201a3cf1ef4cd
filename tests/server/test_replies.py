"""Replies gathered behind each other."""

from __future__ import annotations

from nbdserve.buffers import ReusedBuffer
from nbdserve.server.replies import SCRATCH_SIZE, Replies


class Sent:
    """Stands for an Output."""

    def __init__(self) -> None:
        self.sends: list[bytes] = []
        self.backlog = 0

    def send_scratch(self, scratch: ReusedBuffer, length: int) -> None:
        self.sends.append(bytes(scratch.view[:length]))


def test_replies_leave_together_and_in_order() -> None:
    sent = Sent()
    replies = Replies(ReusedBuffer(SCRATCH_SIZE), sent)  # type: ignore[arg-type]
    replies.send()
    assert not sent.sends
    for reply in (b"one", b"two", b"three"):
        replies.append(reply)
    replies.send()
    replies.append(b"four")
    replies.send()
    assert sent.sends == [b"onetwothree", b"four"]


def test_a_reply_that_does_not_fit_goes_after_the_others() -> None:
    sent = Sent()
    replies = Replies(ReusedBuffer(SCRATCH_SIZE), sent)  # type: ignore[arg-type]
    replies.append(b"a" * (SCRATCH_SIZE - 1))
    replies.append(b"bc")
    replies.send()
    assert [len(part) for part in sent.sends] == [SCRATCH_SIZE - 1, 2]
