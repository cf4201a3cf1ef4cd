"""The transmission phase, server role, sans-IO: bytes received become requests.

``RequestParser`` is fed by whoever reads the socket: it offers a buffer (``get_buffer``), is told how much arrived
(``received``) and hands out every complete request (``next_batch``). Large WRITE payloads are received straight into a
buffer of their own; small ones are views into the receive buffer, which one thread's connections share.
"""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from struct import Struct
from typing import Final, TypeAlias

from nbdserve.buffers import ReusedBuffer
from nbdserve.errors import ProtocolError
from nbdserve.protocol.codec import EXTENDED, EXTENDED_REQUEST, REQUEST, SIMPLE
from nbdserve.protocol.constants import (
    CMD_DISC,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_READ,
    CMD_WRITE,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_DRAINED_PAYLOAD,
    REPLY_FLAG_DONE,
    REPLY_NONE,
    REPLY_OFFSET_DATA,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from nbdserve.protocol.validate import RequestRules

Request: TypeAlias = tuple[int, int, int, int, int, int, memoryview | None]
"""``(error, type, flags, cookie, offset, length, payload)``: a nonzero ``error`` is all there is to answer.

Offset and length are bytes. ``payload`` is set for WRITE and for a BLOCK_STATUS with a payload, and is valid until
the next call of the parser, unless its buffer is kept (``ReusedBuffer.detach``).
"""

RECEIVE_SIZE: Final = 256 << 10
"""One receive takes up to this. 16 writes of 4 KiB fit four times."""
INLINE_PAYLOAD: Final = 64 << 10
"""A payload longer than this that is not complete in the receive buffer gets a buffer of its own."""


_SIMPLE_READ: Final = Struct(">IIQ")
_STRUCTURED_READ: Final = Struct(">IHHQIQ")
_EXTENDED_READ: Final = Struct(">IHHQQQQ")
_WORDS: Final = Struct(">QQQI")
_EXTENDED_WORDS: Final = Struct(">QQQQ")
_STRUCTURED_WORDS: Final = Struct(">QQI")
_SIMPLE_WORDS: Final = Struct(">QQ")
"""Requests and replies with their first three fields, which are constant for one kind of them, as one number."""

PackReadHead: TypeAlias = Callable[[bytearray | mmap, int, int, int, int], None]
"""``pack(buffer, position, cookie, offset, length)``: write what precedes the data of a whole READ reply."""
PackWriteReply: TypeAlias = Callable[[bytearray | mmap, int, int, int], None]
"""``pack(buffer, position, cookie, offset)``: write the reply to a WRITE that succeeded."""


def read_head_size(mode: int) -> int:
    """Bytes that precede the data of a READ reply made of one chunk."""
    return (_SIMPLE_READ, _STRUCTURED_READ, _EXTENDED_READ)[mode].size


def pack_read_head(mode: int) -> PackReadHead:
    """The function that writes such a head in place; one ``pack_into`` each, because it is called for every read."""
    if mode == SIMPLE:
        pack_simple = _SIMPLE_READ.pack_into
        return lambda buffer, position, cookie, offset, length: pack_simple(
            buffer, position, SIMPLE_REPLY_MAGIC, 0, cookie
        )
    if mode == EXTENDED:
        pack_extended = _EXTENDED_READ.pack_into
        return lambda buffer, position, cookie, offset, length: pack_extended(
            buffer,
            position,
            EXTENDED_REPLY_MAGIC,
            REPLY_FLAG_DONE,
            REPLY_OFFSET_DATA,
            cookie,
            offset,
            length + 8,
            offset,
        )
    pack_structured = _STRUCTURED_READ.pack_into
    return lambda buffer, position, cookie, offset, length: pack_structured(
        buffer, position, STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_OFFSET_DATA, cookie, length + 8, offset
    )


def plain_requests(mode: int) -> tuple[Struct, int, int]:
    """How to recognise READs and WRITEs without flags at one look: ``(words, read, write)``.

    ``words`` unpacks a request to ``(head, cookie, offset, length)``, where the head is magic, flags and type in one.
    With extended headers a WRITE carries PAYLOAD_LEN.
    """
    if mode == EXTENDED:
        magic = EXTENDED_REQUEST_MAGIC << 32
        return _EXTENDED_WORDS, magic | CMD_READ, magic | CMD_FLAG_PAYLOAD_LEN << 16 | CMD_WRITE
    return _WORDS, REQUEST_MAGIC << 32 | CMD_READ, REQUEST_MAGIC << 32 | CMD_WRITE


def pack_write_reply(mode: int) -> tuple[PackWriteReply, int]:
    """The function that writes the reply to a WRITE that was done, and its size; for the same reason as above."""
    if mode == SIMPLE:
        pack_simple, simple = _SIMPLE_WORDS.pack_into, SIMPLE_REPLY_MAGIC << 32
        return (
            lambda buffer, position, cookie, offset: pack_simple(buffer, position, simple, cookie),
            _SIMPLE_WORDS.size,
        )
    done = REPLY_FLAG_DONE << 16 | REPLY_NONE
    if mode == EXTENDED:
        pack_extended, extended = _EXTENDED_WORDS.pack_into, EXTENDED_REPLY_MAGIC << 32 | done
        return (
            lambda buffer, position, cookie, offset: pack_extended(buffer, position, extended, cookie, offset, 0),
            _EXTENDED_WORDS.size,
        )
    pack_structured, structured = _STRUCTURED_WORDS.pack_into, STRUCTURED_REPLY_MAGIC << 32 | done
    return (
        lambda buffer, position, cookie, offset: pack_structured(buffer, position, structured, cookie, 0),
        _STRUCTURED_WORDS.size,
    )


class RequestParser:
    """Splits the byte stream of one connection into requests.

    Raises ProtocolError on a bad magic and on a payload above 128 MiB; everything else is a request, perhaps with an
    error to answer. ``take_buffer`` provides the memory for a large payload; None: there is none now, so that what
    follows is left for a later ``next_batch``.
    """

    __slots__ = (
        "_buffer",
        "_check",
        "_drain",
        "_end",
        "_extended",
        "_filled",
        "_header",
        "_leftover",
        "_magic",
        "_payload",
        "_pending",
        "_start",
        "_take_buffer",
        "collected",
        "disconnected",
    )

    def __init__(
        self,
        rules: RequestRules,
        mode: int,
        buffer: ReusedBuffer,
        take_buffer: Callable[[int], memoryview | None] = lambda length: memoryview(bytearray(length)),
    ) -> None:
        self._extended = mode == EXTENDED
        self._header = EXTENDED_REQUEST if self._extended else REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if self._extended else REQUEST_MAGIC
        self._check = rules.check
        self._buffer = buffer
        self._take_buffer = take_buffer
        self._start = self._end = 0
        self._leftover = b""
        self._payload: memoryview | None = None
        self._filled = 0
        self._drain = 0
        self._pending: Request | None = None
        self.collected = 0
        """Bytes received of payloads that have a buffer of their own."""
        self.disconnected = False
        """DISC was received: nothing after it is looked at."""

    def get_buffer(self) -> memoryview:
        """Where the next bytes received go."""
        if self._payload is not None:
            return self._payload[self._filled :]
        leftover = self._leftover
        if leftover:
            self._buffer.data[: len(leftover)] = leftover
            return self._buffer.view[len(leftover) :]
        return self._buffer.view

    def received(self, count: int) -> None:
        """``count`` bytes are in the buffer that ``get_buffer`` returned."""
        if self._payload is not None:
            self._filled += count
            self.collected += count
            self._start = self._end = 0
            return
        self._start = 0
        self._end = len(self._leftover) + count
        self._leftover = b""

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes received elsewhere (the tail of the handshake); at most what ``get_buffer`` has room for."""
        self.get_buffer()[: len(data)] = data
        self.received(len(data))

    def save(self) -> None:
        """Keep what is not parsed yet: the shared buffer is about to be used by another connection."""
        if self._end > self._start:
            self._leftover = bytes(self._buffer.view[self._start : self._end])
        self._start = self._end = 0

    def reload(self) -> None:
        """Put saved bytes back, to go on with ``next_batch`` without receiving."""
        self.feed(b"")

    @property
    def collecting(self) -> memoryview | None:
        """The buffer of a payload that is not complete."""
        return self._payload

    @property
    def is_cut(self) -> bool:
        """The first part of a request was received, and kept."""
        return bool(self._leftover)

    def abandon(self) -> None:
        """Nothing more is received, and what is not complete is nothing."""
        self._payload = self._pending = None
        self._leftover = b""
        self._start = self._end = 0

    def unparsed(self) -> tuple[int, int]:
        """Where in the receive buffer the next request begins and what was received ends; nothing while one is cut."""
        if self._payload is not None or self._drain or self.disconnected:
            return 0, 0
        return self._start, self._end

    def skip_to(self, position: int) -> None:
        """Somebody else has taken the requests from ``unparsed()[0]`` up to ``position``."""
        if position:
            self._start = position

    def _skip(self, batch: list[Request], start: int, end: int) -> int:
        """Drop what is there of a refused payload; the pending request joins ``batch`` when all of it is gone."""
        skipped = min(self._drain, end - start)
        self._drain -= skipped
        if not self._drain and self._pending is not None:
            batch.append(self._pending)
            self._pending = None
        return start + skipped

    def next_batch(self, limit: int = 64) -> list[Request]:
        """Up to ``limit`` complete requests; an empty list when more bytes are needed (the rest is saved)."""
        batch: list[Request] = []
        if self._payload is not None:
            if self._filled < len(self._payload):
                return batch
            assert self._pending is not None
            batch.append((*self._pending[:6], self._payload))
            self._payload = self._pending = None
        header, magic, check, data = self._header, self._magic, self._check, self._buffer.data
        size, start, end = header.size, self._start, self._end
        extended, unpack = self._extended, header.unpack_from
        if self._drain:
            start = self._skip(batch, start, end)
        while end - start >= size and len(batch) < limit and not self._drain and not self.disconnected:
            got, flags, kind, cookie, offset, length = unpack(data, start)
            if got != magic:
                if batch:
                    break  # what came before is answered first; the next call raises
                raise ProtocolError(f"bad request magic {got:#010x}, expected {magic:#010x}")
            error = check(kind, flags, offset, length)
            if kind != CMD_WRITE and not (extended and flags & CMD_FLAG_PAYLOAD_LEN):
                start += size
                batch.append((error, kind, flags, cookie, offset, length, None))
                if kind == CMD_DISC:
                    self.disconnected = True
                continue
            body = start + size
            if error:
                if length > MAX_DRAINED_PAYLOAD:
                    if batch:
                        break
                    raise ProtocolError(
                        f"payload of {length} bytes is more than the {MAX_DRAINED_PAYLOAD} bytes that are drained"
                    )
                self._pending = (error, kind, flags, cookie, offset, length, None)
                self._drain = length
                start = self._skip(batch, body, end)
            elif end - body >= length:
                start = body + length
                batch.append((0, kind, flags, cookie, offset, length, self._buffer.view[body:start]))
            elif length > INLINE_PAYLOAD:
                payload = self._take_buffer(length)
                if payload is None:
                    break
                self._pending = (0, kind, flags, cookie, offset, length, None)
                self._payload = payload
                self._filled = end - body
                self._payload[: self._filled] = self._buffer.view[body:end]
                start = end
                break
            else:
                break
        self._start, self._end = start, end
        if not batch:
            self.save()
        return batch
