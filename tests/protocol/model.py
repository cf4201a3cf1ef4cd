"""A whole server in memory for the protocol tests: the sans-IO server role over a ``bytearray`` with known holes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nbdserve.buffers import ReusedBuffer
from nbdserve.errors import OptionError, ProtocolError, RequestError
from nbdserve.protocol import codec, constants
from nbdserve.protocol.codec import SIMPLE
from nbdserve.protocol.handshake import Close, Negotiated, Send, ServerHandshake
from nbdserve.protocol.transmission import RequestParser
from nbdserve.protocol.validate import RequestRules, status_payload

SIZE = 1 << 20
BLOCK = 4096
RECEIVE_BUFFER = ReusedBuffer(256 << 10)
"""Shared by all servers, as by the connections of an event loop."""
ALL_FLAGS = (
    constants.EXPORT_HAS_FLAGS
    | constants.EXPORT_SEND_FLUSH
    | constants.EXPORT_SEND_FUA
    | constants.EXPORT_SEND_TRIM
    | constants.EXPORT_SEND_WRITE_ZEROES
    | constants.EXPORT_CAN_MULTI_CONN
    | constants.EXPORT_SEND_CACHE
)


@dataclass
class FakeExport:
    name: str = "disk"
    description: str = "a disk"
    size: int = SIZE
    flags: int = ALL_FLAGS
    minimum_block: int = 512
    preferred_block: int = 4096
    maximum_block: int = 32 << 20
    contexts: Sequence[str] = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0")
    full: bool = False
    admitted: int = 0

    def admit(self) -> None:
        if self.full:
            raise OptionError(constants.REP_ERR_POLICY, "enough clients")
        self.admitted += 1


@dataclass
class FakeDirectory:
    exports: dict[str, FakeExport] = field(default_factory=dict)

    def list(self) -> list[tuple[str, str]]:
        return [(export.name, export.description) for export in self.exports.values()]

    def find(self, name: str) -> FakeExport | None:
        if name == "" and self.exports:
            return next(iter(self.exports.values()))
        return self.exports.get(name)


def directory(*exports: FakeExport) -> FakeDirectory:
    """A directory of these exports, or of two usual ones; the first is the default."""
    chosen = exports or (FakeExport(), FakeExport(name="other", description="", size=BLOCK))
    return FakeDirectory({export.name: export for export in chosen})


class ModelDisk:
    """Bytes and which blocks hold data; the statuses of context n are made up from the block number and n."""

    def __init__(self, size: int = SIZE) -> None:
        self.data = bytearray(size)

    def is_zero(self, block: int) -> bool:
        return not any(self.data[block * BLOCK : (block + 1) * BLOCK])

    def extents(self, offset: int, length: int, context: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            block = offset // BLOCK
            size = min((block + 1) * BLOCK, end) - offset
            status = (3 if self.is_zero(block) else 0) if context == 0 else (block + context) % 3
            if found and found[-1][1] == status:
                found[-1] = (found[-1][0] + size, status)
            else:
                found.append((size, status))
            offset += size
        return found


class ModelServer:
    """``receive`` takes any bytes of a client and returns what the server sends; ``closed`` ends it."""

    def __init__(
        self, exports: FakeDirectory | None = None, *, shutting_down: Callable[[], bool] = lambda: False
    ) -> None:
        self.handshake = ServerHandshake(exports or directory(), shutting_down=shutting_down)
        self.disk = ModelDisk(0)
        self.negotiated: Negotiated | None = None
        self.closed: str | None = None
        self.requests = 0
        self._buffer = RECEIVE_BUFFER
        self._parser: RequestParser | None = None

    def receive(self, data: bytes) -> bytes:
        out = bytearray()
        if self._parser is None:
            for event in self.handshake.receive(data):
                if isinstance(event, Send):
                    out += event.data
                elif isinstance(event, Close):
                    self.closed = event.reason
                elif isinstance(event, Negotiated):
                    self.negotiated = event
                    self.disk = ModelDisk(event.export.size)
                    rules = RequestRules(event.export.size, event.flags, event.mode, bool(event.contexts))
                    self._parser = RequestParser(rules, event.mode, self._buffer)
            if self._parser is None or self.closed is not None:
                return bytes(out)
            data = self.handshake.leftover
        assert self._parser is not None
        view = memoryview(data)
        while self.closed is None:
            into = self._parser.get_buffer()
            count = min(len(into), len(view))
            into[:count] = view[:count]
            self._parser.received(count)
            view = view[count:]
            self._answer_all(self._parser, out)
            if not view:
                break
        return bytes(out)

    def _answer_all(self, parser: RequestParser, out: bytearray) -> None:
        try:
            while batch := parser.next_batch(3):
                for error, kind, flags, cookie, offset, length, payload in batch:
                    self.requests += 1
                    if kind != constants.CMD_DISC:
                        out += self.answer(error, kind, flags, cookie, offset, length, payload)
        except ProtocolError as error:
            self.closed = str(error)
        else:
            if parser.disconnected:
                self.closed = "disconnected"

    def answer(
        self, error: int, kind: int, flags: int, cookie: int, offset: int, length: int, payload: memoryview | None
    ) -> bytes:
        assert self.negotiated is not None
        mode, disk = self.negotiated.mode, self.disk.data
        if error:
            return codec.final_reply(mode, cookie, offset, codec.wire_error(error), "refused")
        if kind in (constants.CMD_READ, constants.CMD_TRIM, constants.CMD_CACHE, constants.CMD_WRITE_ZEROES):
            assert offset + length <= len(disk)
        if kind == constants.CMD_READ:
            return self._read(mode, flags, cookie, offset, length)
        if kind == constants.CMD_WRITE:
            assert payload is not None
            assert len(payload) == length
            assert offset + length <= len(disk)
            disk[offset : offset + length] = payload
        elif kind in (constants.CMD_WRITE_ZEROES, constants.CMD_TRIM):
            disk[offset : offset + length] = bytes(length)
        elif kind == constants.CMD_BLOCK_STATUS:
            ids = [number for number, _ in self.negotiated.contexts]
            if payload is not None:
                try:
                    length, chosen = status_payload(payload, ids)
                except RequestError as refused:
                    return codec.final_reply(mode, cookie, offset, refused.errno, str(refused))
                ids = list(chosen)
                error = RequestRules(len(disk), self.negotiated.flags, mode, True).check(
                    kind, flags & ~constants.CMD_FLAG_PAYLOAD_LEN, offset, length
                )
                if error:
                    return codec.final_reply(mode, cookie, offset, error, "refused")
            return self._status(mode, flags, cookie, offset, length, ids)
        return codec.final_reply(mode, cookie, offset)

    def _read(self, mode: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
        data = self.disk.data[offset : offset + length]
        if mode == SIMPLE:
            return codec.simple_reply(cookie) + data
        if not length:
            return codec.none_chunk(mode, cookie, offset)
        if flags & constants.CMD_FLAG_DF:
            return codec.data_chunk_head(mode, constants.REPLY_FLAG_DONE, cookie, offset, offset, length) + data
        chunks = b""
        position = offset
        for size, status in self.disk.extents(offset, length, 0):
            if status:
                chunks += codec.hole_chunk(mode, 0, cookie, offset, position, size)
            else:
                chunks += codec.data_chunk_head(mode, 0, cookie, offset, position, size)
                chunks += self.disk.data[position : position + size]
            position += size
        return chunks + codec.none_chunk(mode, cookie, offset)

    def _status(self, mode: int, flags: int, cookie: int, offset: int, length: int, ids: Sequence[int]) -> bytes:
        chunks = b""
        for number in ids:
            extents = self.disk.extents(offset, length, number)
            if flags & constants.CMD_FLAG_REQ_ONE:
                extents = extents[:1]
            done = constants.REPLY_FLAG_DONE if number == ids[-1] else 0
            chunks += codec.block_status_chunk(mode, done, cookie, offset, number, extents)
        return chunks


def option(number: int, data: bytes = b"") -> bytes:
    return codec.option_request(number, data)


def info_data(name: str, *infos: int) -> bytes:
    return codec.build(codec.INFO_REQUEST, name=name.encode(), infos=list(infos))


def meta_data(name: str, *queries: str) -> bytes:
    return codec.build(codec.META_REQUEST, name=name.encode(), queries=[query.encode() for query in queries])


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """``(option, kind, data)`` of each option reply in ``data``."""
    found = []
    while data:
        magic, number, kind, length = codec.OPTION_REPLY.unpack_from(data)
        assert magic == constants.OPTION_REPLY_MAGIC
        body = data[codec.OPTION_REPLY.size :][:length]
        assert len(body) == length
        found.append((number, kind, body))
        data = data[codec.OPTION_REPLY.size + length :]
    return found
