"""The bytes of NBD messages, one function per message (the protocol document, "Handshake" and "Transmission phase").

Per-request messages are plain :class:`struct.Struct`; the option data of the handshake, which is not hot, is declared
with ``construct``, and both roles use it. Offsets and lengths are bytes; ``mode`` is one of the reply modes below.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Sequence
from itertools import chain
from struct import Struct
from struct import pack as _pack
from typing import Any, Final

import construct as c

from nbdserve.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_STRING,
    NBD_EINVAL,
    NBD_EIO,
    NBD_ENOMEM,
    NBD_ENOSPC,
    NBD_ENOTSUP,
    NBD_EOVERFLOW,
    NBD_EPERM,
    NBD_ESHUTDOWN,
    OPTION_REPLY_MAGIC,
    REPLY_BLOCK_STATUS,
    REPLY_BLOCK_STATUS_EXT,
    REPLY_ERROR,
    REPLY_FLAG_DONE,
    REPLY_NONE,
    REPLY_OFFSET_DATA,
    REPLY_OFFSET_HOLE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)

SIMPLE: Final = 0
STRUCTURED: Final = 1
EXTENDED: Final = 2
"""Reply modes, in the order in which options can raise them."""

GREETING: Final = Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")
"""IHAVEOPT, option, data length."""
OPTION_REPLY: Final = Struct(">QIII")
"""Magic, option, reply type, data length."""
EXPORT_NAME_REPLY: Final = Struct(">QH")
"""Size, transmission flags; 124 zeroes follow without NO_ZEROES."""

REQUEST: Final = Struct(">IHHQQI")
"""Magic, command flags, type, cookie, offset, length: 28 bytes."""
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
"""Magic, command flags, type, cookie, offset, length: 32 bytes."""
SIMPLE_REPLY: Final = Struct(">IIQ")
"""Magic, error, cookie: 16 bytes."""
STRUCTURED_REPLY: Final = Struct(">IHHQI")
"""Magic, flags, type, cookie, length of what follows: 20 bytes."""
EXTENDED_REPLY: Final = Struct(">IHHQQQ")
"""Magic, flags, type, cookie, offset of the *request*, length of what follows: 32 bytes."""

CHUNK_OFFSET: Final = Struct(">Q")
"""What precedes the data of an OFFSET_DATA chunk."""
CHUNK_HOLE: Final = Struct(">QI")
"""Offset and size of an OFFSET_HOLE chunk; 32 bits of size with extended headers, too."""
CHUNK_ERROR: Final = Struct(">IH")
"""Error and message length; the message follows, and for ERROR_OFFSET a 64-bit offset."""
CONTEXT_ID: Final = Struct(">I")
CONTEXT_ID_COUNT: Final = Struct(">II")
"""Context id and number of extents, at the head of a BLOCK_STATUS_EXT chunk."""
EXTENT: Final = Struct(">II")
EXTENT_EXT: Final = Struct(">QQ")
EFFECT_LENGTH: Final = Struct(">Q")
"""Head of a BLOCK_STATUS payload; 32-bit context ids follow."""

_WIRE_ERRORS: Final = {
    0: 0,
    _errno.EPERM: NBD_EPERM,
    _errno.EROFS: NBD_EPERM,
    _errno.EIO: NBD_EIO,
    _errno.ENOMEM: NBD_ENOMEM,
    _errno.EINVAL: NBD_EINVAL,
    _errno.ENOSPC: NBD_ENOSPC,
    _errno.EDQUOT: NBD_ENOSPC,
    _errno.EFBIG: NBD_ENOSPC,
    _errno.EOVERFLOW: NBD_EOVERFLOW,
    _errno.ENOTSUP: NBD_ENOTSUP,
    _errno.ESHUTDOWN: NBD_ESHUTDOWN,
}


def wire_error(error: int) -> int:
    """The NBD error for a Linux ``errno`` (spec, "Error values"): what has no number of its own becomes EINVAL."""
    return _WIRE_ERRORS.get(error, NBD_EINVAL)


def clip_text(text: str) -> bytes:
    """``text`` as UTF-8 of at most 4096 bytes (spec: strings), cut at a character."""
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_STRING:
        return data
    return data[:MAX_STRING].decode("utf-8", "ignore").encode()


# --- handshake: option data (spec, "Option types" and "Option reply types") ------------------------------------------
_MAX_INFO_REQUESTS: Final = 512
_MAX_QUERIES: Final = 1024
"""Longest lists parsed: the 64 Ki elements that fit into 256 KiB of option data keep ``construct`` busy for 0.2 s."""

_text = c.Prefixed(c.Int32ub, c.GreedyBytes)

INFO_REQUEST: Final = c.Struct(
    "name" / _text,
    "infos" / c.PrefixedArray(c.ExprValidator(c.Int16ub, c.obj_ <= _MAX_INFO_REQUESTS), c.Int16ub),
    c.Terminated,
)
"""Data of INFO and GO."""

META_REQUEST: Final = c.Struct(
    "name" / _text,
    "queries" / c.PrefixedArray(c.ExprValidator(c.Int32ub, c.obj_ <= _MAX_QUERIES), _text),
    c.Terminated,
)
"""Data of LIST_META_CONTEXT and SET_META_CONTEXT."""

SERVER_REPLY: Final = c.Struct("name" / _text, "description" / c.GreedyBytes)
META_REPLY: Final = c.Struct("id" / c.Int32ub, "name" / c.GreedyBytes)
INFO_REPLY: Final = c.Struct(
    "type" / c.Int16ub,
    "info"
    / c.Switch(
        c.this.type,
        {
            INFO_EXPORT: c.Struct("size" / c.Int64ub, "flags" / c.Int16ub, c.Terminated),
            INFO_BLOCK_SIZE: c.Struct(
                "minimum" / c.Int32ub, "preferred" / c.Int32ub, "maximum" / c.Int32ub, c.Terminated
            ),
        },
        default=c.GreedyBytes,
    ),
)
"""One REP_INFO; NAME, DESCRIPTION and unknown ones are bytes."""


class Malformed(ValueError):
    """Option data whose inner lengths contradict its outer one, or whose text breaks the rules of a string."""


def parse(layout: Any, data: bytes) -> Any:
    """``data`` by one of the layouts above.

    Raises:
        Malformed: too short, too long, or too many elements.
    """
    try:
        return layout.parse(data)
    except c.ConstructError as error:
        raise Malformed(str(error).rpartition("\n")[2]) from error


def build(layout: Any, **fields: object) -> bytes:
    """The bytes of ``fields`` in one of the layouts above."""
    data: bytes = layout.build(fields)
    return data


def decode_text(data: bytes) -> str:
    """A string of the protocol: UTF-8, at most 4096 bytes, no NUL (spec, "Strings").

    Raises:
        Malformed: it is not.
    """
    if len(data) > MAX_STRING:
        raise Malformed(f"a string of {len(data)} bytes is longer than {MAX_STRING}")
    if 0 in data:
        raise Malformed("a string holds a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Malformed("a string is not UTF-8") from error


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """One reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def option_request(option: int, data: bytes = b"") -> bytes:
    """One option as the client sends it."""
    return OPTION.pack(IHAVEOPT, option, len(data)) + data


# --- replies -------------------------------------------------------------------------------------------------------
def chunk_header(mode: int, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
    """Header of one STRUCTURED or EXTENDED reply chunk; ``offset`` is the request's, ``length`` what follows."""
    if mode == EXTENDED:
        return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)
    return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A simple reply without data; ``error`` is a wire error."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def none_chunk(mode: int, cookie: int, offset: int) -> bytes:
    """The final chunk of a success that carries nothing."""
    return chunk_header(mode, REPLY_FLAG_DONE, REPLY_NONE, cookie, offset, 0)


def error_chunk(mode: int, cookie: int, offset: int, error: int, message: str = "") -> bytes:
    """A final ERROR chunk with a wire error and a text. Always DONE: imageio takes a non-final one for broken peer."""
    text = clip_text(message)
    head = chunk_header(mode, REPLY_FLAG_DONE, REPLY_ERROR, cookie, offset, CHUNK_ERROR.size + len(text))
    return head + CHUNK_ERROR.pack(error, len(text)) + text


def data_chunk_head(mode: int, flags: int, cookie: int, offset: int, data_offset: int, length: int) -> bytes:
    """All of an OFFSET_DATA chunk but its ``length`` bytes of data, which lie at ``data_offset`` of the export."""
    head = chunk_header(mode, flags, REPLY_OFFSET_DATA, cookie, offset, 8 + length)
    return head + CHUNK_OFFSET.pack(data_offset)


def hole_chunk(mode: int, flags: int, cookie: int, offset: int, hole_offset: int, length: int) -> bytes:
    """An OFFSET_HOLE chunk: ``length`` (1..2^32-1) zeroes at ``hole_offset`` of the export."""
    head = chunk_header(mode, flags, REPLY_OFFSET_HOLE, cookie, offset, CHUNK_HOLE.size)
    return head + CHUNK_HOLE.pack(hole_offset, length)


def block_status_chunk(
    mode: int, flags: int, cookie: int, offset: int, context_id: int, extents: Sequence[tuple[int, int]]
) -> bytes:
    """The extents ``(length, status)`` of one context: 32-bit ones in BLOCK_STATUS, 64-bit ones in BLOCK_STATUS_EXT.

    Each length must fit its field; the caller has cut the list (spec, NBD_REPLY_TYPE_BLOCK_STATUS).
    """
    count = len(extents)
    if mode == EXTENDED:
        head = chunk_header(mode, flags, REPLY_BLOCK_STATUS_EXT, cookie, offset, 8 + 16 * count)
        return head + CONTEXT_ID_COUNT.pack(context_id, count) + _pack(f">{2 * count}Q", *chain.from_iterable(extents))
    head = chunk_header(mode, flags, REPLY_BLOCK_STATUS, cookie, offset, 4 + 8 * count)
    return head + CONTEXT_ID.pack(context_id) + _pack(f">{2 * count}I", *chain.from_iterable(extents))


def final_reply(mode: int, cookie: int, offset: int, error: int = 0, message: str = "") -> bytes:
    """The whole reply of a command without data, in any mode: success, or ``error`` (a wire error) with a text."""
    if mode == SIMPLE:
        return simple_reply(cookie, error)
    if error:
        return error_chunk(mode, cookie, offset, error, message)
    return none_chunk(mode, cookie, offset)
