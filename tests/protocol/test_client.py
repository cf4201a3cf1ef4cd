from __future__ import annotations

import struct

import pytest

from nbdserve.errors import NbdserveError, OptionError, ProtocolError
from nbdserve.protocol import codec
from nbdserve.protocol import constants as k
from nbdserve.protocol.client import (
    MAX_OPTION_REPLY,
    ClientHandshake,
    Connected,
    Described,
    Failed,
    HandshakeEvent,
    Listed,
    Send,
)
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED, option_reply
from tests.protocol.model import SIZE, FakeExport, ModelServer, directory

GREETING = b"NBDMAGICIHAVEOPT\0\x03"
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"


def converse(client: ClientHandshake, server: ModelServer) -> HandshakeEvent:
    """Let them talk until the client has its outcome."""
    data = server.handshake.greeting()
    while data:
        answer = b""
        for event in client.receive(data):
            if not isinstance(event, Send):
                return event
            answer += server.receive(event.data)
        data = answer
    raise AssertionError(f"they fell silent: {server.closed}")


def scripted(client: ClientHandshake, *script: bytes) -> HandshakeEvent:
    """What becomes of ``client`` at a server that says ``script`` whatever it hears."""
    events = [event for data in script for event in client.receive(data)]
    return events[-1]


def error_of(event: HandshakeEvent) -> NbdserveError:
    assert isinstance(event, Failed)
    return event.error


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED])
def test_connect(mode: int) -> None:
    outcome = converse(ClientHandshake.connect("disk", contexts=[DEPTH, BASE, "x:y"], highest_mode=mode), ModelServer())
    assert isinstance(outcome, Connected)
    export = outcome.export
    assert (export.name, export.canonical_name, export.description) == ("disk", "disk", "a disk")
    assert (export.size, export.mode) == (SIZE, mode)
    assert (export.minimum_block, export.preferred_block, export.maximum_block) == (512, 4096, 32 << 20)
    assert export.contexts == (() if mode == SIMPLE else ((0, BASE), (1, DEPTH)))


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED])
def test_connect_by_export_name(mode: int) -> None:
    server = ModelServer()
    outcome = converse(ClientHandshake.connect("", contexts=[BASE], highest_mode=mode, use_go=False), server)
    assert isinstance(outcome, Connected)
    assert (outcome.export.size, outcome.export.mode) == (SIZE, mode)
    assert outcome.export.contexts == (() if mode == SIMPLE else ((0, BASE),))
    assert server.negotiated is not None
    assert server.negotiated.export.name == "disk"


def test_list_exports() -> None:
    server = ModelServer()
    assert converse(ClientHandshake.list_exports(), server) == Listed((("disk", "a disk"), ("other", "")))


def test_info() -> None:
    outcome = converse(ClientHandshake.info("disk"), ModelServer())
    assert isinstance(outcome, Described)
    assert [name for _, name in outcome.export.contexts] == [BASE, DEPTH, "qemu:dirty-bitmap:b0"]


def test_refusals_name_the_reason() -> None:
    error = error_of(converse(ClientHandshake.connect("absent"), ModelServer()))
    assert isinstance(error, OptionError)
    assert error.reply == k.REP_ERR_UNKNOWN
    assert "absent" in str(error)
    error = error_of(converse(ClientHandshake.connect("disk"), ModelServer(directory(FakeExport(full=True)))))
    assert isinstance(error, OptionError)
    assert error.reply == k.REP_ERR_POLICY


def test_a_server_without_go_structured_replies_and_no_zeroes() -> None:
    client = ClientHandshake.connect("disk", contexts=[BASE])
    (flags, extended) = client.receive(b"NBDMAGICIHAVEOPT\0\x01")
    assert flags == Send(b"\0\0\0\x01")
    assert extended == Send(codec.option_request(k.OPT_EXTENDED_HEADERS))
    for refused in (k.OPT_EXTENDED_HEADERS, k.OPT_STRUCTURED_REPLY):
        assert len(client.receive(option_reply(refused, k.REP_ERR_UNSUP))) == 1
    (sent,) = client.receive(option_reply(k.OPT_GO, k.REP_ERR_UNSUP))
    assert sent == Send(codec.option_request(k.OPT_EXPORT_NAME, b"disk"))
    (outcome,) = client.receive(struct.pack(">QH", 512, 3) + bytes(124) + b"rest")
    assert isinstance(outcome, Connected)
    assert (outcome.export.size, outcome.export.flags, outcome.export.mode) == (512, 3, SIMPLE)
    assert client.leftover == b"rest"


def test_a_server_that_is_not_fixed_newstyle() -> None:
    client = ClientHandshake.connect("disk")
    assert client.receive(b"NBDMAGICIHAVEOPT\0\0")[1] == Send(codec.option_request(k.OPT_EXPORT_NAME, b"disk"))
    assert isinstance(error_of(scripted(ClientHandshake.list_exports(), b"NBDMAGICIHAVEOPT\0\0")), ProtocolError)


ACK_GO = option_reply(k.OPT_GO, k.REP_ACK)


def info(kind: int, data: bytes) -> bytes:
    return option_reply(k.OPT_GO, k.REP_INFO, struct.pack(">H", kind) + data)


EXPORT = info(0, struct.pack(">QH", 512, 1))


@pytest.mark.parametrize(
    "script",
    [
        (b"NBDMAGICIHAVEOPX\0\x03",),
        (b"HTTP/1.1 400 Bad Request",),
        (b"NBDMAGIC" + struct.pack(">QQI", 0x00420281861253, 512, 0),),
        (GREETING, bytes(20)),
        (GREETING, option_reply(k.OPT_LIST, k.REP_ACK)),
        (GREETING, option_reply(k.OPT_GO, k.REP_SERVER, b"")),
        (GREETING, option_reply(k.OPT_GO, 0x7FFF)),
        (GREETING, struct.pack(">QIII", k.OPTION_REPLY_MAGIC, k.OPT_GO, k.REP_INFO, 0xFFFFFFFF)),
        (GREETING, struct.pack(">QIII", k.OPTION_REPLY_MAGIC, k.OPT_GO, k.REP_ERR_UNSUP, MAX_OPTION_REPLY + 1)),
        (GREETING, ACK_GO),
        (GREETING, info(0, b"") + ACK_GO),
        (GREETING, info(0, bytes(11)) + ACK_GO),
        (GREETING, option_reply(k.OPT_GO, k.REP_INFO, b"\0") + ACK_GO),
        (GREETING, info(0, struct.pack(">QH", 1 << 63, 1)) + ACK_GO),
        (GREETING, info(0, struct.pack(">QH", (1 << 64) - 1, 1)) + ACK_GO),
        (GREETING, EXPORT + info(1, b"\xff") + ACK_GO),
        (GREETING, EXPORT + info(1, b"x" * 4097) + ACK_GO),
        (GREETING, EXPORT + info(2, b"a\0b") + ACK_GO),
        (GREETING, EXPORT + info(3, bytes(11)) + ACK_GO),
        (GREETING, EXPORT + info(3, bytes(12)) + ACK_GO),
        (GREETING, EXPORT + info(3, struct.pack(">III", 3, 4096, 1 << 20)) + ACK_GO),
        (GREETING, EXPORT + info(3, struct.pack(">III", 1 << 17, 1 << 17, 1 << 20)) + ACK_GO),
        (GREETING, EXPORT + info(3, struct.pack(">III", 4096, 512, 1 << 20)) + ACK_GO),
        (GREETING, EXPORT + info(3, struct.pack(">III", 512, 4096, 256)) + ACK_GO),
    ],
)
def test_servers_that_break_the_protocol(script: tuple[bytes, ...]) -> None:
    assert isinstance(error_of(scripted(ClientHandshake.connect("disk", highest_mode=SIMPLE), *script)), ProtocolError)


def test_unknown_infos_are_passed_over() -> None:
    client = ClientHandshake.connect("disk", highest_mode=SIMPLE)
    outcome = scripted(client, GREETING, EXPORT + info(4711, b"anything") + ACK_GO)
    assert isinstance(outcome, Connected)


def contexts(*found: tuple[int, bytes]) -> bytes:
    answers = [
        option_reply(k.OPT_SET_META_CONTEXT, k.REP_META_CONTEXT, struct.pack(">I", number) + name)
        for number, name in found
    ]
    return b"".join(answers) + option_reply(k.OPT_SET_META_CONTEXT, k.REP_ACK)


def connect_with_contexts(answer: bytes) -> HandshakeEvent:
    client = ClientHandshake.connect("disk", contexts=[BASE, DEPTH], highest_mode=STRUCTURED)
    structured = option_reply(k.OPT_STRUCTURED_REPLY, k.REP_ACK)
    return scripted(client, GREETING, structured, answer, EXPORT + ACK_GO)


def test_a_context_answered_twice_is_one() -> None:
    outcome = connect_with_contexts(contexts((1, BASE.encode()), (1, BASE.encode())))
    assert isinstance(outcome, Connected)
    assert outcome.export.contexts == ((1, BASE),)


@pytest.mark.parametrize(
    "answer",
    [
        contexts((1, b"not:asked")),
        contexts((1, b"\xff")),
        contexts((1, BASE.encode()), (1, DEPTH.encode())),
        option_reply(k.OPT_SET_META_CONTEXT, k.REP_META_CONTEXT, b"\0\0"),
    ],
)
def test_contexts_that_break_the_protocol(answer: bytes) -> None:
    acknowledged = answer + option_reply(k.OPT_SET_META_CONTEXT, k.REP_ACK)
    assert isinstance(error_of(connect_with_contexts(acknowledged)), ProtocolError)


def test_contexts_are_done_without_when_unsupported() -> None:
    outcome = connect_with_contexts(option_reply(k.OPT_SET_META_CONTEXT, k.REP_ERR_UNSUP))
    assert isinstance(outcome, Connected)
    assert outcome.export.contexts == ()


@pytest.mark.parametrize(
    "entry", [b"", b"\0\0\0", b"\0\0\0\x05disk", b"\xff\xff\xff\xff", b"\0\0\0\x01\xff", b"\0\0\0\x01d\xff"]
)
def test_list_replies_that_break_the_protocol(entry: bytes) -> None:
    answer = option_reply(k.OPT_LIST, k.REP_SERVER, entry) + option_reply(k.OPT_LIST, k.REP_ACK)
    assert isinstance(error_of(scripted(ClientHandshake.list_exports(), GREETING, answer)), ProtocolError)


def test_an_endless_list_is_cut() -> None:
    client = ClientHandshake.list_exports()
    client.receive(GREETING)
    block = option_reply(k.OPT_LIST, k.REP_SERVER, b"\0\0\0\x01d") * 8192
    events = [event for _ in range(9) for event in client.receive(block)]
    assert isinstance(error_of(events[-1]), ProtocolError)
