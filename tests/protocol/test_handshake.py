from __future__ import annotations

import struct

import pytest

from nbdserve.protocol import constants as k
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED
from nbdserve.protocol.handshake import (
    MAX_DRAINED_OPTION,
    MAX_OPTION_DATA,
    MAX_OPTIONS,
    Close,
    HandshakeEvent,
    Negotiated,
    Send,
    ServerHandshake,
    StartTls,
    Tls,
)
from tests.protocol.model import ALL_FLAGS, SIZE, FakeExport, directory, info_data, meta_data, option, replies

FIXED = b"\0\0\0\x03"
BASE, DEPTH, BITMAP = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"


class Talk:
    """A client that has sent its flags."""

    def __init__(self, handshake: ServerHandshake | None = None, flags: bytes = FIXED) -> None:
        self.handshake = handshake or ServerHandshake(directory())
        assert self.handshake.receive(flags) == []

    def events(self, number: int, data: bytes = b"") -> list[HandshakeEvent]:
        return self.handshake.receive(option(number, data))

    def ask(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Kind and data of the replies to one option that does not end the handshake."""
        (event,) = self.events(number, data)
        assert isinstance(event, Send)
        answers = replies(event.data)
        assert {answered for answered, _, _ in answers} == {number}
        return [(kind, body) for _, kind, body in answers]

    def kinds(self, number: int, data: bytes = b"") -> list[int]:
        return [kind for kind, _ in self.ask(number, data)]

    def go(self, name: str, *infos: int) -> Negotiated:
        *_, last = self.events(k.OPT_GO, info_data(name, *infos))
        assert isinstance(last, Negotiated)
        return last

    def is_alive(self) -> bool:
        return self.kinds(k.OPT_LIST)[-1] == k.REP_ACK


def test_greeting() -> None:
    assert ServerHandshake(directory()).greeting() == b"NBDMAGICIHAVEOPT\0\x03"


@pytest.mark.parametrize("flags", [4, 7, 0x80000000, 0x10003, 0xFFFFFFFF])
def test_unknown_client_flags_close(flags: int) -> None:
    (event,) = ServerHandshake(directory()).receive(struct.pack(">I", flags))
    assert isinstance(event, Close)
    assert event.violation


def test_bad_option_magic_closes() -> None:
    (event,) = Talk().handshake.receive(b"IHAVEOPX" + bytes(8))
    assert isinstance(event, Close)


# --- EXPORT_NAME -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", range(4))
def test_export_name(flags: int) -> None:
    handshake = ServerHandshake(directory())
    sent, negotiated = handshake.receive(struct.pack(">I", flags) + option(k.OPT_EXPORT_NAME, b"disk") + b"request")
    assert isinstance(sent, Send)
    assert sent.data == struct.pack(">QH", SIZE, ALL_FLAGS) + (b"" if flags & 2 else bytes(124))
    assert isinstance(negotiated, Negotiated)
    assert (negotiated.export.name, negotiated.mode, negotiated.contexts) == ("disk", SIMPLE, ())
    assert (negotiated.flags, negotiated.block_size_requested) == (ALL_FLAGS, False)
    assert handshake.leftover == b"request"


@pytest.mark.parametrize("name", [b"unknown", b"a\0b", b"\xff", b"x" * 4097, b"x" * (MAX_OPTION_DATA + 1)])
def test_export_name_that_cannot_be_served_closes(name: bytes) -> None:
    (event,) = Talk().events(k.OPT_EXPORT_NAME, name)
    assert isinstance(event, Close)


def test_export_name_under_structured_replies_offers_df() -> None:
    talk = Talk()
    assert talk.kinds(k.OPT_STRUCTURED_REPLY) == [k.REP_ACK]
    talk.ask(k.OPT_SET_META_CONTEXT, meta_data("disk", BASE))
    _, negotiated = talk.events(k.OPT_EXPORT_NAME, b"disk")
    assert isinstance(negotiated, Negotiated)
    assert negotiated.flags == ALL_FLAGS | k.EXPORT_SEND_DF
    assert (negotiated.mode, negotiated.contexts) == (STRUCTURED, ((0, BASE),))


def test_export_name_under_extended_headers_closes() -> None:
    talk = Talk()
    assert talk.kinds(k.OPT_EXTENDED_HEADERS) == [k.REP_ACK]
    (event,) = talk.events(k.OPT_EXPORT_NAME, b"disk")
    assert isinstance(event, Close)


@pytest.mark.parametrize("number", [number for number in range(13) if number != k.OPT_EXPORT_NAME])
def test_a_client_that_is_not_fixed_newstyle_has_only_export_name(number: int) -> None:
    (event,) = Talk(flags=b"\0\0\0\x02").events(number)
    assert isinstance(event, Close)


# --- ABORT, LIST, unknown options ------------------------------------------------------------------------------------
@pytest.mark.parametrize("data", [b"", b"ignored"])
def test_abort_is_acknowledged(data: bytes) -> None:
    sent, close = Talk().events(k.OPT_ABORT, data)
    assert isinstance(sent, Send)
    assert replies(sent.data) == [(k.OPT_ABORT, k.REP_ACK, b"")]
    assert close == Close("the client aborted the handshake", violation=False)


def test_list() -> None:
    talk = Talk()
    assert talk.ask(k.OPT_LIST) == [
        (k.REP_SERVER, b"\0\0\0\x04diska disk"),
        (k.REP_SERVER, b"\0\0\0\x05other"),
        (k.REP_ACK, b""),
    ]
    assert talk.kinds(k.OPT_LIST, b"x") == [k.REP_ERR_INVALID]
    assert talk.is_alive()


@pytest.mark.parametrize("number", [0, k.OPT_PEEK_EXPORT, k.OPT_STARTTLS, 12, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"data"])
def test_unsupported_options(number: int, data: bytes) -> None:
    talk = Talk()
    assert talk.kinds(number, data) == [k.REP_ERR_UNSUP]
    assert talk.is_alive()


# --- INFO and GO -----------------------------------------------------------------------------------------------------
EXPORT_INFO = struct.pack(">HQH", k.INFO_EXPORT, SIZE, ALL_FLAGS)


def test_info_unasked() -> None:
    talk = Talk()
    assert talk.ask(k.OPT_INFO, info_data("disk")) == [
        (k.REP_INFO, EXPORT_INFO),
        (k.REP_INFO, struct.pack(">HIII", k.INFO_BLOCK_SIZE, 1, 4096, 32 << 20)),
        (k.REP_ACK, b""),
    ]
    assert talk.is_alive()


def test_info_with_everything_asked() -> None:
    asked = (k.INFO_BLOCK_SIZE, k.INFO_NAME, k.INFO_DESCRIPTION, k.INFO_EXPORT, 77, k.INFO_NAME)
    assert Talk().ask(k.OPT_INFO, info_data("", *asked)) == [
        (k.REP_INFO, EXPORT_INFO),
        (k.REP_INFO, b"\0\x01disk"),
        (k.REP_INFO, b"\0\x02a disk"),
        (k.REP_INFO, struct.pack(">HIII", k.INFO_BLOCK_SIZE, 512, 4096, 32 << 20)),
        (k.REP_ACK, b""),
    ]


def test_an_absent_description_is_not_sent() -> None:
    asked = Talk().ask(k.OPT_INFO, info_data("other", k.INFO_DESCRIPTION))
    assert [body[:2] for _, body in asked] == [b"\0\0", b"\0\x03", b""]


def test_go() -> None:
    talk = Talk()
    sent, negotiated = talk.handshake.receive(option(k.OPT_GO, info_data("disk", k.INFO_BLOCK_SIZE)) + b"next")
    assert isinstance(sent, Send)
    assert [kind for _, kind, _ in replies(sent.data)] == [k.REP_INFO, k.REP_INFO, k.REP_ACK]
    assert isinstance(negotiated, Negotiated)
    assert negotiated.block_size_requested
    assert talk.handshake.leftover == b"next"
    assert not Talk().go("disk").block_size_requested


@pytest.mark.parametrize("number", [k.OPT_INFO, k.OPT_GO])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (info_data("unknown"), k.REP_ERR_UNKNOWN),
        (info_data("x" * 255), k.REP_ERR_UNKNOWN),
        (info_data("x" * 256), k.REP_ERR_UNKNOWN),
        (info_data("x" * 257), k.REP_ERR_UNKNOWN),
        (info_data("x" * 4095), k.REP_ERR_UNKNOWN),
        (info_data("x" * 4096), k.REP_ERR_UNKNOWN),
        (info_data("x" * 4097), k.REP_ERR_INVALID),
        (info_data("a\0b"), k.REP_ERR_INVALID),
        (b"\0\0\0\x01\xff\0\0", k.REP_ERR_INVALID),
        (b"", k.REP_ERR_INVALID),
        (b"\xff\xff\xff\xffdisk\0\0", k.REP_ERR_INVALID),
        (b"\0\0\0\x05disk\0\0", k.REP_ERR_INVALID),
        (b"\0\0\0\x03disk\0\0", k.REP_ERR_INVALID),
        (info_data("disk") + b"x", k.REP_ERR_INVALID),
        (info_data("disk")[:-1], k.REP_ERR_INVALID),
        (info_data("disk", 3)[:-1], k.REP_ERR_INVALID),
    ],
)
def test_bad_info_and_go_leave_the_next_option_working(number: int, data: bytes, kind: int) -> None:
    talk = Talk()
    assert talk.kinds(number, data) == [kind]
    assert talk.is_alive()
    talk.go("disk")


def test_an_export_that_admits_no_more_clients() -> None:
    full = FakeExport(full=True)
    talk = Talk(ServerHandshake(directory(full)))
    assert talk.kinds(k.OPT_INFO, info_data("disk"))[-1] == k.REP_ACK
    assert talk.kinds(k.OPT_GO, info_data("disk")) == [k.REP_ERR_POLICY]
    full.full = False
    talk.go("disk")
    assert full.admitted == 1


def test_no_default_export() -> None:
    empty = directory()
    empty.exports.clear()
    talk = Talk(ServerHandshake(empty))
    assert talk.kinds(k.OPT_GO, info_data("")) == [k.REP_ERR_UNKNOWN]
    assert talk.kinds(k.OPT_LIST) == [k.REP_ACK]


def test_shutting_down_refuses_all_but_abort() -> None:
    talk = Talk(ServerHandshake(directory(), shutting_down=lambda: True))
    for number in (k.OPT_LIST, k.OPT_INFO, k.OPT_GO, k.OPT_STRUCTURED_REPLY, 99):
        assert talk.kinds(number) == [k.REP_ERR_SHUTDOWN]
    assert len(talk.events(k.OPT_ABORT)) == 2


# --- reply modes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [k.OPT_STRUCTURED_REPLY, k.OPT_EXTENDED_HEADERS])
def test_modes_take_no_data(number: int) -> None:
    talk = Talk()
    assert talk.kinds(number, b"x") == [k.REP_ERR_INVALID]
    assert talk.go("disk").mode == SIMPLE


def test_order_of_modes() -> None:
    talk = Talk()
    assert talk.kinds(k.OPT_STRUCTURED_REPLY) == [k.REP_ACK]
    assert talk.kinds(k.OPT_STRUCTURED_REPLY) == [k.REP_ACK]
    assert talk.kinds(k.OPT_EXTENDED_HEADERS) == [k.REP_ACK]
    assert talk.kinds(k.OPT_EXTENDED_HEADERS) == [k.REP_ERR_INVALID]
    assert talk.kinds(k.OPT_STRUCTURED_REPLY) == [k.REP_ERR_EXT_HEADER_REQD]
    assert talk.go("disk").mode == EXTENDED


def test_flags_that_depend_on_the_mode() -> None:
    def flags(*setup: tuple[int, bytes]) -> int:
        talk = Talk()
        for number, data in setup:
            assert talk.kinds(number, data)[-1] == k.REP_ACK
        return talk.go("disk").flags & ~ALL_FLAGS

    structured, extended = (k.OPT_STRUCTURED_REPLY, b""), (k.OPT_EXTENDED_HEADERS, b"")
    context = (k.OPT_SET_META_CONTEXT, meta_data("disk", BASE))
    assert flags() == 0
    assert flags(structured) == k.EXPORT_SEND_DF
    assert flags(structured, context) == k.EXPORT_SEND_DF
    assert flags(extended) == k.EXPORT_SEND_DF
    assert flags(extended, context) == k.EXPORT_SEND_DF | k.EXPORT_BLOCK_STATUS_PAYLOAD


# --- metadata contexts -----------------------------------------------------------------------------------------------
def structured() -> Talk:
    talk = Talk()
    assert talk.kinds(k.OPT_STRUCTURED_REPLY) == [k.REP_ACK]
    return talk


def test_list_meta_context() -> None:
    assert Talk().ask(k.OPT_LIST_META_CONTEXT, meta_data("disk", "qemu:", "qemu:")) == [
        (k.REP_META_CONTEXT, bytes(4) + DEPTH.encode()),
        (k.REP_META_CONTEXT, bytes(4) + BITMAP.encode()),
        (k.REP_ACK, b""),
    ]


def test_set_meta_context() -> None:
    talk = structured()
    assert talk.ask(k.OPT_SET_META_CONTEXT, meta_data("disk", BITMAP, "x:y", BASE, BASE, "qemu:", "nonsense")) == [
        (k.REP_META_CONTEXT, b"\0\0\0\0" + BASE.encode()),
        (k.REP_META_CONTEXT, b"\0\0\0\x02" + BITMAP.encode()),
        (k.REP_ACK, b""),
    ]
    assert talk.go("disk").contexts == ((0, BASE), (2, BITMAP))


def test_set_needs_structured_replies_and_list_does_not() -> None:
    talk = Talk()
    assert talk.kinds(k.OPT_SET_META_CONTEXT, meta_data("disk", BASE)) == [k.REP_ERR_INVALID]
    assert talk.kinds(k.OPT_LIST_META_CONTEXT, meta_data("disk"))[-1] == k.REP_ACK


@pytest.mark.parametrize("number", [k.OPT_LIST_META_CONTEXT, k.OPT_SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (meta_data("unknown", BASE), k.REP_ERR_UNKNOWN),
        (meta_data("x" * 4097, BASE), k.REP_ERR_INVALID),
        (meta_data("disk", "x" * 4097), k.REP_ERR_INVALID),
        (meta_data("disk", BASE) + b"x", k.REP_ERR_INVALID),
        (meta_data("disk", BASE)[:-1], k.REP_ERR_INVALID),
        (b"\xff\xff\xff\xff", k.REP_ERR_INVALID),
        (b"\0\0\0\x04disk\xff\xff\xff\xff", k.REP_ERR_INVALID),
        (b"\0\0\0\x04disk\0\0\0\x01\xff\xff\xff\xff", k.REP_ERR_INVALID),
        (b"", k.REP_ERR_INVALID),
    ],
)
def test_bad_meta_requests(number: int, data: bytes, kind: int) -> None:
    talk = structured()
    assert talk.kinds(k.OPT_SET_META_CONTEXT, meta_data("disk", BASE))[-1] == k.REP_ACK
    assert talk.kinds(number, data) == [kind]
    # a SET that fails still ends the selection before it
    assert talk.go("disk").contexts == (() if number == k.OPT_SET_META_CONTEXT else ((0, BASE),))


def test_contexts_are_those_of_the_last_set() -> None:
    talk = structured()
    talk.ask(k.OPT_SET_META_CONTEXT, meta_data("disk", BASE))
    talk.ask(k.OPT_SET_META_CONTEXT, meta_data("disk", DEPTH))
    talk.ask(k.OPT_LIST_META_CONTEXT, meta_data("disk"))
    assert talk.go("disk").contexts == ((1, DEPTH),)


def test_set_without_queries_selects_none() -> None:
    talk = structured()
    talk.ask(k.OPT_SET_META_CONTEXT, meta_data("disk", BASE))
    assert talk.kinds(k.OPT_SET_META_CONTEXT, meta_data("disk")) == [k.REP_ACK]
    assert talk.go("disk").contexts == ()


def test_contexts_die_when_go_names_another_export() -> None:
    for name in ("other", ""):
        talk = Talk()
        assert talk.kinds(k.OPT_EXTENDED_HEADERS) == [k.REP_ACK]
        talk.ask(k.OPT_SET_META_CONTEXT, meta_data("disk", BASE))
        negotiated = talk.go(name)
        assert negotiated.contexts == ()
        assert not negotiated.flags & k.EXPORT_BLOCK_STATUS_PAYLOAD


def test_info_on_another_export_does_not_touch_them() -> None:
    talk = structured()
    talk.ask(k.OPT_SET_META_CONTEXT, meta_data("disk", BASE))
    talk.ask(k.OPT_INFO, info_data("other"))
    assert talk.go("disk").contexts == ((0, BASE),)


# --- limits ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [k.OPT_LIST, k.OPT_GO, k.OPT_SET_META_CONTEXT, k.OPT_ABORT, 99])
@pytest.mark.parametrize("length", [MAX_OPTION_DATA + 1, MAX_DRAINED_OPTION])
def test_a_long_option_is_drained_and_refused(number: int, length: int) -> None:
    talk = Talk()
    assert talk.kinds(number, bytes(length)) == [k.REP_ERR_TOO_BIG]
    assert talk.is_alive()


@pytest.mark.parametrize("length", [MAX_DRAINED_OPTION + 1, 33 << 20, 1 << 30, 0xFFFFFFFF])
def test_a_longer_one_closes_before_its_data(length: int) -> None:
    (event,) = Talk().handshake.receive(struct.pack(">QII", k.IHAVEOPT, k.OPT_GO, length))
    assert isinstance(event, Close)


def test_the_longest_option_kept() -> None:
    assert Talk().kinds(99, bytes(MAX_OPTION_DATA)) == [k.REP_ERR_UNSUP]


def test_the_number_of_options_is_bounded() -> None:
    talk = Talk()
    for _ in range(MAX_OPTIONS):
        assert talk.kinds(99) == [k.REP_ERR_UNSUP]
    (event,) = talk.events(99)
    assert isinstance(event, Close)


def test_nothing_happens_after_the_end() -> None:
    talk = Talk()
    talk.events(k.OPT_ABORT)
    assert talk.events(k.OPT_LIST) == []


# --- TLS -------------------------------------------------------------------------------------------------------------
def tls(policy: Tls) -> Talk:
    return Talk(ServerHandshake(directory(), tls=policy))


@pytest.mark.parametrize("policy", [Tls.ON, Tls.REQUIRED])
def test_starttls_starts_a_fresh_negotiation(policy: Tls) -> None:
    talk = tls(policy)
    if policy is Tls.ON:
        assert talk.kinds(k.OPT_STRUCTURED_REPLY) == [k.REP_ACK]
        assert talk.kinds(k.OPT_SET_META_CONTEXT, meta_data("disk", BASE))[-1] == k.REP_ACK
    sent, start = talk.events(k.OPT_STARTTLS)
    assert isinstance(sent, Send)
    assert replies(sent.data) == [(k.OPT_STARTTLS, k.REP_ACK, b"")]
    assert start == StartTls()
    talk.handshake.secured()
    assert talk.kinds(k.OPT_STARTTLS) == [k.REP_ERR_INVALID]
    negotiated = talk.go("disk")
    assert (negotiated.mode, negotiated.contexts) == (SIMPLE, ())


def test_plaintext_behind_starttls_closes() -> None:
    talk = tls(Tls.ON)
    sent, start, close = talk.handshake.receive(option(k.OPT_STARTTLS) + option(k.OPT_LIST))
    assert isinstance(sent, Send)
    assert isinstance(start, StartTls)
    assert isinstance(close, Close)

    talk = tls(Tls.ON)
    assert len(talk.events(k.OPT_STARTTLS)) == 2
    (close,) = talk.handshake.receive(b"\x16")
    assert isinstance(close, Close)
    with pytest.raises(RuntimeError):
        talk.handshake.secured()


def test_starttls_takes_no_data() -> None:
    talk = tls(Tls.ON)
    assert talk.kinds(k.OPT_STARTTLS, b"x") == [k.REP_ERR_INVALID]
    assert talk.is_alive()


@pytest.mark.parametrize(
    "number", [number for number in range(2, 13) if number not in (k.OPT_ABORT, k.OPT_STARTTLS)] + [99]
)
def test_forced_tls_refuses_everything_else(number: int) -> None:
    assert tls(Tls.REQUIRED).kinds(number) == [k.REP_ERR_TLS_REQD]


def test_forced_tls_closes_on_export_name_and_acknowledges_abort() -> None:
    (event,) = tls(Tls.REQUIRED).events(k.OPT_EXPORT_NAME, b"disk")
    assert isinstance(event, Close)
    assert len(tls(Tls.REQUIRED).events(k.OPT_ABORT)) == 2


def test_offered_tls_is_not_forced() -> None:
    assert tls(Tls.ON).go("disk").mode == SIMPLE
