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
    return _xor(_diffused(material[:last], key_bytes, hash_name), material[last:])


def _diffused(stripes: bytes | bytearray, key_bytes: int, hash_name: str) -> bytes:
    """Every stripe is added (xor), and the sum hashed after each, so that a bit of any changes all of the result.

    Each digest-sized part of the sum becomes the hash of its number and itself; a last part that is shorter stays so.
    """
    size = hashlib.new(hash_name, usedforsecurity=False).digest_size
    starts = range(0, key_bytes, size)
    # Copies of a context cost less than new ones, and there are thousands.
    begun = [hashlib.new(hash_name, number.to_bytes(4, "big"), usedforsecurity=False) for number in range(len(starts))]
    block = bytes(key_bytes)
    for at in range(0, len(stripes), key_bytes):
        block = _xor(block, stripes[at : at + key_bytes])
        parts = []
        for context, start in zip(begun, starts, strict=True):
            hashing = context.copy()
            hashing.update(block[start : start + size])
            parts.append(hashing.digest())
        block = b"".join(parts)[:key_bytes]
    return block


def _xor(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")
