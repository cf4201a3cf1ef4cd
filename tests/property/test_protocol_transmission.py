"""Client role and server role against each other in all modes, and each against bytes of any kind."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.protocol import constants as k
from nbdserve.protocol.client import ClientHandshake, Connected, Failed, Send
from nbdserve.protocol.client_transmission import ClientTransmission, Reply
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED
from nbdserve.protocol.validate import RequestRules
from tests.property.sizes import sized
from tests.property.test_protocol_handshake import cut
from tests.protocol.model import ALL_FLAGS, SIZE, ModelServer

CONTEXTS = ("base:allocation", "qemu:allocation-depth")


def connect(mode: int) -> tuple[ModelServer, ClientTransmission]:
    server = ModelServer()
    client = ClientHandshake.connect("disk", contexts=CONTEXTS, highest_mode=mode)
    data = server.handshake.greeting()
    while True:
        events = client.receive(data)
        data = b"".join(server.receive(event.data) for event in events if isinstance(event, Send))
        if events and isinstance(events[-1], Connected):
            export = events[-1].export
            assert export.mode == mode
            return server, ClientTransmission(mode, [number for number, _ in export.contexts])


places = st.one_of(st.integers(0, SIZE), st.sampled_from([0, SIZE - 1, SIZE, SIZE + 1, 1 << 63, (1 << 64) - 512]))
lengths = st.one_of(st.integers(0, 30_000), st.sampled_from([0, 1, 4096, SIZE, SIZE + 1, 0xFFFFFFFF]))
requests = st.tuples(
    st.sampled_from([k.CMD_READ, k.CMD_WRITE, k.CMD_FLUSH, k.CMD_TRIM, k.CMD_CACHE, k.CMD_WRITE_ZEROES, 7, 8, 77]),
    places,
    lengths,
    st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 64, 0x8000]),
)


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED])
@sized
@given(st.lists(requests, max_size=12), st.lists(st.integers(0, 1 << 20), max_size=6))
def test_loopback(mode: int, todo: list[tuple[int, int, int, int]], cuts: list[int]) -> None:
    server, client = connect(mode)
    flags = ALL_FLAGS | (k.EXPORT_SEND_DF if mode else 0) | (k.EXPORT_BLOCK_STATUS_PAYLOAD if mode == EXTENDED else 0)
    check = RequestRules(SIZE, flags, mode, mode != SIMPLE).check
    disk = bytearray(SIZE)
    sent = bytearray()
    expected: dict[int, tuple[int, bytes | None]] = {}
    for turn, (command, offset, wanted, flag) in enumerate(todo):
        # a client that sends 4 GiB of payload, or reads them, is for the tests of the parser
        length = min(wanted, SIZE + 1) if command in (k.CMD_READ, k.CMD_WRITE) else wanted
        cookie, header = client.request(command, offset, length, flags=flag)
        payload = bytes([turn + 1]) * length if command == k.CMD_WRITE else b""
        sent += header + payload
        error = check(command, flag, offset, length)
        result = None
        if not error:
            if command == k.CMD_WRITE:
                disk[offset : offset + length] = payload
            elif command in (k.CMD_TRIM, k.CMD_WRITE_ZEROES):
                disk[offset : offset + length] = bytes(length)
            elif command == k.CMD_READ:
                result = bytes(disk[offset : offset + length])
        expected[cookie] = (error, result)
    sent += client.disconnect()
    answered = b"".join(server.receive(part) for part in cut(bytes(sent), cuts))
    assert server.closed == "disconnected"
    events = [event for part in cut(answered, cuts) for event in client.receive(part)]
    assert len(events) == len(expected)
    for event in events:
        assert isinstance(event, Reply), event
        error, result = expected.pop(event.cookie)
        assert event.error == error
        if result is not None:
            assert event.data == result
        if event.command == k.CMD_BLOCK_STATUS and not error:
            one = event.flags & k.CMD_FLAG_REQ_ONE
            for extents in event.extents.values():
                total = sum(size for size, _ in extents)
                assert (len(extents) == 1 and total <= event.length) if one else total == event.length
    assert server.disk.data == disk


@sized
@given(
    st.sampled_from([SIMPLE, STRUCTURED, EXTENDED]),
    st.lists(st.one_of(st.binary(max_size=80), requests), max_size=10),
    st.lists(st.integers(0, 1 << 16), max_size=20),
)
def test_the_server_takes_any_bytes_in_any_pieces(
    mode: int, parts: list[bytes | tuple[int, int, int, int]], cuts: list[int]
) -> None:
    data = b""
    for part in parts:
        if isinstance(part, bytes):
            data += part
        else:
            command, offset, length, flags = part
            form, magic = (">IHHQQQ", k.EXTENDED_REQUEST_MAGIC) if mode == EXTENDED else (">IHHQQI", k.REQUEST_MAGIC)
            data += struct.pack(form, magic, flags | (length & 1) << 5, command, 7, offset, length)
    seen = []
    for pieces in ([data], cut(data, cuts)):
        server, _ = connect(mode)
        answer = b"".join(server.receive(piece) for piece in pieces)
        seen.append((answer, server.closed, server.requests))
    assert seen[0] == seen[1]


def chunk(mode: int, kind: int, done: int, payload: bytes) -> bytes:
    if mode == EXTENDED:
        return struct.pack(">IHHQQQ", k.EXTENDED_REPLY_MAGIC, done, kind, 1, 0, len(payload)) + payload
    return struct.pack(">IHHQI", k.STRUCTURED_REPLY_MAGIC, done, kind, 1, len(payload)) + payload


@sized
@given(st.data())
def test_the_client_takes_any_bytes_in_any_pieces(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from([SIMPLE, STRUCTURED, EXTENDED]))
    command = data.draw(st.sampled_from([k.CMD_READ, k.CMD_BLOCK_STATUS, k.CMD_FLUSH]))
    kinds = st.sampled_from([0, 1, 2, 5, 6, 9, 0x8001, 0x8002, 0x8003])
    numbers = st.lists(st.integers(0, 70), max_size=6).map(lambda values: struct.pack(f">{len(values)}Q", *values))
    answer = data.draw(
        st.lists(
            st.one_of(
                st.binary(max_size=40),
                st.builds(chunk, st.just(mode), kinds, st.integers(0, 1), st.one_of(numbers, st.binary(max_size=40))),
            ),
            max_size=6,
        ).map(b"".join)
    )
    cuts = data.draw(st.lists(st.integers(0, 1 << 16), max_size=10))
    seen = []
    for pieces in ([answer], cut(answer, cuts)):
        client = ClientTransmission(mode, [0])
        client.request(command, 0, 64)
        events = [event for piece in pieces for event in client.receive(piece)]
        assert not any(isinstance(event, Failed) for event in events[:-1])
        seen.append(str(events))
    assert seen[0] == seen[1]


@sized
@given(st.sampled_from(["connect", "list", "info"]), st.lists(st.binary(max_size=60), max_size=8), st.data())
def test_the_client_handshake_takes_any_bytes_in_any_pieces(aim: str, parts: list[bytes], data: st.DataObject) -> None:
    answer = struct.pack(">QIII", k.OPTION_REPLY_MAGIC, k.OPT_LIST if aim == "list" else 11, k.REP_ACK, 0)
    script = data.draw(st.sampled_from([b"", b"NBDMAGICIHAVEOPT\0\x03", b"NBDMAGICIHAVEOPT\0\0"]))
    script += data.draw(st.sampled_from([b"", answer])) + b"".join(parts)
    cuts = data.draw(st.lists(st.integers(0, 1 << 16), max_size=10))
    seen = []
    for pieces in ([script], cut(script, cuts)):
        client = {
            "connect": lambda: ClientHandshake.connect("disk", contexts=CONTEXTS),
            "list": ClientHandshake.list_exports,
            "info": ClientHandshake.info,
        }[aim]()
        seen.append(str([event for piece in pieces for event in client.receive(piece)]))
    assert seen[0] == seen[1]
