from __future__ import annotations

from nbdserve.errors import ProtocolError
from nbdserve.protocol.reader import Parser, Reader, pieces


def sized_strings(found: list[bytes]) -> Parser:
    while True:
        size = (yield 1)[0]
        if size == 255:
            raise ProtocolError("255")
        if not size:
            return
        found.append((yield size))


def test_any_split_is_seen_the_same() -> None:
    data = b"\x03abc\x01d\x00rest"
    for cut in range(len(data) + 1):
        found: list[bytes] = []
        reader = Reader(sized_strings(found))
        reader.feed(data[:cut])
        reader.feed(memoryview(data)[cut:])
        assert (found, reader.ended, reader.leftover, reader.error) == ([b"abc", b"d"], True, b"rest", None)


def test_an_error_ends_it() -> None:
    reader = Reader(sized_strings([]))
    reader.feed(b"\xffmore")
    assert reader.ended
    assert str(reader.error) == "255"


def test_there_is_no_leftover_while_it_runs() -> None:
    reader = Reader(sized_strings([]))
    reader.feed(b"\x05ab")
    assert not reader.ended
    assert reader.leftover == b""


def test_pieces() -> None:
    assert list(pieces(0)) == []
    assert list(pieces(65536)) == [65536]
    assert list(pieces(131073)) == [65536, 65536, 1]
