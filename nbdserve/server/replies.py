"""Replies that are put together behind each other, to leave with one send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from nbdserve.block.gathering import GatheringNode
from nbdserve.block.pieces import Piece
from nbdserve.buffers import ReusedBuffer
from nbdserve.protocol.codec import data_chunk_head, hole_chunk
from nbdserve.protocol.constants import REPLY_FLAG_DONE
from nbdserve.server.output import Output
from nbdserve.units import KIB, MIB

SCRATCH_SIZE: Final = 2 * MIB
"""Replies are put together here. A longer one gets a buffer of its own."""
SEND_AT: Final = 128 * KIB
"""Replies leave when they are this long together: the client starts on them while the next are read."""


def read_chunks(
    mode: int, cookie: int, offset: int, view: memoryview, pieces: Sequence[Piece]
) -> Iterator[bytes | memoryview]:
    """The reply to a read of several pieces, whose data is in ``view``; each part is sent before the next is taken."""
    position = 0
    for is_zero, length in pieces:
        done = REPLY_FLAG_DONE if position + length == len(view) else 0
        at = offset + position
        if is_zero:
            yield hole_chunk(mode, done, cookie, offset, at, length)
        else:
            yield data_chunk_head(mode, done, cookie, offset, at, length)
            yield view[position : position + length]
        position += length


class Replies:
    """The replies of one session that have not left yet; their memory is shared between two event-loop callbacks."""

    __slots__ = ("_output", "position", "scratch")

    def __init__(self, scratch: ReusedBuffer, output: Output) -> None:
        self.scratch = scratch
        self._output = output
        self.position = 0
        """Where the next one goes."""

    def append(self, reply: bytes) -> None:
        """Add a whole reply, shorter than the scratch buffer."""
        start = self.position
        if start + len(reply) > SCRATCH_SIZE:
            self.send()
            start = 0
        self.scratch.data[start : start + len(reply)] = reply
        self.position = start + len(reply)

    def send(self) -> None:
        """Let go of what is there."""
        if self.position:
            length, self.position = self.position, 0
            self._output.send_scratch(self.scratch, length)

    def finish(self) -> int:
        """Make ready what is there, for somebody else to send; its length."""
        length, self.position = self.position, 0
        return length


class GatheringReplies(Replies):
    """With requests that a node has gathered: they are finished before anything leaves.

    ``written`` is called after writes of theirs may have been acknowledged.
    """

    __slots__ = ("_node", "_written")

    def __init__(self, scratch: ReusedBuffer, output: Output, node: GatheringNode, written: Callable[[], None]) -> None:
        super().__init__(scratch, output)
        self._node = node
        self._written = written

    def send(self) -> None:
        self._node.finish()
        super().send()
        self._written()

    def finish(self) -> int:
        self._node.finish()
        return super().finish()
