"""Sector ciphers, against the modes of the ``cryptography`` package, one sector at a time."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.errors import ImageError, RequestError
from nbdserve.formats.encryption.ciphers import (
    SECTORS_AT_ONCE,
    CbcCipher,
    IvGenerator,
    LockedCipher,
    SectorCipher,
    essiv_key,
    needed_secret,
)
from nbdserve.formats.encryption.xts import XtsCipher
from nbdserve.units import SECTOR_SIZE

rng = random.Random(3)
KEYS = {size: rng.randbytes(size) for size in (16, 24, 32, 64)}
FIRST = (0, 1, 77, (1 << 32) - 3, (1 << 32) + 5, (1 << 40) + 1)
COUNTS = (1, 2, 7, 39, 40, SECTORS_AT_ONCE, SECTORS_AT_ONCE + 1, 3 * SECTORS_AT_ONCE - 1)


def expected(
    mode: Callable[[bytes], modes.Mode], key: bytes, iv: Callable[[int], bytes], first: int, plain: bytes
) -> bytes:
    parts = []
    for number in range(len(plain) // SECTOR_SIZE):
        encryptor = Cipher(algorithms.AES(key), mode(iv(first + number))).encryptor()
        parts.append(encryptor.update(plain[number * SECTOR_SIZE : (number + 1) * SECTOR_SIZE]))
    return b"".join(parts)


def plain64(sector: int) -> bytes:
    return sector.to_bytes(16, "little")


def plain(sector: int) -> bytes:
    return (sector & 0xFFFF_FFFF).to_bytes(16, "little")


def essiv(sector: int) -> bytes:
    return Cipher(algorithms.AES(KEYS[32]), modes.ECB()).encryptor().update(plain64(sector))


def decrypted(cipher: SectorCipher, sector: int, data: bytes) -> bytes:
    buffer = bytearray(data)
    cipher.decrypt(sector, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize(
    ("generator", "iv"),
    [(IvGenerator("plain64"), plain64), (IvGenerator("plain"), plain), (IvGenerator("essiv", KEYS[32]), essiv)],
    ids=["plain64", "plain", "essiv"],
)
@pytest.mark.parametrize(
    ("make", "mode", "key"),
    [
        (XtsCipher, modes.XTS, KEYS[32]),
        (XtsCipher, modes.XTS, KEYS[64]),
        (CbcCipher, modes.CBC, KEYS[16]),
        (CbcCipher, modes.CBC, KEYS[24]),
        (CbcCipher, modes.CBC, KEYS[32]),
    ],
    ids=["xts-128", "xts-256", "cbc-128", "cbc-192", "cbc-256"],
)
def test_as_the_mode_has_it_for_each_sector(
    make: type[XtsCipher | CbcCipher],
    mode: Callable[[bytes], modes.Mode],
    key: bytes,
    generator: IvGenerator,
    iv: Callable[[int], bytes],
    first: int,
) -> None:
    cipher = make(key, generator)
    for count in COUNTS:
        content = os.urandom(count * SECTOR_SIZE)
        wanted = expected(mode, key, iv, first, content)
        assert cipher.encrypt(first, content) == wanted, count
        assert decrypted(cipher, first, wanted) == content, count


def test_buffers_need_no_alignment_and_writes_no_buffer_of_their_own() -> None:
    cipher = XtsCipher(KEYS[64], IvGenerator("plain64"))
    content = os.urandom(4096)
    room = bytearray(4096 + 13)
    for shift in (1, 4, 8, 13):
        view = memoryview(room)[shift : shift + 4096]
        view[:] = content
        encrypted = cipher.encrypt(9, view)
        assert view == content, "the data to be written is left alone"
        view[:] = encrypted
        cipher.decrypt(9, view)
        assert view == content


@pytest.mark.parametrize(
    "make",
    [lambda: XtsCipher(KEYS[64], IvGenerator("plain64")), lambda: CbcCipher(KEYS[16], IvGenerator("plain"))],
)
@given(st.lists(st.tuples(st.sampled_from(FIRST), st.sampled_from([1, 2, 8, 64, 130])), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_many_at_a_time_are_as_each_alone(make: Callable[[], SectorCipher], shape: list[tuple[int, int]]) -> None:
    cipher = make()
    contents = [(sector, os.urandom(count * SECTOR_SIZE)) for sector, count in shape]
    encrypted = [bytes(part) for part in cipher.encrypt_each(contents)]
    assert encrypted == [cipher.encrypt(sector, content) for sector, content in contents]
    buffers = [memoryview(bytearray(part)) for part in encrypted]
    cipher.decrypt_each([(sector, buffer) for (sector, _), buffer in zip(contents, buffers, strict=True)])
    assert buffers == [content for _, content in contents]


@pytest.mark.parametrize(
    "make",
    [lambda: XtsCipher(KEYS[64], IvGenerator("plain64")), lambda: CbcCipher(KEYS[32], IvGenerator("essiv", KEYS[32]))],
)
def test_threads_share_a_cipher(make: Callable[[], SectorCipher]) -> None:
    cipher = make()
    contents = [os.urandom(rng.choice([1, 8, 200]) * SECTOR_SIZE) for _ in range(64)]
    with ThreadPoolExecutor(4) as pool:
        encrypted = list(pool.map(cipher.encrypt, range(64), contents))
        assert list(pool.map(decrypted, [cipher] * 64, range(64), encrypted)) == contents


def test_the_key_of_essiv_is_a_digest_that_aes_takes() -> None:
    assert essiv_key(b"key", "sha256") == hashlib.sha256(b"key").digest()
    assert len(essiv_key(b"key", "md5")) == 16
    with pytest.raises(ValueError, match="sha1"):
        essiv_key(b"key", "sha1")


def test_without_a_key_nothing_is_read_or_written() -> None:
    cipher = LockedCipher("disk")
    for attempt in (lambda: cipher.decrypt(0, memoryview(bytearray(512))), lambda: cipher.encrypt(0, bytes(512))):
        with pytest.raises(RequestError, match="disk: encrypted") as caught:
            attempt()
        assert caught.value.errno == errno.EACCES


def test_the_secret_is_asked_for() -> None:
    assert needed_secret({"secret": b"x"}, "disk") == b"x"
    for options in ({}, {"secret": None}):
        with pytest.raises(ImageError, match="disk: secret = None: the image is encrypted"):
            needed_secret(options, "disk")
