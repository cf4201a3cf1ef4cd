from __future__ import annotations

import random

import pytest

from nbdserve.errors import RequestError
from nbdserve.formats.dmg.adc import expand
from tests.formats.dmg.build import adc


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (b"\x83abcd", b"abcd"),
        (b"\x80a\x00\x00", b"aaaa"),  # 3 copies of the last byte
        (b"\x82abc\x04\x02", b"abcabca"),  # 4 from 3 back: the copy runs into itself
        (b"\x82abc\x40\x00\x02", b"abcabca"),  # the same in three bytes
        (b"\x80a\x3c\x00", b"a" * 19),
        (b"\x80a\x7f\x00\x00", b"a" * 68),
        (b"\xff" + bytes(range(128)) + b"\x03\xff" * 0, bytes(range(128))),
        (b"", b""),
    ],
)
def test_each_code(stored: bytes, wanted: bytes) -> None:
    assert expand(stored, len(wanted)) == wanted


def test_far_copies() -> None:
    noise = random.Random(1).randbytes(70_000)
    stored = b"".join(b"\xff" + noise[at : at + 128] for at in range(0, 65536, 128))
    assert expand(stored + b"\x40\xff\xff", 65540) == noise[:65536] + noise[:4]
    assert expand(stored + b"\x03\xff", 65539) == noise[:65536] + noise[65536 - 1024 : 65536 - 1021]


@pytest.mark.parametrize("seed", range(5))
def test_there_and_back(seed: int) -> None:
    rng = random.Random(seed)
    data = b"".join(bytes([rng.randrange(256)]) * rng.choice((1, 2, 3, 5, 20, 200)) for _ in range(500))
    assert expand(adc(data), len(data)) == data


@pytest.mark.parametrize(
    ("stored", "size"),
    [
        (b"\x83abc", 4),
        (b"\x83abcd\x00", 8),
        (b"\x83abcd\x40\x00", 8),
        (b"\x83abcd", 3),
        (b"\x83abcd", 5),
        (b"\x83abcd\x00\x04", 7),
        (b"\x00\x00", 3),
        (b"\x80a\x7f\x00\x00", 60),
    ],
)
def test_damaged_data(stored: bytes, size: int) -> None:
    with pytest.raises(RequestError, match="ADC data"):
        expand(stored, size)


def test_no_more_is_made_than_asked_for() -> None:
    with pytest.raises(RequestError):
        expand(b"\x80a" + b"\x7f\x00\x00" * 1_000_000, 512)
