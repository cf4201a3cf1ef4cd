"""The fast lane: plain READs and WRITEs that need no waiting, in one loop from the receive to the reply buffer.

Most requests of most clients are such. No tuple, no rule and no call is made for them that is not needed, which
leaves the system call as the larger part. The first request that is anything else ends the run, untouched, and
is the session's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from nbdserve.block.forms import READ_DATA
from nbdserve.block.gathering import GatheringNode
from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_TAKEN, WRITE_WAIT
from nbdserve.buffers import ReusedBuffer
from nbdserve.errors import RequestError
from nbdserve.protocol.transmission import (
    RequestParser,
    pack_read_head,
    pack_write_reply,
    plain_requests,
    read_head_size,
)
from nbdserve.server.output import Output
from nbdserve.server.replies import SCRATCH_SIZE, SEND_AT, Replies
from nbdserve.units import KIB

SEND_FILE_FROM: Final = 32 * KIB
"""Data this long is sent from the page cache; below it, two system calls more cost what the copy does."""


class FastLane:
    """Of one session, whose ``parser`` and ``replies`` it works on; ``size`` is the export's, in bytes.

    A write may be taken, to be done with others: ``taken(length)`` then counts it, and tells whether there is room for
    more; ``written(cookie, offset, length, error)`` follows when it is complete, and replies.
    """

    def __init__(
        self,
        node: Node | GatheringNode,
        parser: RequestParser,
        received: ReusedBuffer,
        replies: Replies,
        output: Output,
        mode: int,
        size: int,
        *,
        writable: bool,
        taken: Callable[[int], bool],
        written: Callable[[int, int, int, Exception | None], None],
    ) -> None:
        self._node = node
        self._parser = parser
        self._received = received
        self._replies = replies
        self._output = output
        self._size = size
        self._taken = taken
        self._written = written
        self._words, self._plain_read, self._plain_write = plain_requests(mode)
        if not writable:
            self._plain_write = -1
        self._head_size = read_head_size(mode)
        self._pack_head = pack_read_head(mode)
        self._acknowledge, self._acknowledgement_size = pack_write_reply(mode)

    def run(self) -> bool:
        """Answer the plain requests that come next, up to the first that is not plain, or cannot be answered now.

        True when nothing is left of what was received.
        """
        parser, replies = self._parser, self._replies
        position, end = parser.unparsed()
        at, scratch, view = replies.position, replies.scratch.data, replies.scratch.view
        unpack, request_size = self._words.unpack_from, self._words.size
        data, payload = self._received.data, self._received.view
        read, pack_head, head_size = self._node.try_read_into, self._pack_head, self._head_size
        write, submit, written = self._node.try_write, self._node.submit_write, self._written
        acknowledge, acknowledgement_size = self._acknowledge, self._acknowledgement_size
        plain_read, plain_write, size = self._plain_read, self._plain_write, self._size
        try:
            while end - position >= request_size:
                word, cookie, offset, length = unpack(data, position)
                if not length or offset + length > size:
                    break
                if word == plain_read:
                    start = at + head_size
                    stop = start + length
                    if length >= SEND_FILE_FROM or stop > SCRATCH_SIZE:
                        break
                    if read(offset, view[start:stop]) != READ_DATA:
                        break
                    pack_head(scratch, at, cookie, offset, length)
                    at = stop
                    position += request_size
                elif word == plain_write:
                    start = position + request_size
                    stop = start + length
                    if stop > end:
                        break
                    content = payload[start:stop]
                    if not write(offset, content):
                        outcome = submit(offset, content, partial(written, cookie, offset, length))
                        if outcome == WRITE_WAIT:
                            break
                        if outcome == WRITE_TAKEN:
                            position = stop
                            if not self._taken(length):
                                break
                            continue
                    position = stop
                    acknowledge(scratch, at, cookie, offset)
                    at += acknowledgement_size
                else:
                    break
                if at >= SEND_AT:
                    replies.position = at
                    replies.send()
                    at, scratch, view = 0, replies.scratch.data, replies.scratch.view
                    if self._output.backlog:
                        break
        except RequestError:
            pass  # a corrupt mapping: the session meets it again and replies
        finally:
            replies.position = at
            parser.skip_to(position)
        return 0 < position == end
