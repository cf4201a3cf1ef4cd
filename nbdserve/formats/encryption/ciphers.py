"""Disk encryption: sectors of 512 bytes, each under an initialisation vector made from its number.

The modes are built from AES-ECB over many sectors at a time. A context of the ``cryptography`` package costs 13 us, and
XTS would need one for each sector (15 us per 512 bytes); one ECB call for all blocks, with the tweaks applied by numpy,
takes 23 us for 4 KiB and 76 us for 64 KiB.

XTS: IEEE Std 1619-2018; CBC: NIST SP 800-38A; ESSIV and the plain generators: LUKS On-Disk Format Specification 1.2.3.
"""

from __future__ import annotations

import errno
import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from nbdserve.errors import ImageError, RequestError
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import SECTOR_SIZE

Words: TypeAlias = npt.NDArray[np.uint64]

WORD: Final = np.dtype("<u8")
BLOCK: Final = 16
"""Bytes of an AES block, and of an initialisation vector."""
BLOCKS_PER_SECTOR: Final = SECTOR_SIZE // BLOCK
WORDS_PER_SECTOR: Final = SECTOR_SIZE // 8
SECTORS_AT_ONCE: Final = 128
"""64 KiB: what is worked on stays in the processor's cache, and the interpreter lock is not held for longer than 30 us
at a time."""
_LANES_FROM: Final = 40
"""Sectors from which CBC encryption works on all of them in parallel, block after block (170 us for 8, 256 for 128),
instead of on one after the other (4.6 us each)."""

_SHIFT: Final = np.tile(np.arange(BLOCKS_PER_SECTOR, dtype=np.uint64), SECTORS_AT_ONCE)
_CARRY: Final = np.uint64(64) - _SHIFT
_1, _2, _7 = np.uint64(1), np.uint64(2), np.uint64(7)


class SectorCipher(ABC):
    """Encrypts and decrypts whole sectors. May be used by several threads at a time."""

    def decrypt(self, sector: int, buffer: memoryview) -> None:
        """Decrypt ``buffer``, whole sectors of which the first has the number ``sector``, in place."""
        self._convert(sector, buffer, buffer, self._decrypt)

    def encrypt(self, sector: int, data: ReadBuffer) -> bytearray:
        """``data``, whole sectors of which the first has the number ``sector``, encrypted."""
        encrypted = bytearray(len(data))
        self._convert(sector, memoryview(data), memoryview(encrypted), self._encrypt)
        return encrypted

    @staticmethod
    def _convert(sector: int, source: memoryview, target: memoryview, convert: _Conversion) -> None:
        step = SECTORS_AT_ONCE * SECTOR_SIZE
        for start in range(0, len(source), step):
            part = np.frombuffer(source[start : start + step], WORD)
            convert(sector, part, np.frombuffer(target[start : start + step], WORD))
            sector += SECTORS_AT_ONCE

    @abstractmethod
    def _decrypt(self, sector: int, source: Words, target: Words) -> None:
        """At most SECTORS_AT_ONCE; ``target`` may be ``source``."""

    @abstractmethod
    def _encrypt(self, sector: int, source: Words, target: Words) -> None:
        """As ``_decrypt``."""


class _Conversion(Protocol):
    def __call__(self, sector: int, source: Words, target: Words) -> None: ...


def needed_secret(options: Mapping[str, Any], path: str) -> bytes:
    """The passphrase among the options of ``FormatDriver.open``. ImageError without one."""
    secret: bytes | None = options.get("secret")
    if secret is None:
        raise ImageError(path, "the image is encrypted, and no secret is given", field="secret")
    return secret


class LockedCipher(SectorCipher):
    """Stands in where no passphrase is asked for: the metadata of the image can be looked at, its content cannot."""

    def __init__(self, path: str) -> None:
        self._path = path

    def _decrypt(self, sector: int, source: Words, target: Words) -> None:
        raise RequestError(errno.EACCES, f"{self._path}: encrypted, and opened without its key")

    _encrypt = _decrypt


class AesBlocks:
    """AES on single blocks (ECB), with contexts that are used again: each is with one caller at a time."""

    def __init__(self, key: bytes, *, encrypting: bool) -> None:
        """``key``: 16, 24 or 32 bytes."""
        self._cipher = Cipher(algorithms.AES(key), modes.ECB())  # the modes are built on top
        self._encrypting = encrypting
        self._idle: list[CipherContext] = []

    def __call__(self, data: ReadBuffer) -> bytes:
        """The blocks of ``data``, converted."""
        try:
            context = self._idle.pop()
        except IndexError:
            context = self._cipher.encryptor() if self._encrypting else self._cipher.decryptor()
        converted = context.update(data)
        self._idle.append(context)
        return converted


class IvGenerator:
    """The initialisation vectors of consecutive sectors."""

    name: str

    def __init__(self, name: str, essiv_key: bytes | None = None) -> None:
        """``plain`` (32 bits of the sector's number), ``plain64``, or ``essiv`` with the key that encrypts it."""
        self.name = name
        self._plain = name == "plain"
        self._blocks = None if essiv_key is None else AesBlocks(essiv_key, encrypting=True)

    def __call__(self, sector: int, count: int) -> bytes:
        """BLOCK bytes for each of ``count`` sectors from ``sector`` on."""
        if self._plain:
            sector &= 0xFFFF_FFFF
            if sector + count > 1 << 32:
                rest = (1 << 32) - sector
                return self(sector, rest) + self(0, count - rest)
        ones, ascending = _per_sector(count)
        numbers = (sector * ones + ascending).to_bytes(count * BLOCK, "little")
        return numbers if self._blocks is None else self._blocks(numbers)


@functools.lru_cache(maxsize=2 * SECTORS_AT_ONCE)
def _per_sector(count: int) -> tuple[int, int]:
    """The integers made of ``count`` blocks that hold 1, 1, 1, ... and 0, 1, 2, ..."""
    ones = int.from_bytes((b"\1" + bytes(BLOCK - 1)) * count, "little")
    ascending = int.from_bytes(b"".join(number.to_bytes(BLOCK, "little") for number in range(count)), "little")
    return ones, ascending


def essiv_key(key: bytes, hash_name: str) -> bytes:
    """The key of ESSIV: the hash of the volume's key. ValueError when that is not as long as an AES key."""
    salt = hashlib.new(hash_name, key, usedforsecurity=False).digest()
    if len(salt) not in (16, 24, 32):
        raise ValueError(f"a {hash_name} digest of {len(salt)} bytes is no AES key")
    return salt


class XtsCipher(SectorCipher):
    """AES-XTS with a sector as the data unit."""

    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        """``key``: two AES keys of one length; the second makes the tweaks."""
        half = len(key) // 2
        self._encrypt_blocks = AesBlocks(key[:half], encrypting=True)
        self._decrypt_blocks = AesBlocks(key[:half], encrypting=False)
        self._tweak_blocks = AesBlocks(key[half:], encrypting=True)
        self._ivs = ivs

    def _decrypt(self, sector: int, source: Words, target: Words) -> None:
        self._apply(self._decrypt_blocks, sector, source, target)

    def _encrypt(self, sector: int, source: Words, target: Words) -> None:
        self._apply(self._encrypt_blocks, sector, source, target)

    def _apply(self, blocks: AesBlocks, sector: int, source: Words, target: Words) -> None:
        tweaks = self._tweaks(sector, len(source) // WORDS_PER_SECTOR)
        converted = blocks((source ^ tweaks).data.cast("B"))
        np.bitwise_xor(np.frombuffer(converted, WORD), tweaks, out=target)

    def _tweaks(self, sector: int, count: int) -> Words:
        """The tweaks of all blocks.

        Block j of a sector has the sector's tweak times x^j in GF(2^128), little endian: shifted left by j bits, and
        the j bits c that leave on the left come back as c * (x^7 + x^2 + x + 1). All j are less than 32, so that the
        product does not leave on the left in turn.
        """
        first = np.frombuffer(self._tweak_blocks(self._ivs(sector, count)), WORD)
        low, high = np.repeat(first[0::2], BLOCKS_PER_SECTOR), np.repeat(first[1::2], BLOCKS_PER_SECTOR)
        shift, carry = _SHIFT[: len(low)], _CARRY[: len(low)]  # a shift by 64 is zero in numpy
        tweaks = np.empty((len(low), 2), WORD)
        out = high >> carry
        high <<= shift
        part = low >> carry
        np.bitwise_or(high, part, out=tweaks[:, 1])
        low <<= shift
        low ^= out
        np.left_shift(out, _1, out=part)
        low ^= part
        np.left_shift(out, _2, out=part)
        low ^= part
        np.left_shift(out, _7, out=part)
        np.bitwise_xor(low, part, out=tweaks[:, 0])
        return tweaks.reshape(-1)


class CbcCipher(SectorCipher):
    """AES-CBC, begun anew in each sector."""

    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        """``key``: one AES key."""
        self._encrypt_blocks = AesBlocks(key, encrypting=True)
        self._decrypt_blocks = AesBlocks(key, encrypting=False)
        self._cbc = Cipher(algorithms.AES(key), modes.CBC(bytes(BLOCK)))
        self._idle: list[tuple[CipherContext, Words]] = []
        """Contexts, and the block of which each chains to the next."""
        self._ivs = ivs

    def _decrypt(self, sector: int, source: Words, target: Words) -> None:
        decrypted = self._decrypt_blocks(source.data.cast("B"))
        previous = np.empty(len(source), WORD)
        previous[2:] = source[:-2]
        count = len(source) // WORDS_PER_SECTOR
        previous.reshape(count, WORDS_PER_SECTOR)[:, :2] = self._iv_words(sector, count)
        np.bitwise_xor(np.frombuffer(decrypted, WORD), previous, out=target)

    def _encrypt(self, sector: int, source: Words, target: Words) -> None:
        count = len(source) // WORDS_PER_SECTOR
        if count >= _LANES_FROM:
            self._encrypt_lanes(sector, source.reshape(count, -1, 2), target.reshape(count, -1, 2))
        else:
            self._encrypt_chain(sector, source.reshape(count, -1), target.reshape(count, -1))

    def _encrypt_lanes(self, sector: int, source: Words, target: Words) -> None:
        previous = self._iv_words(sector, len(source))
        for number in range(BLOCKS_PER_SECTOR):
            encrypted = self._encrypt_blocks((source[:, number] ^ previous).data.cast("B"))
            previous = np.frombuffer(encrypted, WORD).reshape(-1, 2)
            target[:, number] = previous

    def _encrypt_chain(self, sector: int, source: Words, target: Words) -> None:
        """One context for all sectors: what it chains from one to the next is taken out again in advance."""
        try:
            context, chained = self._idle.pop()
        except IndexError:
            context, chained = self._cbc.encryptor(), np.zeros(2, WORD)
        ivs = self._iv_words(sector, len(source))
        for number in range(len(source)):
            words = source[number].copy()
            words[:2] ^= ivs[number] ^ chained
            encrypted = np.frombuffer(context.update(words.data.cast("B")), WORD)
            target[number] = encrypted
            chained = encrypted[-2:]
        self._idle.append((context, chained))

    def _iv_words(self, sector: int, count: int) -> Words:
        return np.frombuffer(self._ivs(sector, count), WORD).reshape(count, 2)
