"""The anti-forensic splitter."""

from __future__ import annotations

import os

import pytest

from nbdserve.formats.luks.antiforensic import merge, split


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("key_bytes", [16, 24, 32, 48, 64])
def test_what_is_split_is_merged(hash_name: str, key_bytes: int) -> None:
    key = os.urandom(key_bytes)
    material = split(key, 50, hash_name)
    assert len(material) == 50 * key_bytes
    assert merge(material, key_bytes, hash_name) == key
    assert split(key, 50, hash_name) != material


def test_every_stripe_is_needed() -> None:
    key = os.urandom(32)
    material = bytearray(split(key, 20, "sha256"))
    for at in range(0, len(material), 31):
        material[at] ^= 1
        assert merge(material, 32, "sha256") != key
        material[at] ^= 1
    assert merge(material, 32, "sha256") == key


def test_one_stripe_is_the_key() -> None:
    assert split(b"k" * 32, 1, "sha256") == b"k" * 32
