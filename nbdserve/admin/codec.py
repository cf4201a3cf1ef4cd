"""QMP's wire format: JSON values that follow each other with or without anything in between. No I/O.

A request ends where its braces close, not at a newline. What is no JSON is told with QEMU's words, and the stream goes
on behind it. Objects keep the order of their members; a key given twice is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from nbdserve.admin.lexer import ERROR, FLOAT, INTEGER, KEYWORD, STRING, Lexer, Token

MAX_VALUE_BYTES: Final = 16 << 20
"""Of one request. The longest a client sends is a transaction, some kilobytes."""
MAX_TOKENS: Final = 1 << 17
MAX_NESTING: Final = 1024
"""QEMU's. Both bound what one client can make the server hold."""
_SHOWN_BYTES: Final = 1024
"""Of a token that is none."""

_OPEN_BRACE, _CLOSE_BRACE, _OPEN_BRACKET, _CLOSE_BRACKET, _COLON, _COMMA = b"{}[]:,"
_KEYWORDS: Final = {b"true": True, b"false": False, b"null": None}
_ESCAPE: Final = re.compile(r"\\(?:u(.{0,4})|(.))", re.DOTALL)
_ESCAPED: Final = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEX: Final = re.compile(r"[0-9A-Fa-f]{4}")
_SEQUENCE: Final = re.compile(
    rb"[\x00-\x7f]+|[\xc0-\xdf][\x80-\xbf]?|[\xe0-\xef][\x80-\xbf]{0,2}|[\xf0-\xf7][\x80-\xbf]{0,3}"
    rb"|[\xf8-\xfb][\x80-\xbf]{0,4}|[\xfc\xfd][\x80-\xbf]{0,5}|[\x80-\xff]"
)
_NONCHARACTER: Final = re.compile(
    f"[\\ufdd0-\\ufdef{''.join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))}]"
)
_BROKEN: Final = "\udcff"
"""In the place of what is no character; no text has this one."""
_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class Broken:
    """Something that is no JSON; ``problem`` is what the peer is told."""

    problem: str


class JsonError(Exception):
    """The tokens make no value."""


def encode(value: Any) -> bytes:
    """One line of ASCII, as QEMU sends it."""
    return json.dumps(value).encode("ascii") + b"\r\n"


class JsonStream:
    """Values from bytes in any portions."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._tokens: list[Token] = []
        self._bytes = 0
        self._braces = 0
        self._brackets = 0

    def feed(self, data: bytes) -> Iterator[Any]:
        """The values that ``data`` completes, and a Broken for each thing that is none."""
        for token in self._lexer.feed(data):
            yield from self._token(token)
        if self._bytes + self._lexer.pending > MAX_VALUE_BYTES:
            self._lexer.forget()
            self._reset()
            yield Broken("JSON token size limit exceeded")

    def _token(self, token: Token) -> Iterator[Any]:
        kind, text = token
        if kind == ERROR:
            self._reset()
            shown = _decoded(text[:_SHOWN_BYTES].partition(b"\0")[0])
            yield Broken(f"JSON parse error, stray '{_printable(shown)}'")
            return
        self._braces += (kind == _OPEN_BRACE) - (kind == _CLOSE_BRACE)
        self._brackets += (kind == _OPEN_BRACKET) - (kind == _CLOSE_BRACKET)
        self._bytes += len(text)
        self._tokens.append(token)
        problem = self._exceeded()
        if problem:
            self._reset()
            yield Broken(problem)
        elif self._braces < 0 or self._brackets < 0 or (self._braces == 0 and self._brackets == 0):
            tokens = self._tokens
            self._reset()
            try:
                yield parse(tokens)
            except JsonError as error:
                yield Broken(f"JSON parse error, {error}")

    def _exceeded(self) -> str:
        if self._bytes > MAX_VALUE_BYTES:
            return "JSON token size limit exceeded"
        if len(self._tokens) > MAX_TOKENS:
            return "JSON token count limit exceeded"
        if self._braces + self._brackets > MAX_NESTING:
            return "JSON nesting depth limit exceeded"
        return ""

    def _reset(self) -> None:
        self._tokens = []
        self._bytes = self._braces = self._brackets = 0


def parse(tokens: list[Token]) -> Any:
    """The value the tokens begin with. JsonError says what is wrong.

    Containers are kept on a list rather than on the call stack: their depth is the peer's to choose.
    """
    stack: list[_Container] = []
    for token in tokens:
        value = _open(token) if not stack or stack[-1].wants_value(token[0]) else _MISSING
        if isinstance(value, _Container):
            stack.append(value)
            continue
        if value is _MISSING and not stack[-1].punctuation(token[0]):
            continue
        if value is _MISSING:
            value = stack.pop().value
        if not stack:
            return value
        stack[-1].add(value)
    raise JsonError("premature EOI")


class _Container:
    """An object or array that is being read."""

    def __init__(self, kind: int) -> None:
        self.value: Any = {} if kind == _OPEN_BRACE else []
        self._is_object = kind == _OPEN_BRACE
        self._end = _CLOSE_BRACE if self._is_object else _CLOSE_BRACKET
        self._key: Any = _MISSING
        self._expected = "first"

    def wants_value(self, kind: int) -> bool:
        """Whether the next token begins a value (or a key)."""
        return self._expected == "value" or (self._expected == "first" and kind != self._end)

    def punctuation(self, kind: int) -> bool:
        """Take a token that is no value; whether it closes the container."""
        if self._expected == "colon":
            if kind != _COLON:
                raise JsonError("missing : in object pair")
            self._expected = "value"
            return False
        if kind == self._end:
            return True
        if kind != _COMMA:
            raise JsonError(f"expected separator in {'dict' if self._is_object else 'list'}")
        self._expected = "value"
        return False

    def add(self, value: Any) -> None:
        if not self._is_object:
            self.value.append(value)
            self._expected = "separator"
        elif self._key is _MISSING:
            if not isinstance(value, str):
                raise JsonError("key is not a string in object")
            self._key = value
            self._expected = "colon"
        else:
            if self._key in self.value:
                raise JsonError("duplicate key")
            self.value[self._key] = value
            self._key = _MISSING
            self._expected = "separator"


def _open(token: Token) -> Any:
    """The scalar, or the container that begins."""
    kind, text = token
    if kind in (_OPEN_BRACE, _OPEN_BRACKET):
        return _Container(kind)
    if kind == STRING:
        return _string(text)
    if kind == INTEGER:
        return _integer(text)
    if kind == FLOAT:
        return float(text)
    if kind == KEYWORD:
        if text not in _KEYWORDS:
            raise JsonError(f"invalid keyword '{text[:_SHOWN_BYTES].decode()}'")
        return _KEYWORDS[text]
    raise JsonError("expecting value")


def _integer(text: bytes) -> int | float:
    """A 64-bit integer, signed or not; what is neither becomes a double, as in QEMU."""
    if len(text) <= 20:
        number = int(text)
        if -(1 << 63) <= number < 1 << 64:
            return number
    return float(text)


def _string(text: bytes) -> str:
    plain = _decoded(text[1:-1])
    return _checked(plain) if "\\" not in plain else _unescaped(plain, text[:1].decode())


def _checked(plain: str) -> str:
    """JsonError where it holds what is no character."""
    if _BROKEN in plain:
        raise JsonError("invalid UTF-8 sequence in string")
    return plain


def _decoded(text: bytes) -> str:
    """The text, with ``_BROKEN`` for each sequence that is no character, of the length its first byte says.

    NUL may be written in two bytes: "modified UTF-8".
    """
    try:
        plain = text.decode()
    except UnicodeDecodeError:
        pass
    else:
        return plain if plain.isascii() else _NONCHARACTER.sub(_BROKEN, plain)
    return "".join(map(_character, _SEQUENCE.findall(text)))


def _character(sequence: bytes) -> str:
    if sequence == b"\xc0\x80":
        return "\0"
    try:
        text = sequence.decode()
    except UnicodeDecodeError:
        return _BROKEN
    return _NONCHARACTER.sub(_BROKEN, text)


def _printable(text: str) -> str:
    return text.replace(_BROKEN, "\ufffd")


def _unescaped(plain: str, quote: str) -> str:
    parts: list[str] = []
    position = 0
    while (found := _ESCAPE.search(plain, position)) is not None:
        parts.append(_checked(plain[position : found.start()]))
        position = found.end()
        if found[2] is not None:
            if found[2] not in _ESCAPED:
                raise JsonError("invalid escape sequence in string")
            parts.append(_ESCAPED[found[2]])
            continue
        code = int(found[1], 16) if _HEX.fullmatch(found[1]) else -1
        if 0xD800 <= code < 0xDC00 and plain.startswith("\\u", position):
            low = plain[position + 2 : position + 6]
            if _HEX.fullmatch(low) and 0xDC00 <= int(low, 16) < 0xE000:
                code = 0x10000 + ((code - 0xD800) << 10) + int(low, 16) - 0xDC00
                position += 6
        if code < 0 or 0xD800 <= code < 0xE000 or _NONCHARACTER.match(chr(code)):
            shown = (plain + quote)[found.start() : found.start() + 6]
            raise JsonError(f"{_printable(shown)} is not a valid Unicode character")
        parts.append(chr(code))
    return "".join([*parts, _checked(plain[position:])])
