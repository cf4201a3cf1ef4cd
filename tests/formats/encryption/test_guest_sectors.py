"""Places: host offsets that tell the guest's sector as well."""

from __future__ import annotations

import os
import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdserve.errors import ImageError, RequestError
from nbdserve.formats.encryption.guest_sectors import GuestSectorStorage, aes_cipher, place_of
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB


@pytest.mark.parametrize(
    ("host_offset", "guest_offset"),
    [(0, 0), (512, 0), (0, 512), (1 << 56, 0), (0, (1 << 63) - 512), (65536 + 77, 77), (4096, 1 << 40)],
)
async def test_a_place_is_advanced_like_an_offset(host_offset: int, guest_offset: int) -> None:
    storage = GuestSectorStorage(MemoryStorage(), aes_cipher({"secret": b"x"}, "disk"))
    place = place_of(host_offset, guest_offset)
    assert place > 0
    for step in (0, 1, 511, 512, MIB):
        assert storage._place(place + step) == (host_offset + step, (guest_offset + step) // 512)


async def test_sectors_are_encrypted_by_their_guest_number() -> None:
    rng = random.Random(2)
    inner = MemoryStorage(size=MIB)
    storage = GuestSectorStorage(inner, aes_cipher({"secret": b"sixteen byte key and more"}, "disk"))
    content = os.urandom(3 * 512)
    for _ in range(20):
        host_offset, guest_offset = rng.randrange(1000) * 512, rng.randrange(1 << 40) * 512
        await storage.write(place_of(host_offset, guest_offset), content)
        stored = await inner.read(host_offset, len(content))
        for number in range(3):
            iv = (guest_offset // 512 + number).to_bytes(16, "little")
            cipher = Cipher(algorithms.AES(b"sixteen byte key"), modes.CBC(iv)).decryptor()
            part = slice(number * 512, number * 512 + 512)
            assert cipher.update(bytes(stored[part])) == content[part]
        assert await storage.read(place_of(host_offset, guest_offset) + 100, 700) == content[100:800]


async def test_the_key_is_padded_and_needed() -> None:
    short, padded = (aes_cipher({"secret": secret}, "disk") for secret in (b"abc", b"abc" + bytes(13)))
    assert short.encrypt(5, bytes(512)) == padded.encrypt(5, bytes(512))
    with pytest.raises(ImageError, match="no secret"):
        aes_cipher({}, "disk")
    with pytest.raises(RequestError):
        aes_cipher({"metadata_only": True, "secret": b"abc"}, "disk").encrypt(0, bytes(512))
