"""The tokens of QMP's JSON, from bytes as they arrive. No I/O.

QMP's dialect also has strings in single quotes. What cannot be a token becomes one of the kind ERROR, and what follows
is skipped up to a character that may begin anew, so that one broken request does not spoil the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, TypeAlias

STRING: Final = 1
"""With its quotes; escapes are not looked at."""
INTEGER: Final = 2
FLOAT: Final = 3
KEYWORD: Final = 4
ERROR: Final = 5
"""The bytes up to the one that fits nothing."""

Token: TypeAlias = tuple[int, bytes]
"""``(kind, text)``; the kind of ``{ } [ ] : ,`` is the character's code."""

_STRUCTURE: Final = b"{}[]:,"
_QUOTES: Final = b"\"'"
_DIGITS: Final = b"0123456789"

# What a token may go on with, by state. A state is left by the first character outside.
_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_PLAIN: Final = {quote: re.compile(rb"[^%c\\\x00-\x1f\xfe\xff]*" % quote) for quote in _QUOTES}
_WORD: Final = re.compile(rb"[a-z]*")
_NUMBER: Final = re.compile(rb"[0-9]*")
_SKIPPED: Final = re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]*")

(
    _START,
    _IN_STRING,
    _ESCAPE,
    _IN_WORD,
    _MINUS,
    _ZERO,
    _IN_INTEGER,
    _POINT,
    _IN_FRACTION,
    _E,
    _E_SIGN,
    _IN_EXPONENT,
    _LOST,
) = range(13)

_AFTER_INTEGER: Final = {ord("."): _POINT, ord("e"): _E, ord("E"): _E}
_AFTER_FRACTION: Final = {ord("e"): _E, ord("E"): _E}
_NUMBER_STEPS: Final[dict[int, dict[int, int]]] = {
    _MINUS: {ord("0"): _ZERO} | dict.fromkeys(_DIGITS[1:], _IN_INTEGER),
    _POINT: dict.fromkeys(_DIGITS, _IN_FRACTION),
    _E: dict.fromkeys(_DIGITS, _IN_EXPONENT) | dict.fromkeys(b"+-", _E_SIGN),
    _E_SIGN: dict.fromkeys(_DIGITS, _IN_EXPONENT),
}
"""Where a number is not complete: the characters that carry it on."""
_NUMBER_ENDS: Final[dict[int, tuple[int, dict[int, int]]]] = {
    _ZERO: (INTEGER, {ord("."): _POINT}),  # QEMU takes 0.0e1, and not 0e1
    _IN_INTEGER: (INTEGER, _AFTER_INTEGER),
    _IN_FRACTION: (FLOAT, _AFTER_FRACTION),
    _IN_EXPONENT: (FLOAT, {}),
}
"""Where it is: its kind, and the characters that carry it on all the same."""


class Lexer:
    """Feed it bytes in any portions; ``pending`` bytes belong to a token that is not complete."""

    def __init__(self) -> None:
        self._state = _START
        self._text = bytearray()
        self._quote = 0

    @property
    def pending(self) -> int:
        return len(self._text)

    def forget(self) -> None:
        """Drop the token begun, and skip what follows of it."""
        self._state = _LOST
        self._text.clear()

    def feed(self, data: bytes) -> Iterator[Token]:
        """The tokens that ``data`` completes."""
        position, end = 0, len(data)
        while position < end:
            state = self._state
            if state == _START:
                token, position = self._begin(data, position)
            elif state == _IN_STRING:
                token, position = self._in_string(data, position)
            elif state == _ESCAPE:
                char = data[position]
                position += 1
                self._text.append(char)
                token = None if 0x20 <= char < 0xFE else self._fail()
                if token is None:
                    self._state = _IN_STRING
            elif state == _IN_WORD:
                position = self._take(_WORD, data, position)
                token = self._finish(KEYWORD) if position < end else None
            elif state == _LOST:
                skipped = _SKIPPED.match(data, position)
                assert skipped is not None
                position = skipped.end()
                if position < end:
                    self._state = _START
                continue
            else:
                token, position = self._in_number(data, position)
            if token is not None:
                yield token

    def _begin(self, data: bytes, position: int) -> tuple[Token | None, int]:
        space = _SPACE.match(data, position)
        assert space is not None
        position = space.end()
        if position == len(data):
            return None, position
        char = data[position]
        if char in _STRUCTURE:
            return (char, data[position : position + 1]), position + 1
        self._text.append(char)
        position += 1
        if char in _QUOTES:
            self._state, self._quote = _IN_STRING, char
        elif char == ord("-"):
            self._state = _MINUS
        elif char in _DIGITS:
            self._state = _ZERO if char == ord("0") else _IN_INTEGER
        elif ord("a") <= char <= ord("z"):
            self._state = _IN_WORD
        else:
            return self._fail(), position
        return None, position

    def _in_string(self, data: bytes, position: int) -> tuple[Token | None, int]:
        position = self._take(_PLAIN[self._quote], data, position)
        if position == len(data):
            return None, position
        char = data[position]
        self._text.append(char)
        position += 1
        if char == self._quote:
            return self._finish(STRING), position
        if char == ord("\\"):
            self._state = _ESCAPE
            return None, position
        return self._fail(), position

    def _in_number(self, data: bytes, position: int) -> tuple[Token | None, int]:
        state = self._state
        if state in (_IN_INTEGER, _IN_FRACTION, _IN_EXPONENT):
            position = self._take(_NUMBER, data, position)
            if position == len(data):
                return None, position
        char = data[position]
        kind, steps = _NUMBER_ENDS.get(state, (ERROR, _NUMBER_STEPS.get(state, {})))
        if char in steps:
            self._state = steps[char]
            self._text.append(char)
            return None, position + 1
        if kind == ERROR or (state == _ZERO and char in _DIGITS):
            self._text.append(char)
            return self._fail(), position + 1
        return self._finish(kind), position

    def _take(self, run: re.Pattern[bytes], data: bytes, position: int) -> int:
        found = run.match(data, position)
        assert found is not None
        self._text += found.group()
        return found.end()

    def _finish(self, kind: int) -> Token:
        token = kind, bytes(self._text)
        self._text.clear()
        self._state = _START
        return token

    def _fail(self) -> Token:
        token = self._finish(ERROR)
        self._state = _LOST
        return token
