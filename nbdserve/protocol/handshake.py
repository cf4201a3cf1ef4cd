"""The handshake, server role, sans-IO (spec, "Session start" and "Fixed newstyle negotiation").

A table says which handler answers which option in which state. Handlers raise OptionError for what is refused with a
reply and ProtocolError for what ends the connection; nothing else leaves a handler, whatever bytes arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol

from nbdserve.errors import OptionError, ProtocolError
from nbdserve.protocol import codec
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED, Malformed, option_reply
from nbdserve.protocol.constants import (
    EXPORT_BLOCK_STATUS_PAYLOAD,
    EXPORT_SEND_DF,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_NAME,
    NBDMAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION_NAMES,
    REP_ACK,
    REP_ERR_EXT_HEADER_REQD,
    REP_ERR_INVALID,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
)
from nbdserve.protocol.meta_contexts import Context, list_contexts, select_contexts
from nbdserve.protocol.reader import Parser, Reader, pieces

MAX_OPTION_DATA: Final = 256 << 10
"""Longest option data kept, in bytes; what is longer is drained and refused."""
MAX_DRAINED_OPTION: Final = 1 << 20
"""Longest option data drained, in bytes; what is longer ends the connection."""
MAX_OPTIONS: Final = 64
"""Most options of one connection; a client needs fewer than ten."""

_NO_ZEROES_TAIL: Final = bytes(124)


class ExportView(Protocol):
    """What the handshake asks of an export. Sizes are bytes."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def flags(self) -> int:
        """Transmission flags, without DF and BLOCK_STATUS_PAYLOAD, which depend on the reply mode."""
        ...

    @property
    def minimum_block(self) -> int: ...
    @property
    def preferred_block(self) -> int: ...
    @property
    def maximum_block(self) -> int: ...
    @property
    def contexts(self) -> Sequence[str]: ...
    def admit(self) -> None:
        """Let one more client in.

        Raises:
            OptionError: not now.
        """


class ExportDirectory(Protocol):
    """The exports a client can see; the empty name stands for the default one."""

    def list(self) -> Iterable[tuple[str, str]]: ...
    def find(self, name: str) -> ExportView | None: ...


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes for the client: all replies to one option."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StartTls:
    """The acknowledgement of STARTTLS was the last plaintext; ``secured`` is called when TLS stands."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The handshake is over: ``leftover`` is the beginning of the transmission phase."""

    export: ExportView
    mode: int
    """SIMPLE, STRUCTURED or EXTENDED replies."""
    contexts: tuple[Context, ...]
    flags: int
    """The transmission flags that were sent."""
    block_size_requested: bool
    """The client asked for the block sizes, so it keeps to the minimum."""


@dataclass(frozen=True, slots=True)
class Close:
    """The connection ends; ``violation`` tells a broken protocol from a client that took its leave."""

    reason: str
    violation: bool = True


HandshakeEvent = Send | StartTls | Negotiated | Close


class Tls(Enum):
    """Whether the server speaks TLS (spec, "TLS versions": NOTLS, SELECTIVETLS without TLS-only exports, FORCEDTLS)."""

    OFF = "off"
    ON = "on"
    REQUIRED = "require"


class State(Enum):
    """Which options may follow."""

    NON_FIXED = "the client knows only EXPORT_NAME"
    PLAIN = "no TLS to be had"
    TLS_OFFERED = "plaintext, STARTTLS possible"
    TLS_REQUIRED = "plaintext, nothing but STARTTLS"
    TLS_STARTING = "waiting for TLS"
    SECURE = "in TLS"
    ENDED = "no options any more"


_FIRST_STATE: Final = {Tls.OFF: State.PLAIN, Tls.ON: State.TLS_OFFERED, Tls.REQUIRED: State.TLS_REQUIRED}


class _Negotiation:
    """What options have settled so far; begun afresh when TLS starts, so nothing said in plaintext is left."""

    __slots__ = ("contexts", "contexts_of", "mode")

    def __init__(self) -> None:
        self.mode = SIMPLE
        self.contexts: tuple[Context, ...] = ()
        self.contexts_of: str | None = None

    def contexts_for(self, name: str) -> tuple[Context, ...]:
        """Contexts belong to the export name they were selected for."""
        return self.contexts if name == self.contexts_of else ()

    def flags_for(self, export: ExportView, name: str) -> int:
        """The transmission flags of ``export`` under what is settled."""
        flags = export.flags
        if self.mode >= STRUCTURED:
            flags |= EXPORT_SEND_DF
        if self.mode == EXTENDED and self.contexts_for(name):
            flags |= EXPORT_BLOCK_STATUS_PAYLOAD
        return flags


class ServerHandshake:
    """One handshake. Feed ``receive`` until it returns Negotiated or Close, which is always the last event.

    ``receive`` never raises for what the client sends, and returns the same events however the bytes are cut.
    """

    def __init__(
        self,
        directory: ExportDirectory,
        *,
        shutting_down: Callable[[], bool] = lambda: False,
        tls: Tls = Tls.OFF,
    ) -> None:
        self._directory = directory
        self._shutting_down = shutting_down
        self._tls = tls
        self._state = _FIRST_STATE[tls]
        self._negotiation = _Negotiation()
        self._zeroes = True
        self._options = 0
        self._events: list[HandshakeEvent] = []
        self._reader = Reader(self._plaintext())

    @property
    def leftover(self) -> bytes:
        """What followed the last byte of the handshake."""
        return self._reader.leftover

    def greeting(self) -> bytes:
        """The server's first bytes."""
        return codec.GREETING.pack(NBDMAGIC, IHAVEOPT, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)

    def receive(self, data: bytes | memoryview) -> list[HandshakeEvent]:
        """What to do about ``data``, in order."""
        self._reader.feed(data)
        if self._reader.error is not None and self._state is not State.ENDED:
            self._end(Close(str(self._reader.error)))
        elif self._state is State.TLS_STARTING and self._reader.leftover:
            # bytes behind STARTTLS would be read as if they had come through TLS (CVE-2021-3716's class)
            self._end(Close("plaintext after STARTTLS"))
        events, self._events = self._events, []
        return events

    def secured(self) -> None:
        """TLS stands: what was negotiated in plaintext is forgotten, and options are read anew."""
        if self._state is not State.TLS_STARTING:
            raise RuntimeError(f"TLS cannot have started: {self._state.value}")
        self._state = State.SECURE
        self._negotiation = _Negotiation()
        self._reader = Reader(self._read_options())

    # --- reading ---------------------------------------------------------------------------------------------------
    def _plaintext(self) -> Parser:
        (flags,) = codec.CLIENT_FLAGS.unpack((yield codec.CLIENT_FLAGS.size))
        if flags & ~(FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES):
            raise ProtocolError(f"unknown client flags {flags:#010x}")
        self._zeroes = not flags & FLAG_C_NO_ZEROES
        if not flags & FLAG_C_FIXED_NEWSTYLE:
            self._state = State.NON_FIXED
        yield from self._read_options()

    def _read_options(self) -> Parser:
        while self._state not in (State.ENDED, State.TLS_STARTING):
            magic, option, length = codec.OPTION.unpack((yield codec.OPTION.size))
            if magic != IHAVEOPT:
                raise ProtocolError(f"bad option magic {magic:#018x}")
            self._options += 1
            if self._options > MAX_OPTIONS:
                raise ProtocolError(f"more than {MAX_OPTIONS} options")
            if length > MAX_DRAINED_OPTION:
                raise ProtocolError(f"option {_name(option)} with {length} bytes")
            if length > MAX_OPTION_DATA:
                yield from pieces(length)
                self._refuse(option, OptionError(REP_ERR_TOO_BIG, f"more than {MAX_OPTION_DATA} bytes of data"))
            else:
                self._answer(option, (yield length) if length else b"")

    def _answer(self, option: int, data: bytes) -> None:
        try:
            if option != OPT_ABORT and self._shutting_down():
                raise OptionError(REP_ERR_SHUTDOWN, "the server is shutting down")
            handler = _HANDLERS[self._state].get(option)
            if handler is None:
                raise _UNHANDLED[self._state](option)
            handler(self, option, data)
        except Malformed as error:
            self._refuse(option, OptionError(REP_ERR_INVALID, str(error)))
        except OptionError as error:
            self._refuse(option, error)

    def _refuse(self, option: int, error: OptionError) -> None:
        # EXPORT_NAME has no error reply, and a client that is not fixed newstyle understands none
        if option == OPT_EXPORT_NAME or self._state is State.NON_FIXED:
            raise ProtocolError(f"{_name(option)}: {error}")
        self._send(option_reply(option, error.reply, codec.clip_text(str(error))))

    def _send(self, data: bytes) -> None:
        self._events.append(Send(data))

    def _end(self, event: Negotiated | Close) -> None:
        self._state = State.ENDED
        self._events.append(event)

    # --- options ---------------------------------------------------------------------------------------------------
    def _abort(self, option: int, data: bytes) -> None:
        self._send(option_reply(option, REP_ACK))
        self._end(Close("the client aborted the handshake", violation=False))

    def _list(self, option: int, data: bytes) -> None:
        _no_data(data)
        replies = [
            option_reply(
                option,
                REP_SERVER,
                codec.build(codec.SERVER_REPLY, name=codec.clip_text(name), description=codec.clip_text(description)),
            )
            for name, description in self._directory.list()
        ]
        self._send(b"".join(replies) + option_reply(option, REP_ACK))

    def _start_tls(self, option: int, data: bytes) -> None:
        _no_data(data)
        self._send(option_reply(option, REP_ACK))
        self._state = State.TLS_STARTING
        self._events.append(StartTls())

    def _already_secure(self, option: int, data: bytes) -> None:
        raise OptionError(REP_ERR_INVALID, "TLS has been started already")

    def _structured_reply(self, option: int, data: bytes) -> None:
        _no_data(data)
        if self._negotiation.mode == EXTENDED:
            raise OptionError(REP_ERR_EXT_HEADER_REQD, "extended headers are in use")
        self._negotiation.mode = STRUCTURED
        self._send(option_reply(option, REP_ACK))

    def _extended_headers(self, option: int, data: bytes) -> None:
        _no_data(data)
        if self._negotiation.mode == EXTENDED:
            raise OptionError(REP_ERR_INVALID, "extended headers are in use already")
        self._negotiation.mode = EXTENDED
        self._send(option_reply(option, REP_ACK))

    def _info(self, option: int, data: bytes) -> None:
        """INFO and GO."""
        request = codec.parse(codec.INFO_REQUEST, data)
        name = codec.decode_text(request.name)
        export = self._find(name)
        asked = frozenset(request.infos)
        flags = self._negotiation.flags_for(export, name)
        if option == OPT_GO:
            export.admit()
        infos: list[tuple[int, Any]] = [(INFO_EXPORT, {"size": export.size, "flags": flags})]
        if INFO_NAME in asked:
            infos.append((INFO_NAME, codec.clip_text(export.name)))
        if INFO_DESCRIPTION in asked and export.description:
            infos.append((INFO_DESCRIPTION, codec.clip_text(export.description)))
        # sent unasked, too, as QEMU does; a client that did not ask may use any alignment, and is told so
        minimum = export.minimum_block if INFO_BLOCK_SIZE in asked else 1
        sizes = {"minimum": minimum, "preferred": export.preferred_block, "maximum": export.maximum_block}
        infos.append((INFO_BLOCK_SIZE, sizes))
        replies = [
            option_reply(option, REP_INFO, codec.build(codec.INFO_REPLY, type=kind, info=info)) for kind, info in infos
        ]
        self._send(b"".join(replies) + option_reply(option, REP_ACK))
        if option == OPT_GO:
            self._negotiated(export, name, flags, INFO_BLOCK_SIZE in asked)

    def _export_name(self, option: int, data: bytes) -> None:
        if self._negotiation.mode == EXTENDED:
            raise OptionError(REP_ERR_INVALID, "extended headers need GO")
        name = codec.decode_text(data)
        export = self._find(name)
        flags = self._negotiation.flags_for(export, name)
        export.admit()
        self._send(codec.EXPORT_NAME_REPLY.pack(export.size, flags) + (_NO_ZEROES_TAIL if self._zeroes else b""))
        self._negotiated(export, name, flags, False)

    def _negotiated(self, export: ExportView, name: str, flags: int, block_size_requested: bool) -> None:
        negotiation = self._negotiation
        contexts = negotiation.contexts_for(name)
        self._end(Negotiated(export, negotiation.mode, contexts, flags, block_size_requested))

    def _list_meta_context(self, option: int, data: bytes) -> None:
        available, queries, _ = self._meta_request(data)
        self._send_contexts(option, list_contexts(available, queries))

    def _set_meta_context(self, option: int, data: bytes) -> None:
        # a SET that fails still ends what an earlier one selected
        self._negotiation.contexts, self._negotiation.contexts_of = (), None
        if self._negotiation.mode == SIMPLE:
            raise OptionError(REP_ERR_INVALID, "metadata contexts need structured replies")
        available, queries, name = self._meta_request(data)
        selected = select_contexts(available, queries)
        self._negotiation.contexts, self._negotiation.contexts_of = tuple(selected), name
        self._send_contexts(option, selected)

    def _meta_request(self, data: bytes) -> tuple[Sequence[str], frozenset[str], str]:
        """Contexts of the export asked about, the queries, and the export's name."""
        request = codec.parse(codec.META_REQUEST, data)
        name = codec.decode_text(request.name)
        queries = frozenset(map(codec.decode_text, request.queries))
        return self._find(name).contexts, queries, name

    def _send_contexts(self, option: int, contexts: Iterable[Context]) -> None:
        replies = [
            option_reply(option, REP_META_CONTEXT, codec.build(codec.META_REPLY, id=number, name=codec.clip_text(name)))
            for number, name in contexts
        ]
        self._send(b"".join(replies) + option_reply(option, REP_ACK))

    def _find(self, name: str) -> ExportView:
        export = self._directory.find(name)
        if export is None:
            raise OptionError(REP_ERR_UNKNOWN, f"export {name!r} is not present" if name else "no default export")
        return export


def _no_data(data: bytes) -> None:
    if data:
        raise OptionError(REP_ERR_INVALID, "this option takes no data")


def _name(option: int) -> str:
    return OPTION_NAMES.get(option, str(option))


def _unsupported(option: int) -> Exception:
    return OptionError(REP_ERR_UNSUP, f"option {_name(option)} is not supported")


def _tls_required(option: int) -> Exception:
    return OptionError(REP_ERR_TLS_REQD, "start TLS first")


_Handler = Callable[[ServerHandshake, int, bytes], None]

_EVERYTHING: Final[Mapping[int, _Handler]] = {
    OPT_EXPORT_NAME: ServerHandshake._export_name,
    OPT_ABORT: ServerHandshake._abort,
    OPT_LIST: ServerHandshake._list,
    OPT_INFO: ServerHandshake._info,
    OPT_GO: ServerHandshake._info,
    OPT_STRUCTURED_REPLY: ServerHandshake._structured_reply,
    OPT_LIST_META_CONTEXT: ServerHandshake._list_meta_context,
    OPT_SET_META_CONTEXT: ServerHandshake._set_meta_context,
    OPT_EXTENDED_HEADERS: ServerHandshake._extended_headers,
}

_HANDLERS: Final[Mapping[State, Mapping[int, _Handler]]] = {
    State.NON_FIXED: {OPT_EXPORT_NAME: ServerHandshake._export_name},
    State.PLAIN: _EVERYTHING,
    State.TLS_OFFERED: {**_EVERYTHING, OPT_STARTTLS: ServerHandshake._start_tls},
    State.TLS_REQUIRED: {OPT_ABORT: ServerHandshake._abort, OPT_STARTTLS: ServerHandshake._start_tls},
    State.SECURE: {**_EVERYTHING, OPT_STARTTLS: ServerHandshake._already_secure},
}

_UNHANDLED: Final[Mapping[State, Callable[[int], Exception]]] = {
    State.NON_FIXED: _unsupported,
    State.PLAIN: _unsupported,
    State.TLS_OFFERED: _unsupported,
    State.TLS_REQUIRED: _tls_required,
    State.SECURE: _unsupported,
}
