from __future__ import annotations

import struct

import pytest

from nbdserve.errors import ProtocolError
from nbdserve.protocol import codec
from nbdserve.protocol import constants as k
from nbdserve.protocol.client import Failed
from nbdserve.protocol.client_transmission import ClientTransmission, Reply
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED

OFFSET, LENGTH = 4096, 1024
DONE = k.REPLY_FLAG_DONE


def reading(mode: int = STRUCTURED, flags: int = 0) -> ClientTransmission:
    """A client that waits for one READ, of cookie 1."""
    client = ClientTransmission(mode, [0, 5])
    assert client.request(k.CMD_READ, OFFSET, LENGTH, flags=flags)[0] == 1
    return client


def asking(mode: int = STRUCTURED, flags: int = 0) -> ClientTransmission:
    """A client that waits for one BLOCK_STATUS of contexts 0 and 5, of cookie 1."""
    client = ClientTransmission(mode, [0, 5])
    client.request(k.CMD_BLOCK_STATUS, OFFSET, LENGTH, flags=flags)
    return client


def data(start: int, length: int, flags: int = 0, mode: int = STRUCTURED) -> bytes:
    return codec.data_chunk_head(mode, flags, 1, OFFSET, start, length) + b"d" * length


def hole(start: int, length: int, flags: int = 0, mode: int = STRUCTURED) -> bytes:
    return codec.hole_chunk(mode, flags, 1, OFFSET, start, length)


def status(context: int, *extents: tuple[int, int], flags: int = 0, mode: int = STRUCTURED) -> bytes:
    return codec.block_status_chunk(mode, flags, 1, OFFSET, context, extents)


def none(mode: int = STRUCTURED) -> bytes:
    return codec.none_chunk(mode, 1, OFFSET)


def finished(client: ClientTransmission, answer: bytes) -> Reply:
    (event,) = client.receive(answer)
    assert isinstance(event, Reply)
    assert list(client.in_flight) == []
    return event


def broken(client: ClientTransmission, answer: bytes) -> bool:
    """``answer`` ends the session, and nothing comes after."""
    events = client.receive(answer)
    assert client.receive(none()) == []
    return bool(events) and isinstance(events[-1], Failed) and isinstance(events[-1].error, ProtocolError)


def test_a_buffer_of_the_caller_is_filled_holes_too() -> None:
    client = ClientTransmission(STRUCTURED)
    buffer = bytearray(b"?" * (LENGTH + 2))
    client.request(k.CMD_READ, OFFSET, LENGTH, into=memoryview(buffer)[1:-1])
    reply = finished(client, data(OFFSET + 24, LENGTH - 24) + hole(OFFSET, 24, DONE))
    assert buffer == b"?" + bytes(24) + b"d" * (LENGTH - 24) + b"?"
    assert reply.data == buffer[1:-1]


def test_requests() -> None:
    assert ClientTransmission(SIMPLE).request(k.CMD_WRITE, 5, 3, flags=1) == (
        1,
        bytes.fromhex("25609513 0001 0001 0000000000000001 0000000000000005 00000003"),
    )
    assert ClientTransmission(EXTENDED).request(k.CMD_WRITE, 5, 3) == (
        1,
        bytes.fromhex("21e41c71 0020 0001 0000000000000001 0000000000000005 0000000000000003"),
    )
    assert ClientTransmission(EXTENDED, [0, 1]).request(k.CMD_BLOCK_STATUS, 5, 1 << 40, only=[1]) == (
        1,
        bytes.fromhex(
            "21e41c71 0020 0007 0000000000000001 0000000000000005 000000000000000c 0000010000000000 00000001"
        ),
    )
    client = ClientTransmission(SIMPLE)
    assert client.disconnect()[6:8] == b"\0\x02"
    assert list(client.in_flight) == []


def test_simple_read() -> None:
    reply = finished(reading(SIMPLE), codec.simple_reply(1) + b"r" * LENGTH)
    assert (reply.error, bytes(reply.data)) == (0, b"r" * LENGTH)


def test_simple_error_has_no_data() -> None:
    assert finished(reading(SIMPLE), codec.simple_reply(1, k.NBD_EIO)).error == k.NBD_EIO
    assert finished(reading(SIMPLE), codec.simple_reply(1, 4711)).error == k.NBD_EINVAL


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_sparse_read_in_any_order(mode: int) -> None:
    answer = (
        hole(OFFSET + 512, 256, mode=mode)
        + data(OFFSET, 512, mode=mode)
        + data(OFFSET + 768, 256, mode=mode)
        + none(mode)
    )
    reply = finished(reading(mode), answer)
    assert reply.data == b"d" * 512 + bytes(256) + b"d" * 256


def test_replies_out_of_order() -> None:
    client = ClientTransmission(STRUCTURED)
    first, _ = client.request(k.CMD_FLUSH)
    second, _ = client.request(k.CMD_TRIM, 0, 512)
    events = client.receive(codec.none_chunk(STRUCTURED, second, 0) + codec.simple_reply(first))
    assert [event.cookie for event in events if isinstance(event, Reply)] == [second, first]


def test_error_chunks() -> None:
    reply = finished(reading(), codec.error_chunk(STRUCTURED, 1, OFFSET, k.NBD_EIO, "bad disk"))
    assert (reply.error, reply.message) == (k.NBD_EIO, "bad disk")
    head = codec.chunk_header(STRUCTURED, 0, k.REPLY_ERROR_OFFSET, 1, OFFSET, 16)
    at_offset = head + struct.pack(">IH2sQ", k.NBD_EIO, 2, b"no", OFFSET)
    assert finished(reading(), data(OFFSET, 512) + at_offset + none()).error == k.NBD_EIO
    unknown = codec.chunk_header(STRUCTURED, DONE, 0xFFFF, 1, OFFSET, 10) + struct.pack(">IHI", 4711, 0, 7)
    assert finished(reading(), unknown).error == k.NBD_EINVAL


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_block_status(mode: int) -> None:
    answer = status(5, (512, 1), (512, 2), mode=mode) + status(0, (4096, 3), flags=DONE, mode=mode)
    # the last extent may run over; it is cut
    assert finished(asking(mode), answer).extents == {5: [(512, 1), (512, 2)], 0: [(1024, 3)]}


def test_filtered_block_status() -> None:
    client = ClientTransmission(EXTENDED, [0, 5])
    client.request(k.CMD_BLOCK_STATUS, OFFSET, LENGTH, only=[5])
    assert finished(client, status(5, (LENGTH, 0), flags=DONE, mode=EXTENDED)).extents == {5: [(LENGTH, 0)]}


@pytest.mark.parametrize(
    "answer",
    [
        bytes(4),
        codec.none_chunk(EXTENDED, 1, OFFSET),
        codec.simple_reply(1),
        codec.simple_reply(2),
        codec.none_chunk(STRUCTURED, 2, OFFSET),
        none(),
        data(OFFSET, 512) + none(),
        data(OFFSET, LENGTH) + hole(OFFSET, 1),
        data(OFFSET, 512) + data(OFFSET + 511, 513),
        data(OFFSET - 1, 2),
        data(OFFSET, LENGTH + 1),
        data(1 << 63, 1),
        data(OFFSET, 0),
        hole(OFFSET, 0),
        hole(OFFSET + LENGTH, 1),
        hole((1 << 64) - 1, 2),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_OFFSET_DATA, 1, OFFSET, 0xFFFFFFFF) + struct.pack(">Q", OFFSET),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_OFFSET_DATA, 1, OFFSET, 7) + bytes(7),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_OFFSET_HOLE, 1, OFFSET, 13) + bytes(13),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_NONE, 1, OFFSET, 1) + bytes(1),
        codec.chunk_header(STRUCTURED, 0, k.REPLY_NONE, 1, OFFSET, 0),
        codec.chunk_header(STRUCTURED, DONE, 77, 1, OFFSET, 0),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_ERROR, 1, OFFSET, 5) + bytes(5),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_ERROR, 1, OFFSET, 0xFFFFFFFF),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_ERROR, 1, OFFSET, 6) + struct.pack(">IH", 5, 1),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_ERROR, 1, OFFSET, 7) + struct.pack(">IHB", 5, 0, 1),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_ERROR, 1, OFFSET, 6) + struct.pack(">IH", 0, 0),
        codec.chunk_header(STRUCTURED, DONE, k.REPLY_ERROR_OFFSET, 1, OFFSET, 6) + struct.pack(">IH", 5, 0),
        status(0, (LENGTH, 0), flags=DONE),
    ],
)
def test_answers_to_read_that_break_the_protocol(answer: bytes) -> None:
    assert broken(reading(), answer)


def test_df_forbids_pieces() -> None:
    assert broken(reading(flags=k.CMD_FLAG_DF), data(OFFSET, 512) + data(OFFSET + 512, 512) + none())
    assert finished(reading(flags=k.CMD_FLAG_DF), data(OFFSET, LENGTH, DONE)).error == 0


def test_extended_replies_only_and_with_the_right_offset() -> None:
    assert broken(reading(EXTENDED), none())
    assert broken(reading(EXTENDED), codec.simple_reply(1, k.NBD_EIO))
    assert broken(reading(EXTENDED), codec.error_chunk(EXTENDED, 1, OFFSET + 1, k.NBD_EIO))
    assert broken(reading(SIMPLE), none())


BOTH = (LENGTH, 0)


@pytest.mark.parametrize(
    "answer",
    [
        none(),
        codec.simple_reply(1),
        status(0, BOTH, flags=DONE),
        status(0, BOTH) + status(0, BOTH, flags=DONE),
        status(0, BOTH) + status(1, BOTH, flags=DONE),
        status(0, (0, 0), BOTH),
        status(0, BOTH, (1, 0)),
        status(0),
        codec.chunk_header(STRUCTURED, 0, k.REPLY_BLOCK_STATUS, 1, OFFSET, 13) + bytes(13),
        codec.chunk_header(STRUCTURED, 0, k.REPLY_BLOCK_STATUS, 1, OFFSET, 3) + bytes(3),
        codec.chunk_header(STRUCTURED, 0, k.REPLY_BLOCK_STATUS, 1, OFFSET, 0xFFFFFFFC),
        codec.chunk_header(STRUCTURED, 0, k.REPLY_BLOCK_STATUS_EXT, 1, OFFSET, 24) + bytes(24),
        data(OFFSET, LENGTH, DONE),
    ],
)
def test_answers_to_block_status_that_break_the_protocol(answer: bytes) -> None:
    assert broken(asking(), answer)


def test_extended_extents_are_as_many_as_they_say() -> None:
    head = codec.chunk_header(EXTENDED, 0, k.REPLY_BLOCK_STATUS_EXT, 1, OFFSET, 24)
    assert broken(asking(EXTENDED), head + struct.pack(">IIQQ", 0, 2, LENGTH, 0))


def test_req_one_is_one_extent_inside_the_request() -> None:
    assert broken(asking(flags=k.CMD_FLAG_REQ_ONE), status(0, (512, 0), (512, 1)))
    assert broken(asking(flags=k.CMD_FLAG_REQ_ONE), status(0, (LENGTH + 1, 0)))
    reply = finished(asking(flags=k.CMD_FLAG_REQ_ONE), status(0, (512, 0)) + status(5, BOTH, flags=DONE))
    assert reply.extents == {0: [(512, 0)], 5: [BOTH]}
