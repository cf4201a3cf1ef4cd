from __future__ import annotations

import struct

import pytest

from nbdserve.buffers import ReusedBuffer
from nbdserve.errors import ProtocolError
from nbdserve.protocol import codec
from nbdserve.protocol import constants as k
from nbdserve.protocol.client_transmission import ClientTransmission, Reply
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED
from nbdserve.protocol.transmission import (
    INLINE_PAYLOAD,
    RECEIVE_SIZE,
    RequestParser,
    pack_read_head,
    read_head_size,
)
from nbdserve.protocol.validate import RequestRules
from tests.protocol.model import ALL_FLAGS

SIZE = 256 << 20
SCRUB = b"\xee" * 4096
Seen = tuple[int, int, int, int, int, int, bytes | None]


class Wire:
    """Bytes into a parser as a socket would bring them; requests out, their payloads copied."""

    def __init__(self, mode: int = STRUCTURED, *, flags: int = ALL_FLAGS | k.EXPORT_SEND_DF, limit: int = 64) -> None:
        self.mode = mode
        self.limit = limit
        self.buffer = ReusedBuffer(RECEIVE_SIZE)
        self.parser = RequestParser(RequestRules(SIZE, flags, mode, True), mode, self.buffer)

    def receive(self, data: bytes, step: int = RECEIVE_SIZE) -> list[Seen]:
        found: list[Seen] = []
        while data:
            into = self.parser.get_buffer()
            count = min(step, len(into), len(data))
            into[:count] = data[:count]
            data = data[count:]
            self.parser.received(count)
            while batch := self.parser.next_batch(self.limit):
                assert len(batch) <= self.limit
                found += [(*request[:6], None if request[6] is None else bytes(request[6])) for request in batch]
            # another connection uses the buffer in between
            self.buffer.view[: len(SCRUB)] = SCRUB
        return found


def simple(kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1) -> bytes:
    return codec.REQUEST.pack(k.REQUEST_MAGIC, flags, kind, cookie, offset, length)


def extended(kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1) -> bytes:
    return codec.EXTENDED_REQUEST.pack(k.EXTENDED_REQUEST_MAGIC, flags, kind, cookie, offset, length)


SESSION = (
    simple(k.CMD_READ, 512, 4096, cookie=1)
    + simple(k.CMD_WRITE, 0, 5, cookie=2)
    + b"hello"
    + simple(k.CMD_WRITE, 0, 0, cookie=3)
    + simple(k.CMD_WRITE, 1 << 63, 70_000, cookie=4)
    + bytes(70_000)
    + simple(k.CMD_WRITE, 100, INLINE_PAYLOAD + 1, cookie=5)
    + b"w" * (INLINE_PAYLOAD + 1)
    + simple(77, 0, 1 << 31, cookie=6)
    + simple(k.CMD_FLUSH, cookie=7)
    + simple(k.CMD_DISC, cookie=8)
    + simple(k.CMD_READ, 0, 1, cookie=9)
)
SEEN: list[Seen] = [
    (0, k.CMD_READ, 0, 1, 512, 4096, None),
    (0, k.CMD_WRITE, 0, 2, 0, 5, b"hello"),
    (0, k.CMD_WRITE, 0, 3, 0, 0, b""),
    (k.NBD_ENOSPC, k.CMD_WRITE, 0, 4, 1 << 63, 70_000, None),
    (0, k.CMD_WRITE, 0, 5, 100, INLINE_PAYLOAD + 1, b"w" * (INLINE_PAYLOAD + 1)),
    (k.NBD_EINVAL, 77, 0, 6, 0, 1 << 31, None),
    (0, k.CMD_FLUSH, 0, 7, 0, 0, None),
    (0, k.CMD_DISC, 0, 8, 0, 0, None),
]


@pytest.mark.parametrize("step", [3, 28, 29, 4096, 65_000, RECEIVE_SIZE])
@pytest.mark.parametrize("limit", [1, 3, 64])
def test_requests_are_the_same_however_they_arrive(step: int, limit: int) -> None:
    wire = Wire(limit=limit)
    assert wire.receive(SESSION, step) == SEEN
    assert wire.parser.disconnected


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED])
def test_a_bad_magic_is_a_protocol_error(mode: int) -> None:
    with pytest.raises(ProtocolError):
        Wire(mode).receive(bytes(32))
    with pytest.raises(ProtocolError):
        Wire(mode).receive(simple(k.CMD_READ) + bytes(4) if mode == EXTENDED else extended(k.CMD_READ))


def test_a_write_too_long_is_drained_and_refused() -> None:
    wire = Wire()
    assert wire.receive(simple(k.CMD_WRITE, 0, k.MAX_PAYLOAD + 1)) == []
    block = bytes(RECEIVE_SIZE)
    for _ in range(k.MAX_PAYLOAD // RECEIVE_SIZE):
        assert wire.receive(block) == []
    assert [request[:4] for request in wire.receive(b"x" + simple(k.CMD_FLUSH, cookie=2))] == [
        (k.NBD_EINVAL, k.CMD_WRITE, 0, 1),
        (0, k.CMD_FLUSH, 0, 2),
    ]


@pytest.mark.parametrize("length", [k.MAX_DRAINED_PAYLOAD + 1, 0xFFFFFFFF])
def test_a_longer_one_ends_the_connection(length: int) -> None:
    with pytest.raises(ProtocolError):
        Wire().receive(simple(k.CMD_WRITE, 0, length))


@pytest.mark.parametrize("command", [command for command in range(10) if command != k.CMD_WRITE])
def test_no_command_gets_memory_for_a_huge_payload(command: int) -> None:
    with pytest.raises(ProtocolError):
        Wire(EXTENDED, flags=0xFFFF).receive(extended(command, 0, 1 << 62, flags=k.CMD_FLAG_PAYLOAD_LEN))


def test_what_precedes_an_error_is_handed_out_first() -> None:
    for bad in (bytes(28), simple(k.CMD_WRITE, 0, 0xFFFFFFFF)):
        wire = Wire()
        wire.parser.feed(simple(k.CMD_FLUSH) + bad)
        assert len(wire.parser.next_batch()) == 1
        with pytest.raises(ProtocolError):
            wire.parser.next_batch()


def test_the_longest_write_is_taken() -> None:
    wire = Wire()
    wire.receive(simple(k.CMD_WRITE, 0, k.MAX_PAYLOAD))
    block = b"b" * (1 << 20)
    found = [request for _ in range(64) for request in wire.receive(block)]
    assert [(request[0], len(request[6] or b"")) for request in found] == [(0, k.MAX_PAYLOAD)]


def test_extended_payloads_of_other_commands_are_consumed() -> None:
    wire = Wire(EXTENDED, flags=ALL_FLAGS | k.EXPORT_BLOCK_STATUS_PAYLOAD)
    flag = k.CMD_FLAG_PAYLOAD_LEN
    payload = struct.pack(">QI", 1 << 33, 0)
    data = (
        extended(k.CMD_READ, 0, 5, flags=flag, cookie=1)
        + b"12345"
        + extended(k.CMD_TRIM, 0, 1 << 40, cookie=2)
        + extended(k.CMD_WRITE, 0, 3, flags=flag, cookie=3)
        + b"abc"
        + extended(k.CMD_WRITE, 0, 3, cookie=4)
        + b"abc"
        + extended(k.CMD_BLOCK_STATUS, 512, 12, flags=flag, cookie=5)
        + payload
        + extended(k.CMD_BLOCK_STATUS, 0, 512, cookie=6)
        + extended(99, 0, 6, flags=flag, cookie=7)
        + b"654321"
        + extended(k.CMD_FLUSH, cookie=8)
    )
    for step in (1, 31, RECEIVE_SIZE):
        assert [(seen[0], seen[3], seen[6]) for seen in wire.receive(data, step)] == [
            (k.NBD_EINVAL, 1, None),
            (k.NBD_EINVAL, 2, None),
            (0, 3, b"abc"),
            (0, 4, b"abc"),
            (0, 5, payload),
            (0, 6, None),
            (k.NBD_EINVAL, 7, None),
            (0, 8, None),
        ]


def test_saved_bytes_come_back() -> None:
    wire = Wire()
    data = simple(k.CMD_FLUSH, cookie=1) + simple(k.CMD_FLUSH, cookie=2)
    wire.parser.feed(data)
    assert [request[3] for request in wire.parser.next_batch(1)] == [1]
    wire.parser.save()
    wire.buffer.data[:] = b"\xee" * len(wire.buffer.data)
    wire.parser.reload()
    assert [request[3] for request in wire.parser.next_batch(1)] == [2]


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED])
def test_read_heads_are_what_the_client_expects(mode: int) -> None:
    client = ClientTransmission(mode)
    cookie, _ = client.request(k.CMD_READ, 1 << 40, 1000)
    head = bytearray(b"\xee" * (3 + read_head_size(mode)))
    pack_read_head(mode)(head, 3, cookie, 1 << 40, 1000)
    (reply,) = client.receive(bytes(head[3:]) + b"r" * 1000)
    assert isinstance(reply, Reply)
    assert (reply.error, bytes(reply.data)) == (0, b"r" * 1000)
