"""The handshake, client role, sans-IO (spec, "Session start" and "Fixed newstyle negotiation").

A server is not trusted: every length it sends is capped before anything is kept, and whatever breaks the protocol is
one ProtocolError. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from nbdserve.errors import NbdserveError, OptionError, ProtocolError
from nbdserve.protocol import codec
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED, Malformed
from nbdserve.protocol.constants import (
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_NAME,
    MAX_STRING,
    NBDMAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION_NAMES,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_ERR_UNSUP,
    REP_FLAG_ERROR,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
)
from nbdserve.protocol.reader import Parser, Reader

MAX_OPTION_REPLY: Final = 8 + 2 * MAX_STRING
"""Longest option reply accepted: two strings and their heads."""
MAX_OPTION_REPLIES: Final = 1 << 16
"""Most replies to one option accepted (exports listed)."""
MAX_SIZE: Final = (1 << 63) - 1
"""Largest export accepted; above it an offset is negative to the kernel (CVE-2023-5215)."""

_T = TypeVar("_T")
_Steps = Generator[int, bytes, _T]


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes for the server."""

    data: bytes


@dataclass(frozen=True, slots=True)
class RemoteExport:
    """What a server says of an export, and what was negotiated for it."""

    name: str
    size: int
    flags: int
    mode: int = SIMPLE
    contexts: tuple[tuple[int, str], ...] = ()
    canonical_name: str = ""
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_block: int = 32 << 20


@dataclass(frozen=True, slots=True)
class Connected:
    """The transmission phase begins."""

    export: RemoteExport


@dataclass(frozen=True, slots=True)
class Described:
    """The answer to ``ClientHandshake.info``, with the contexts that the server offers; the session is over."""

    export: RemoteExport


@dataclass(frozen=True, slots=True)
class Listed:
    """The answer to ``ClientHandshake.list_exports``: names and descriptions; the session is over."""

    exports: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a session that failed: OptionError when the server refused, ProtocolError when it erred."""

    error: NbdserveError


HandshakeEvent = Send | Connected | Described | Listed | Failed


class ClientHandshake:
    """One handshake with one aim. ``receive`` returns what to send, and at last its outcome; it raises nothing."""

    def __init__(self) -> None:
        self._events: list[HandshakeEvent] = []
        self._mode = SIMPLE
        self._fixed = True
        self._zeroes = True
        self._reader: Reader
        """Set by the constructors below, one per aim."""

    @classmethod
    def connect(
        cls, name: str = "", *, contexts: Sequence[str] = (), highest_mode: int = EXTENDED, use_go: bool = True
    ) -> ClientHandshake:
        """To enter the transmission phase of export ``name``, with the best replies up to ``highest_mode``.

        ``contexts`` are selected when the server has them. Without ``use_go`` the old EXPORT_NAME is used.
        """
        handshake = cls()
        return handshake._begin(handshake._connect(name, contexts, highest_mode, use_go))

    @classmethod
    def list_exports(cls) -> ClientHandshake:
        """To list the exports."""
        handshake = cls()
        return handshake._begin(handshake._list())

    @classmethod
    def info(cls, name: str = "") -> ClientHandshake:
        """To describe one export and list its contexts."""
        handshake = cls()
        return handshake._begin(handshake._describe(name))

    @property
    def leftover(self) -> bytes:
        """What followed the last byte of the handshake."""
        return self._reader.leftover

    def receive(self, data: bytes | memoryview) -> list[HandshakeEvent]:
        """What to do about ``data``, in order."""
        self._reader.feed(data)
        events, self._events = self._events, []
        return events

    def _begin(self, aim: _Steps[Connected | Described | Listed]) -> ClientHandshake:
        self._reader = Reader(self._run(aim))
        return self

    def _run(self, aim: _Steps[Connected | Described | Listed]) -> Parser:
        try:
            yield from self._greet()
            outcome = yield from aim
            self._events.append(outcome)
        except Malformed as error:
            self._events.append(Failed(ProtocolError(str(error))))
        except (OptionError, ProtocolError) as error:
            self._events.append(Failed(error))

    # --- the aims ---------------------------------------------------------------------------------------------------
    def _greet(self) -> Parser:
        magic, version, flags = codec.GREETING.unpack((yield codec.GREETING.size))
        if magic != NBDMAGIC or version != IHAVEOPT:
            raise ProtocolError("not a newstyle NBD server")
        self._fixed = bool(flags & FLAG_FIXED_NEWSTYLE)
        self._zeroes = not flags & FLAG_NO_ZEROES
        answer = (FLAG_C_FIXED_NEWSTYLE if self._fixed else 0) | (0 if self._zeroes else FLAG_C_NO_ZEROES)
        self._events.append(Send(codec.CLIENT_FLAGS.pack(answer)))

    def _connect(self, name: str, contexts: Sequence[str], highest_mode: int, use_go: bool) -> _Steps[Connected]:
        if not self._fixed:
            return Connected((yield from self._export_name(name, ())))
        yield from self._choose_mode(highest_mode)
        selected: tuple[tuple[int, str], ...] = ()
        if contexts and self._mode != SIMPLE:
            selected = yield from self._meta_contexts(OPT_SET_META_CONTEXT, name, contexts)
        if use_go or self._mode == EXTENDED:
            try:
                return Connected((yield from self._export_info(OPT_GO, name, selected)))
            except OptionError as error:
                if error.reply != REP_ERR_UNSUP or self._mode == EXTENDED:
                    raise
        return Connected((yield from self._export_name(name, selected)))

    def _list(self) -> _Steps[Listed]:
        replies = yield from self._option(OPT_LIST)
        found = []
        for data in replies:
            entry = codec.parse(codec.SERVER_REPLY, data)
            found.append((codec.decode_text(entry.name), codec.decode_text(entry.description)))
        self._abort()
        return Listed(tuple(found))

    def _describe(self, name: str) -> _Steps[Described]:
        yield from self._choose_mode(EXTENDED)
        contexts: tuple[tuple[int, str], ...] = ()
        if self._mode != SIMPLE:
            contexts = yield from self._meta_contexts(OPT_LIST_META_CONTEXT, name, ())
        export = yield from self._export_info(OPT_INFO, name, contexts)
        self._abort()
        return Described(export)

    def _abort(self) -> None:
        # the reply is of no use, and not every server sends one
        self._events.append(Send(codec.option_request(OPT_ABORT)))

    # --- options ----------------------------------------------------------------------------------------------------
    def _choose_mode(self, highest: int) -> Parser:
        for mode, option in ((EXTENDED, OPT_EXTENDED_HEADERS), (STRUCTURED, OPT_STRUCTURED_REPLY)):
            if mode <= highest:
                try:
                    yield from self._option(option)
                except OptionError:
                    continue
                self._mode = mode
                return

    def _meta_contexts(self, option: int, name: str, queries: Sequence[str]) -> _Steps[tuple[tuple[int, str], ...]]:
        encoded = [query.encode() for query in queries]
        request = codec.build(codec.META_REQUEST, name=name.encode(), queries=encoded)
        try:
            replies = yield from self._option(option, request)
        except OptionError as error:
            if error.reply != REP_ERR_UNSUP:
                raise
            return ()
        found: dict[str, int] = {}
        for data in replies:
            reply = codec.parse(codec.META_REPLY, data)
            context = codec.decode_text(reply.name)
            if option == OPT_SET_META_CONTEXT and context not in queries:
                raise ProtocolError(f"context {context!r} was not asked for")
            # nbdkit answers a query sent twice twice
            found.setdefault(context, reply.id)
        if option == OPT_SET_META_CONTEXT and len(set(found.values())) != len(found):
            raise ProtocolError("two contexts have one id")
        return tuple((number, context) for context, number in found.items())

    def _export_info(self, option: int, name: str, contexts: tuple[tuple[int, str], ...]) -> _Steps[RemoteExport]:
        asked = [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE]
        replies = yield from self._option(option, codec.build(codec.INFO_REQUEST, name=name.encode(), infos=asked))
        export: Any = None
        fields: dict[str, Any] = {}
        for data in replies:
            reply = codec.parse(codec.INFO_REPLY, data)
            if reply.type == INFO_EXPORT:
                export = reply.info
            elif reply.type == INFO_NAME:
                fields["canonical_name"] = codec.decode_text(reply.info)
            elif reply.type == INFO_DESCRIPTION:
                fields["description"] = codec.decode_text(reply.info)
            elif reply.type == INFO_BLOCK_SIZE:
                fields |= _block_sizes(reply.info.minimum, reply.info.preferred, reply.info.maximum)
        if export is None:
            raise ProtocolError(f"no size in the answer to {OPTION_NAMES[option]}")
        return self._remote_export(name, export.size, export.flags, contexts, fields)

    def _export_name(self, name: str, contexts: tuple[tuple[int, str], ...]) -> _Steps[RemoteExport]:
        self._events.append(Send(codec.option_request(OPT_EXPORT_NAME, name.encode())))
        size, flags = codec.EXPORT_NAME_REPLY.unpack((yield codec.EXPORT_NAME_REPLY.size))
        if self._zeroes:
            yield 124
        return self._remote_export(name, size, flags, contexts, {})

    def _remote_export(
        self, name: str, size: int, flags: int, contexts: tuple[tuple[int, str], ...], fields: Mapping[str, Any]
    ) -> RemoteExport:
        if size > MAX_SIZE:
            raise ProtocolError(f"an export of {size} bytes is too large")
        return RemoteExport(name, size, flags, self._mode, contexts, **fields)

    def _option(self, option: int, data: bytes = b"") -> _Steps[list[bytes]]:
        """Send an option; the data of its replies when it is acknowledged.

        Raises:
            OptionError: the server refused it.
        """
        if not self._fixed:
            raise ProtocolError("the server knows only EXPORT_NAME")
        self._events.append(Send(codec.option_request(option, data)))
        replies: list[bytes] = []
        while True:
            magic, answered, kind, length = codec.OPTION_REPLY.unpack((yield codec.OPTION_REPLY.size))
            if magic != OPTION_REPLY_MAGIC or answered != option:
                raise ProtocolError(f"not a reply to {OPTION_NAMES[option]}: magic {magic:#x}, option {answered}")
            if length > MAX_OPTION_REPLY:
                raise ProtocolError(f"an option reply of {length} bytes")
            reply = (yield length) if length else b""
            if kind & REP_FLAG_ERROR:
                raise OptionError(kind, reply.decode("utf-8", "replace") or f"{OPTION_NAMES[option]} refused")
            if kind == REP_ACK:
                return replies
            if kind != _DATA_REPLY.get(option):
                raise ProtocolError(f"reply {kind} to {OPTION_NAMES[option]}")
            replies.append(reply)
            if len(replies) > MAX_OPTION_REPLIES:
                raise ProtocolError(f"more than {MAX_OPTION_REPLIES} replies to {OPTION_NAMES[option]}")


_DATA_REPLY: Final = {
    OPT_LIST: REP_SERVER,
    OPT_INFO: REP_INFO,
    OPT_GO: REP_INFO,
    OPT_LIST_META_CONTEXT: REP_META_CONTEXT,
    OPT_SET_META_CONTEXT: REP_META_CONTEXT,
}


def _block_sizes(minimum: int, preferred: int, maximum: int) -> dict[str, int]:
    """The sizes of INFO_BLOCK_SIZE, when they are possible (spec, "Block size constraints")."""

    def power_of_two(size: int) -> bool:
        return size > 0 and not size & (size - 1)

    if not (power_of_two(minimum) and minimum <= 1 << 16 and power_of_two(preferred)):
        raise ProtocolError(f"impossible block sizes: minimum {minimum}, preferred {preferred}")
    if preferred < minimum or maximum < minimum:
        raise ProtocolError(f"impossible block sizes: {minimum}, {preferred}, {maximum}")
    return {"minimum_block": minimum, "preferred_block": preferred, "maximum_block": maximum}
