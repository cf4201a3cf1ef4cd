"""Replies gathered behind each other."""

from __future__ import annotations

from nbdserve.buffers import ReusedBuffer
from nbdserve.server.replies import SCRATCH_SIZE, GatheringReplies, Replies


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


def test_what_is_gathered_is_finished_before_anything_leaves() -> None:
    sent, order = Sent(), []

    class Node:
        def finish(self) -> None:
            replies.scratch.data[:3] = b"one"
            order.append("finished")

    replies = GatheringReplies(
        ReusedBuffer(SCRATCH_SIZE),
        sent,  # type: ignore[arg-type]
        Node(),  # type: ignore[arg-type]
        lambda: order.append(f"written after {len(sent.sends)} sends"),
    )
    replies.append(b"???")
    replies.send()
    assert sent.sends == [b"one"]
    assert order == ["finished", "written after 1 sends"]
    replies.send()
    assert len(order) == 4, "also when there is no reply: writes have theirs elsewhere"
    replies.append(b"???")
    assert (replies.finish(), bytes(replies.scratch.view[:3]), replies.position) == (3, b"one", 0)
