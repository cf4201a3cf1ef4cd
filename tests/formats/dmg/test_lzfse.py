from __future__ import annotations

import contextlib
import errno
import random
import resource

import pytest

from nbdserve.errors import RequestError
from nbdserve.formats.dmg import lzfse

package = pytest.importorskip("lzfse")
DATA = random.Random(1).randbytes(1000) * 100


@pytest.mark.parametrize("data", [DATA, b"short", b"", bytes(1 << 20), random.Random(2).randbytes(5000)])
def test_exactly_the_bytes_asked_for(data: bytes) -> None:
    assert lzfse.expand(package.compress(data), len(data)) == data


@pytest.mark.parametrize("size", [0, len(DATA) - 1, len(DATA) + 1])
def test_another_size_is_an_error(size: int) -> None:
    with pytest.raises(RequestError, match="LZFSE data") as caught:
        lzfse.expand(package.compress(DATA), size)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("stored", [b"", b"bvx2", b"bvx-\xff\xff\xff\xff", b"junk" * 100, package.compress(DATA)[:-10]])
def test_damaged_data(stored: bytes) -> None:
    with pytest.raises(RequestError, match="LZFSE data"):
        lzfse.expand(stored, len(DATA))


def test_damage_anywhere_is_survived() -> None:
    stored = package.compress(DATA)
    rng = random.Random(3)
    for _ in range(300):
        damaged = bytearray(stored)
        for _ in range(rng.choice((1, 5, 50))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with contextlib.suppress(RequestError):
            assert len(lzfse.expand(damaged, len(DATA))) == len(DATA)


def test_a_bomb_makes_no_more_than_its_chunk() -> None:
    bomb = package.compress(bytes(4 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match="more than 65536"):
        lzfse.expand(bomb, 65536)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lzfse, "_decoder", lambda: None)
    assert not lzfse.available()
    with pytest.raises(RequestError, match="not installed"):
        lzfse.expand(b"", 1)
