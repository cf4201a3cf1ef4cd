"""The server handshake against a model of the specification, and against bytes of any kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nbdserve.protocol import constants as k
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED
from nbdserve.protocol.handshake import Close, HandshakeEvent, Negotiated, Send, ServerHandshake, StartTls, Tls
from tests.property.sizes import sized
from tests.protocol.model import directory, info_data, meta_data, option, replies

CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0")
NAMES = ("disk", "other", "", "absent")
KNOWN = ("disk", "other", "")

Step = tuple[int, str, tuple[str, ...], bytes]
"""Option, export name, queries, trailing garbage."""

steps = st.tuples(
    st.sampled_from([*range(13), 99]),
    st.sampled_from(NAMES),
    st.lists(st.sampled_from((*CONTEXTS, "base:", "qemu:", "x:y", "junk")), max_size=3).map(tuple),
    st.sampled_from([b"", b"", b"", b"x"]),
)


def encode(step: Step) -> bytes:
    number, name, queries, garbage = step
    if number in (k.OPT_INFO, k.OPT_GO):
        return option(number, info_data(name) + garbage)
    if number in (k.OPT_LIST_META_CONTEXT, k.OPT_SET_META_CONTEXT):
        return option(number, meta_data(name, *queries) + garbage)
    return option(number, name.encode() if number == k.OPT_EXPORT_NAME else garbage)


@dataclass
class Model:
    """What the specification says happens, one option at a time."""

    tls: Tls
    secure: bool = False
    mode: int = SIMPLE
    contexts: tuple[str, ...] = ()
    contexts_of: str | None = None
    end: str | None = None
    outcome: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    def take(self, step: Step) -> int | None:
        """The kind of the last reply; None when the connection ends without one, or EXPORT_NAME succeeds."""
        number, name, queries, garbage = step
        if self.tls is Tls.REQUIRED and not self.secure and number not in (k.OPT_ABORT, k.OPT_STARTTLS):
            if number != k.OPT_EXPORT_NAME:
                return k.REP_ERR_TLS_REQD
            self.end = "closed"
            return None
        match number:
            case k.OPT_ABORT:
                self.end = "abort"
                return k.REP_ACK
            case k.OPT_EXPORT_NAME:
                if self.mode != EXTENDED and name in KNOWN:
                    return self.enter(name, None)
                self.end = "closed"
                return None
            case k.OPT_STARTTLS if self.tls is not Tls.OFF:
                if self.secure or garbage:
                    return k.REP_ERR_INVALID
                self.secure, self.mode, self.contexts, self.contexts_of = True, SIMPLE, (), None
                return k.REP_ACK
            case k.OPT_LIST:
                return k.REP_ERR_INVALID if garbage else k.REP_ACK
            case k.OPT_STRUCTURED_REPLY:
                if garbage:
                    return k.REP_ERR_INVALID
                if self.mode == EXTENDED:
                    return k.REP_ERR_EXT_HEADER_REQD
                self.mode = STRUCTURED
                return k.REP_ACK
            case k.OPT_EXTENDED_HEADERS:
                if garbage or self.mode == EXTENDED:
                    return k.REP_ERR_INVALID
                self.mode = EXTENDED
                return k.REP_ACK
            case k.OPT_INFO | k.OPT_GO | k.OPT_LIST_META_CONTEXT | k.OPT_SET_META_CONTEXT:
                return self.about_an_export(number, name, queries, garbage)
        return k.REP_ERR_UNSUP

    def about_an_export(self, number: int, name: str, queries: tuple[str, ...], garbage: bytes) -> int | None:
        if number == k.OPT_SET_META_CONTEXT:
            self.contexts, self.contexts_of = (), None
            if self.mode == SIMPLE:
                return k.REP_ERR_INVALID
        if garbage:
            return k.REP_ERR_INVALID
        if name not in KNOWN:
            return k.REP_ERR_UNKNOWN
        if number == k.OPT_SET_META_CONTEXT:
            self.contexts, self.contexts_of = tuple(c for c in CONTEXTS if c in queries), name
        return self.enter(name, k.REP_ACK) if number == k.OPT_GO else k.REP_ACK

    def enter(self, name: str, reply: int | None) -> int | None:
        self.end = "negotiated"
        self.outcome = [(self.mode, self.contexts if name == self.contexts_of else ())]
        return reply


def server(tls: Tls) -> ServerHandshake:
    return ServerHandshake(directory(), tls=tls)


@sized
@given(st.sampled_from(Tls), st.lists(steps, max_size=70))
def test_any_order_of_options(tls: Tls, order: list[Step]) -> None:
    handshake, model = server(tls), Model(tls)
    assert handshake.receive(b"\0\0\0\x03") == []
    for count, step in enumerate(order):
        events = handshake.receive(encode(step))
        if count == 64:
            assert isinstance(events[-1], Close)
            return
        expected = model.take(step)
        sent = [event for event in events if isinstance(event, Send)]
        if expected is not None:
            assert len(sent) == 1
            found = replies(sent[0].data)
            assert {number for number, _, _ in found} == {step[0]}
            assert found[-1][1] == expected
        if any(isinstance(event, StartTls) for event in events):
            handshake.secured()
        last = events[-1]
        if model.end == "negotiated":
            assert isinstance(last, Negotiated)
            assert [(last.mode, tuple(name for _, name in last.contexts))] == model.outcome
        assert isinstance(last, Close) == (model.end in ("abort", "closed"))
        assert isinstance(last, Negotiated) == (model.end == "negotiated")
        if model.end is not None:
            return


def play(tls: Tls, parts: list[bytes]) -> tuple[list[HandshakeEvent], bytes]:
    handshake = server(tls)
    events = [event for part in parts for event in handshake.receive(part)]
    return events, handshake.leftover


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


hostile = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.integers(0, 12), st.binary(max_size=60)).map(lambda pair: option(*pair)),
    steps.map(encode),
)


@sized
@given(st.sampled_from(Tls), st.lists(hostile, max_size=12), st.lists(st.integers(0, 1 << 16), max_size=20))
def test_any_bytes_in_any_pieces_are_the_same_events(tls: Tls, parts: list[bytes], places: list[int]) -> None:
    data = b"\0\0\0\x03" + b"".join(parts)
    whole = play(tls, [data])
    assert [event for event in whole[0][:-1] if isinstance(event, Close | Negotiated)] == []
    shown = str(whole)
    assert str(play(tls, cut(data, places))) == shown
    assert str(play(tls, [data[i : i + 1] for i in range(len(data))])) == shown
