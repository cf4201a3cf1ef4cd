from __future__ import annotations

import bz2
import errno
import random
import zlib
from collections.abc import Callable

import pytest

from nbdserve.errors import RequestError
from nbdserve.formats.inflate import bunzip2, inflate

DATA = random.Random(1).randbytes(3000) * 7
FORMS: list[tuple[Callable[[bytes, int], bytes], bytes, bytes]] = [
    (inflate, zlib.compress(DATA), zlib.compress(b"")),
    (bunzip2, bz2.compress(DATA), bz2.compress(b"")),
]


@pytest.mark.parametrize(("expand", "stored", "nothing"), FORMS)
def test_exactly_the_bytes_asked_for(expand: Callable[[bytes, int], bytes], stored: bytes, nothing: bytes) -> None:
    assert expand(stored, len(DATA)) == DATA
    assert expand(stored + b"what follows", len(DATA)) == DATA
    assert expand(nothing, 0) == b""


@pytest.mark.parametrize(("expand", "stored", "nothing"), FORMS)
@pytest.mark.parametrize("size", [0, 1, len(DATA) - 1, len(DATA) + 1, 1 << 30])
def test_another_size_is_an_error(
    expand: Callable[[bytes, int], bytes], stored: bytes, nothing: bytes, size: int
) -> None:
    with pytest.raises(RequestError, match="bytes") as caught:
        expand(stored, size)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(("expand", "stored", "nothing"), FORMS)
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: b"\xff" + data[1:]])
def test_damaged_data_is_an_error(
    expand: Callable[[bytes, int], bytes], stored: bytes, nothing: bytes, damage: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(RequestError):
        expand(damage(stored), len(DATA))


def test_raw_deflate_data() -> None:
    compressor = zlib.compressobj(wbits=-12)
    assert inflate(compressor.compress(DATA) + compressor.flush(), len(DATA), window_bits=-12) == DATA


@pytest.mark.parametrize(("expand", "bomb"), [(inflate, zlib.compress), (bunzip2, bz2.compress)])
def test_a_bomb_makes_no_more_than_its_unit(
    expand: Callable[[bytes, int], bytes], bomb: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(RequestError, match="more than 65536 bytes"):
        expand(bomb(bytes(4 << 20)), 65536)


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_the_result_is_that_of_zlib_for_any_stream(level: int) -> None:
    """Whatever a damaged stream is to zlib, bytes or an error, it is here."""
    rng = random.Random(level)
    stored = zlib.compress(DATA, level)
    for _ in range(400):
        damaged = bytearray(stored)
        for _ in range(rng.choice((1, 3))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        judge = zlib.decompressobj()
        try:
            wanted = judge.decompress(damaged, len(DATA))
            right = judge.eof and len(wanted) == len(DATA)
        except zlib.error:
            wanted, right = b"", False
        if right:
            assert inflate(damaged, len(DATA)) == wanted
        else:
            with pytest.raises(RequestError):
                inflate(damaged, len(DATA))


def test_raw_data_may_end_with_its_last_byte() -> None:
    """Stored deflate blocks: QEMU needs no mark of the end behind them."""
    deflater = zlib.compressobj(0, zlib.DEFLATED, -12)
    stored = deflater.compress(DATA[:700]) + deflater.flush(zlib.Z_FULL_FLUSH)
    assert inflate(stored, 700, window_bits=-12) == DATA[:700]
    with pytest.raises(RequestError, match="700 bytes instead of 701"):
        inflate(stored, 701, window_bits=-12)
