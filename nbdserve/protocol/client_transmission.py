"""The transmission phase, client role, sans-IO (spec, "Transmission phase").

A server is not trusted: every range it names must lie inside the request it answers, a success must be complete, and
whatever breaks the protocol is one ProtocolError. Offsets and lengths are bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

from nbdserve.buffers import fill_zeroes
from nbdserve.errors import ProtocolError
from nbdserve.protocol import codec
from nbdserve.protocol.client import Failed
from nbdserve.protocol.codec import EXTENDED, SIMPLE
from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_READ,
    CMD_WRITE,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_STRING,
    NBD_EINVAL,
    REPLY_BLOCK_STATUS,
    REPLY_BLOCK_STATUS_EXT,
    REPLY_ERROR,
    REPLY_ERROR_OFFSET,
    REPLY_FLAG_DONE,
    REPLY_NONE,
    REPLY_OFFSET_DATA,
    REPLY_OFFSET_HOLE,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from nbdserve.protocol.reader import Parser, Reader, pieces

MAX_STATUS_EXTENTS: Final = 1 << 20
"""Most extents of one chunk (spec, NBD_REPLY_TYPE_BLOCK_STATUS)."""

_SIMPLE_REST: Final = Struct(">IQ")
_STRUCTURED_REST: Final = Struct(">HHQI")
_EXTENDED_REST: Final = Struct(">HHQQQ")
"""Replies behind their magic."""
_ERROR_BIT: Final = 1 << 15
_MAX_ERROR: Final = codec.CHUNK_ERROR.size + MAX_STRING + 8
_FAR: Final = 1 << 65
"""Above every offset."""
_WIRE_ERRORS: Final = frozenset((1, 5, 12, 22, 28, 75, 95, 108))


@dataclass(slots=True)
class Reply:
    """One finished request. ``error`` is an NBD error, which is the Linux errno; ``message`` is the server's."""

    cookie: int
    command: int
    flags: int
    offset: int
    length: int
    error: int = 0
    message: str = ""
    data: bytearray | memoryview = field(default_factory=bytearray)
    """What READ read: ``length`` bytes, of no use when there was an error."""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """BLOCK_STATUS: ``(length, status)`` by context id, cut at the end of the request."""
    _expected: frozenset[int] = field(default=frozenset(), repr=False, compare=False)
    _holes: list[tuple[int, int]] = field(default_factory=list, repr=False, compare=False)
    """Ranges of the request not yet read, ascending."""
    _chunks: int = field(default=0, repr=False, compare=False)


class ClientTransmission:
    """The transmission phase: ``request`` encodes, ``receive`` decodes; replies come in the server's order."""

    def __init__(self, mode: int, context_ids: Collection[int] = ()) -> None:
        self._mode = mode
        self._context_ids = frozenset(context_ids)
        self._in_flight: dict[int, Reply] = {}
        self._next_cookie = 1
        self._events: list[Reply | Failed] = []
        self._reader = Reader(self._run())

    @property
    def in_flight(self) -> Iterable[Reply]:
        """The requests that have no final reply yet."""
        return self._in_flight.values()

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        only: Sequence[int] = (),
        into: memoryview | None = None,
    ) -> tuple[int, bytes]:
        """The cookie and the bytes of a request. The ``length`` bytes of a WRITE are sent after them by the caller.

        ``into`` takes the data of a READ, ``length`` bytes; it is the ``data`` of the reply.

        ``only`` limits a BLOCK_STATUS to these context ids (needs BLOCK_STATUS_PAYLOAD).
        """
        cookie = self._next_cookie
        self._next_cookie += 1
        payload = b""
        if only:
            payload = codec.EFFECT_LENGTH.pack(length) + b"".join(map(codec.CONTEXT_ID.pack, only))
        if command != CMD_DISC:
            reply = self._in_flight[cookie] = Reply(cookie, command, flags, offset, length)
            if command == CMD_READ:
                reply.data = bytearray(length) if into is None else into
                reply._holes = [(offset, offset + length)] if length else []
            elif command == CMD_BLOCK_STATUS:
                reply._expected = frozenset(only) or self._context_ids
        if self._mode != EXTENDED:
            return cookie, codec.REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
        if command == CMD_WRITE or only:
            flags |= CMD_FLAG_PAYLOAD_LEN
        size = len(payload) or length
        return cookie, codec.EXTENDED_REQUEST.pack(
            EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, size
        ) + payload

    def disconnect(self) -> bytes:
        """The request that ends the session; the server answers what is in flight, and closes."""
        return self.request(CMD_DISC)[1]

    def receive(self, data: bytes | bytearray | memoryview) -> list[Reply | Failed]:
        """The requests that ``data`` finishes; Failed, with a ProtocolError, is the last event of a session."""
        if not self._reader.ended:
            self._reader.feed(data)
        events, self._events = self._events, []
        return events

    # --- reading ----------------------------------------------------------------------------------------------------
    def _run(self) -> Parser:
        try:
            while True:
                (magic,) = codec.CONTEXT_ID.unpack((yield 4))
                if magic == SIMPLE_REPLY_MAGIC and self._mode != EXTENDED:
                    yield from self._simple_reply()
                elif magic == (EXTENDED_REPLY_MAGIC if self._mode == EXTENDED else STRUCTURED_REPLY_MAGIC):
                    yield from self._chunk()
                else:
                    raise ProtocolError(f"bad reply magic {magic:#010x}")
        except ProtocolError as error:
            self._events.append(Failed(error))

    def _find(self, cookie: int) -> Reply:
        reply = self._in_flight.get(cookie)
        if reply is None:
            raise ProtocolError(f"a reply to cookie {cookie:#x}, which is not in flight")
        return reply

    def _finish(self, reply: Reply) -> None:
        if not reply.error:
            if reply._holes:
                raise ProtocolError(f"READ succeeded without its bytes from {reply._holes[0][0]}")
            if reply.flags & CMD_FLAG_DF and reply._chunks > 1:
                raise ProtocolError("a READ that must not be fragmented came in pieces")
            if reply.extents.keys() != reply._expected:
                raise ProtocolError("BLOCK_STATUS succeeded without all its contexts")
        del self._in_flight[reply.cookie]
        self._events.append(reply)

    def _simple_reply(self) -> Parser:
        error, cookie = _SIMPLE_REST.unpack((yield _SIMPLE_REST.size))
        reply = self._find(cookie)
        if self._mode != SIMPLE and reply.command == CMD_READ:
            raise ProtocolError("a simple reply to READ under structured replies")
        reply.error = _known(error) if error else 0
        if not error and reply.command == CMD_READ:
            yield from self._data(reply, reply.offset, reply.length)
        self._finish(reply)

    def _chunk(self) -> Parser:
        if self._mode == EXTENDED:
            flags, kind, cookie, offset, length = _EXTENDED_REST.unpack((yield _EXTENDED_REST.size))
            reply = self._find(cookie)
            if offset != reply.offset:
                raise ProtocolError(f"a reply for offset {offset}, not {reply.offset}")
        else:
            flags, kind, cookie, length = _STRUCTURED_REST.unpack((yield _STRUCTURED_REST.size))
            reply = self._find(cookie)
        status_kind = REPLY_BLOCK_STATUS_EXT if self._mode == EXTENDED else REPLY_BLOCK_STATUS
        if kind & _ERROR_BIT:
            yield from self._error(reply, kind, length)
        elif kind == REPLY_NONE:
            if length or not flags & REPLY_FLAG_DONE:
                raise ProtocolError("an empty chunk with data, or not at the end")
        elif kind == REPLY_OFFSET_DATA and reply.command == CMD_READ and length > codec.CHUNK_OFFSET.size:
            (start,) = codec.CHUNK_OFFSET.unpack((yield codec.CHUNK_OFFSET.size))
            yield from self._data(reply, start, length - codec.CHUNK_OFFSET.size)
        elif kind == REPLY_OFFSET_HOLE and reply.command == CMD_READ and length == codec.CHUNK_HOLE.size:
            start, hole = codec.CHUNK_HOLE.unpack((yield length))
            self._take(reply, start, hole)
            if isinstance(reply.data, memoryview):
                fill_zeroes(reply.data[start - reply.offset : start - reply.offset + hole])
        elif kind == status_kind and reply.command == CMD_BLOCK_STATUS:
            yield from self._extents(reply, length)
        else:
            raise ProtocolError(f"a chunk of type {kind} and {length} bytes for command {reply.command}")
        if flags & REPLY_FLAG_DONE:
            self._finish(reply)

    def _take(self, reply: Reply, start: int, length: int) -> None:
        """Note that these bytes of a READ have come. Those of a hole are in a buffer of our own already."""
        end = start + length
        holes = reply._holes
        at = bisect_right(holes, (start, _FAR)) - 1
        if not length or at < 0 or end > holes[at][1]:
            raise ProtocolError(f"bytes {start}..{end} were not asked for, or came twice")
        first, last = holes[at]
        holes[at : at + 1] = [(a, b) for a, b in ((first, start), (end, last)) if a < b]
        reply._chunks += 1

    def _data(self, reply: Reply, start: int, length: int) -> Parser:
        if length:
            self._take(reply, start, length)
        position = start - reply.offset
        for size in pieces(length):
            reply.data[position : position + size] = yield size
            position += size

    def _error(self, reply: Reply, kind: int, length: int) -> Parser:
        if not codec.CHUNK_ERROR.size <= length <= _MAX_ERROR:
            raise ProtocolError(f"an error chunk of {length} bytes")
        body = yield length
        error, size = codec.CHUNK_ERROR.unpack_from(body)
        rest = length - codec.CHUNK_ERROR.size - size
        if not error or rest < 0 or (rest and kind == REPLY_ERROR) or (rest != 8 and kind == REPLY_ERROR_OFFSET):
            raise ProtocolError(f"an error chunk with error {error} and a text of {size} bytes in {length}")
        if not reply.error:
            text = body[codec.CHUNK_ERROR.size : codec.CHUNK_ERROR.size + size]
            reply.error, reply.message = _known(error), text.decode("utf-8", "replace")

    def _extents(self, reply: Reply, length: int) -> Parser:
        extended = self._mode == EXTENDED
        head, extent = (codec.CONTEXT_ID_COUNT, codec.EXTENT_EXT) if extended else (codec.CONTEXT_ID, codec.EXTENT)
        count, rest = divmod(length - head.size, extent.size)
        if count < 1 or rest or count > MAX_STATUS_EXTENTS:
            raise ProtocolError(f"a block status chunk of {length} bytes")
        context_id, *counts = head.unpack((yield head.size))
        if context_id not in reply._expected or context_id in reply.extents or counts not in ([], [count]):
            raise ProtocolError(f"extents of context {context_id}, which is not expected, or not {count} of them")
        if reply.flags & CMD_FLAG_REQ_ONE and count > 1:
            raise ProtocolError("more than the one extent asked for")
        extents = list(extent.iter_unpack((yield length - head.size)))
        left = reply.length
        for size, _ in extents:
            if not size or left <= 0:
                raise ProtocolError("an empty extent, or one behind the request")
            left -= size
        if left < 0:
            if reply.flags & CMD_FLAG_REQ_ONE:
                raise ProtocolError("the one extent asked for is longer than the request")
            extents[-1] = (extents[-1][0] + left, extents[-1][1])
        reply.extents[context_id] = extents


def _known(error: int) -> int:
    """``error`` as the client takes it: a number the protocol does not have means EINVAL (spec, "Error values")."""
    return error if error in _WIRE_ERRORS else NBD_EINVAL
