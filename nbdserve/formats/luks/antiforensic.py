"""The anti-forensic splitter of LUKS: a key spread over so many bytes that a disk can hardly keep a copy of them all.

LUKS On-Disk Format Specification 1.2.3, section 2.4. Pure.
"""

from __future__ import annotations

import hashlib
import os


def split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """``key`` spread over ``stripes`` times its length; all of it is needed to get the key back."""
    noise = os.urandom(len(key) * (stripes - 1))
    return noise + _xor(_diffused(noise, len(key), hash_name), key)


def merge(material: bytes | bytearray, key_bytes: int, hash_name: str) -> bytes:
    """The key of ``key_bytes`` that was split into ``material``, a multiple of that."""
    last = len(material) - key_bytes
    return _xor(_diffused(material[:last], key_bytes, hash_name), bytes(material[last:]))


def _diffused(stripes: bytes | bytearray, key_bytes: int, hash_name: str) -> bytes:
    """Every stripe is added (xor), and the sum hashed after each, so that a bit of any changes all of the result."""
    block = bytes(key_bytes)
    for start in range(0, len(stripes), key_bytes):
        block = _diffuse(_xor(block, bytes(stripes[start : start + key_bytes])), hash_name)
    return block


def _diffuse(block: bytes, hash_name: str) -> bytes:
    """Each digest-sized part becomes the hash of its number and itself; a last part that is shorter stays so."""
    size = hashlib.new(hash_name, usedforsecurity=False).digest_size
    parts = []
    for number, start in enumerate(range(0, len(block), size)):
        part = block[start : start + size]
        digest = hashlib.new(hash_name, number.to_bytes(4, "big") + part, usedforsecurity=False).digest()
        parts.append(digest[: len(part)])
    return b"".join(parts)


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")
