"""Passphrases: the right one, a second one, wrong ones, and headers that ask for years of work."""

from __future__ import annotations

import asyncio
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from nbdserve.errors import CorruptImageError, ImageError, RequestError, UnsupportedImageError
from nbdserve.formats.luks import keys
from nbdserve.formats.luks.create import new_volume, parse_volume_options
from nbdserve.formats.luks.keys import iterations_per_second, key_digest, make_cipher, open_volume, pbkdf2_blocks
from nbdserve.formats.luks.layout import CipherSpec, Header
from nbdserve.storage.memory import MemoryStorage
from tests.formats.encryption.stock import QUICK, SECRET, Stock
from tests.support import images

SLOT = 208


async def volume(options: dict[str, str] | None = None) -> bytearray:
    """A volume's header and key material, with the passphrase SECRET."""
    header, pieces = await new_volume(parse_volume_options({"iter-time": "0"} | (options or {})), SECRET)
    data = bytearray(header.payload_offset)
    for offset, part in pieces:
        data[offset : offset + len(part)] = part
    return data


async def unlock(data: bytes | bytearray, secret: bytes | None = SECRET, **options: Any) -> bytes:
    """What the first sector of zeroes is encrypted to."""
    storage = MemoryStorage(bytes(100) + bytes(data), path="disk")
    header = Header.parse(data[:592], "disk", len(data))
    return bytes((await open_volume(header, storage, 100, {"secret": secret, **options})).encrypt(0, bytes(512)))


def patched(data: bytearray, at: int, value: int) -> bytearray:
    data = bytearray(data)
    data[at : at + 4] = struct.pack(">I", value)
    return data


async def test_the_passphrase_opens_it_and_no_other() -> None:
    data = await volume()
    first = await unlock(data)
    assert first == await unlock(data)
    assert first != await unlock(await volume()), "each volume has a key of its own"
    for wrong in (b"", b"pass", b"pass word\n", b"Pass word"):
        with pytest.raises(ImageError, match="opens none"):
            await unlock(data, wrong)
    with pytest.raises(ImageError, match="no secret is given"):
        await unlock(data, None)
    with pytest.raises(RequestError, match="without its key"):
        await unlock(data, SECRET, metadata_only=True)


@images.needs_qemu
async def test_each_slot_has_its_passphrase(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    path = stock.create("a.luks", "luks", f"key-secret=s,{QUICK}", "1M")
    (tmp_path / "second").write_bytes(b"second")
    images.run(
        "qemu-img", "amend", *stock.secret, "--object", f"secret,id=n,file={tmp_path / 'second'}",
        "-o", "state=active,new-secret=n,keyslot=6,iter-time=10", "--image-opts", stock.options(path, "luks"),
    )  # fmt: skip
    data = path.read_bytes()
    assert [slot.active for slot in Header.parse(data[:592], "", len(data)).slots] == [True] + [False] * 5 + [
        True,
        False,
    ]
    assert await unlock(data, SECRET) == await unlock(data, b"second")
    with pytest.raises(ImageError):
        await unlock(data, b"third")


async def test_no_slot_in_use() -> None:
    with pytest.raises(ImageError, match="none is in use") as caught:
        await unlock(patched(await volume(), SLOT, 0xDEAD))
    assert caught.value.field == "LUKS key slots"


@pytest.mark.parametrize("iterations", [1 << 31, (1 << 32) - 1, (1 << 31) - 1])
@pytest.mark.parametrize(("at", "field"), [(SLOT + 4, "LUKS key slot 0 iterations"), (164, "LUKS key iterations")])
async def test_work_of_minutes_is_refused_at_once(iterations: int, at: int, field: str) -> None:
    data = patched(await volume(), at, iterations)
    start = time.process_time()
    with pytest.raises(UnsupportedImageError, match="60 are allowed") as caught:
        await unlock(data)
    assert time.process_time() - start < 20
    assert (caught.value.field, caught.value.value) == (field, iterations)
    with pytest.raises(RequestError):
        await unlock(data, metadata_only=True)  # looking at it asks for no work at all


async def test_the_work_of_all_slots_counts() -> None:
    data = await volume()
    speed = iterations_per_second("sha256")
    share = int(speed * 0.2 / 2)  # two blocks of output
    for number in range(4):
        at = SLOT + 48 * number
        data = patched(patched(data, at, 0x00AC71F3), at + 4, share)
    with pytest.raises(UnsupportedImageError, match=r"and 0\.5 are allowed") as caught:
        await unlock(data, b"wrong", unlock_seconds=0.5)
    assert caught.value.field == "LUKS key slot 2 iterations"


async def test_the_event_loop_goes_on() -> None:
    data = patched(await volume(), SLOT + 4, int(iterations_per_second("sha256") * 0.3))
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.005)

    counting = asyncio.create_task(count())
    with pytest.raises(ImageError, match="opens none"):
        await unlock(data, b"wrong")
    counting.cancel()
    assert turns > 10


@pytest.mark.parametrize(
    ("at", "text", "kind", "problem"),
    [
        (40, b"cbc-essiv:sha1\0", CorruptImageError, "digest of 20 bytes is no AES key"),
        (40, b"xts-essiv:sha512\0", CorruptImageError, "digest of 64 bytes is no AES key"),
    ],
)
async def test_an_essiv_that_cannot_be(at: int, text: bytes, kind: type[ImageError], problem: str) -> None:
    data = await volume({"cipher-alg": "aes-128"})
    data[at : at + len(text)] = text
    if b"cbc" in text:
        data[108:112] = struct.pack(">I", 32)
    for options in ({}, {"metadata_only": True}):
        with pytest.raises(kind, match=problem) as caught:
            await unlock(data, **options)
        assert caught.value.field == "LUKS cipher mode"


async def test_a_hash_that_openssl_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = await volume()
    monkeypatch.setattr(keys, "is_available", lambda name: name != "sha256")
    with pytest.raises(UnsupportedImageError, match="OpenSSL") as caught:
        await unlock(data)
    assert (caught.value.field, caught.value.value) == ("LUKS hash spec", "sha256")


def test_output_longer_than_a_digest_costs_more() -> None:
    assert pbkdf2_blocks("sha256", 64) == 2
    assert pbkdf2_blocks("sha256", 20) == 1
    assert pbkdf2_blocks("sha1", 64) == 4
    assert pbkdf2_blocks("sha512", 64) == 1


def test_a_vector_of_rfc_6070() -> None:
    assert key_digest("sha1", b"password", b"salt", 4096).hex() == "4b007901b765489abead49d926f721d065a429c1"


def test_ciphers_of_a_specification() -> None:
    for spec in (CipherSpec("xts", "plain64", None, 64), CipherSpec("cbc", "essiv", "sha256", 16)):
        cipher = make_cipher(spec, bytes(spec.key_bytes))
        buffer = cipher.encrypt(3, b"x" * 512)
        cipher.decrypt(3, memoryview(buffer))
        assert buffer == b"x" * 512
