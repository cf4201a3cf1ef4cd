"""Runs a parser that is written as a generator over bytes that arrive in pieces of any size."""

from __future__ import annotations

from collections.abc import Generator

from nbdserve.errors import ProtocolError

Parser = Generator[int, bytes, None]
"""Yields the number of bytes it needs next and is sent exactly those; it ends by returning or with ProtocolError."""

_PIECE = 1 << 16


def pieces(length: int) -> Parser:
    """The sizes in which ``length`` bytes are best asked for when they are not needed together: 64 KiB at most."""
    for start in range(0, length, _PIECE):
        yield min(_PIECE, length - start)


class Reader:
    """Feeds a :data:`Parser`. How the bytes were cut never changes what it sees.

    ``error`` is the ProtocolError the parser ended with, ``ended`` tells whether it ended at all, and ``leftover`` is
    what arrived after its last byte.
    """

    __slots__ = ("_buffer", "_needed", "_parser", "ended", "error")

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._buffer = bytearray()
        self.error: ProtocolError | None = None
        self.ended = False
        self._needed = 0
        self._resume(None)

    @property
    def leftover(self) -> bytes:
        return bytes(self._buffer) if self.ended else b""

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Give the parser what it can use of ``data``; what it cannot use yet is kept."""
        buffer = self._buffer
        buffer += data
        position = 0
        while not self.ended and len(buffer) - position >= self._needed:
            end = position + self._needed
            self._resume(bytes(memoryview(buffer)[position:end]))
            position = end
        del buffer[:position]

    def _resume(self, data: bytes | None) -> None:
        try:
            self._needed = next(self._parser) if data is None else self._parser.send(data)
        except StopIteration:
            self.ended = True
        except ProtocolError as error:
            self.ended, self.error = True, error
