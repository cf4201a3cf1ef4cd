"""Disk encryption: sectors of 512 bytes, each under an initialisation vector made from its number.

The modes are built from AES-ECB over many sectors at a time: a context of the ``cryptography`` package costs 13 us, and
a mode of its would need one for each sector. ``xts.py`` has XTS.

CBC: NIST SP 800-38A; ESSIV and the plain generators: LUKS On-Disk Format Specification 1.2.3.
"""

from __future__ import annotations

import errno
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ImageError, RequestError
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import SECTOR_SIZE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

Words: TypeAlias = npt.NDArray[np.uint64]
Octets: TypeAlias = npt.NDArray[np.uint8]
"""Data as the requests have it: numpy handles words that are not aligned at half the speed."""

WORD: Final = np.dtype("<u8")
BLOCK: Final = 16
"""Bytes of an AES block, and of an initialisation vector."""
BLOCKS_PER_SECTOR: Final = SECTOR_SIZE // BLOCK
WORDS_PER_SECTOR: Final = SECTOR_SIZE // 8
SECTORS_AT_ONCE: Final = 128
"""64 KiB: what is worked on stays in the processor's second-level cache, and the interpreter lock is not held for long.
Half as many take 6 % longer."""
_LANES_FROM: Final = 40
"""Sectors from which CBC encryption works on all of them in parallel, block after block (170 us for 8, 256 for 128),
instead of on one after the other (4.6 us each)."""

_LOW_HALF: Final = np.uint64(0xFFFF_FFFF)
_STEPS: Final = np.arange(SECTORS_AT_ONCE, dtype=WORD)

Piece: TypeAlias = tuple[int, memoryview]
"""Whole sectors, and the number of the first."""


class SectorCipher(ABC):
    """Encrypts and decrypts whole sectors. May be used by several threads at a time."""

    def decrypt(self, sector: int, buffer: memoryview) -> None:
        """Decrypt ``buffer``, whole sectors of which the first has the number ``sector``, in place."""
        data = np.frombuffer(buffer, np.uint8)
        self._convert(_run(sector, len(buffer)), data, data, self._decrypt)

    def decrypt_each(self, pieces: Sequence[Piece]) -> None:
        """Decrypt many buffers in place: a call for all of them costs little more than one for the first."""
        if len(pieces) == 1:
            self.decrypt(*pieces[0])
            return
        joined = memoryview(bytearray().join([buffer for _, buffer in pieces]))
        data = np.frombuffer(joined, np.uint8)
        self._convert(_runs(pieces), data, data, self._decrypt)
        start = 0
        for _, buffer in pieces:
            end = start + len(buffer)
            buffer[:] = joined[start:end]
            start = end

    def encrypt(self, sector: int, data: ReadBuffer) -> bytearray:
        """``data``, whole sectors of which the first has the number ``sector``, encrypted."""
        encrypted = bytearray(len(data))
        target = np.frombuffer(encrypted, np.uint8)
        self._convert(_run(sector, len(data)), np.frombuffer(data, np.uint8), target, self._encrypt)
        return encrypted

    def encrypt_each(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> list[ReadBuffer]:
        """``encrypt`` of many at a time, as ``decrypt_each``."""
        if len(pieces) == 1:
            return [self.encrypt(*pieces[0])]
        joined = memoryview(bytearray().join([data for _, data in pieces]))
        target = np.frombuffer(joined, np.uint8)
        self._convert(_runs(pieces), target, target, self._encrypt)
        encrypted: list[ReadBuffer] = []
        start = 0
        for _, data in pieces:
            end = start + len(data)
            encrypted.append(joined[start:end])
            start = end
        return encrypted

    def _convert(self, numbers: Words, source: Octets, target: Octets, convert: _Conversion) -> None:
        count = len(numbers)
        if not count:
            return
        ivs = self._vectors(numbers)
        if count <= SECTORS_AT_ONCE:
            convert(ivs, source, target)
            return
        for first in range(0, count, SECTORS_AT_ONCE):
            part = slice(first * SECTOR_SIZE, (first + SECTORS_AT_ONCE) * SECTOR_SIZE)
            convert(ivs[first : first + SECTORS_AT_ONCE], source[part], target[part])

    @abstractmethod
    def _vectors(self, numbers: Words) -> Words:
        """Two words for each sector: what its encryption begins with. ``numbers`` has such pairs; it may be changed."""

    @abstractmethod
    def _decrypt(self, ivs: Words, source: Octets, target: Octets) -> None:
        """At most SECTORS_AT_ONCE; ``target`` may be ``source``."""

    @abstractmethod
    def _encrypt(self, ivs: Words, source: Octets, target: Octets) -> None:
        """As ``_decrypt``."""


class _Conversion(Protocol):
    def __call__(self, ivs: Words, source: Octets, target: Octets) -> None: ...


def _run(sector: int, length: int) -> Words:
    """The numbers of the sectors of ``length`` bytes: for each a pair of words, of which the high one is zero."""
    count = length // SECTOR_SIZE
    numbers = np.zeros((count, 2), WORD)
    numbers[:, 0] = np.arange(sector, sector + count, dtype=WORD)
    return numbers


def _runs(pieces: Sequence[tuple[int, ReadBuffer]]) -> Words:
    """``_run`` of all pieces."""
    lengths = [len(data) for _, data in pieces]
    count = lengths[0] // SECTOR_SIZE
    if lengths.count(lengths[0]) != len(lengths) or count > SECTORS_AT_ONCE:
        return np.concatenate([_run(sector, len(data)) for sector, data in pieces])
    firsts = np.array([sector for sector, _ in pieces], WORD)
    numbers = np.zeros((len(firsts), count, 2), WORD)
    np.add(firsts[:, None], _STEPS[:count], numbers[:, :, 0])
    return numbers.reshape(-1, 2)


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

    def _vectors(self, numbers: Words) -> Words:
        raise RequestError(errno.EACCES, f"{self._path}: encrypted, and opened without its key")

    def _decrypt(self, ivs: Words, source: Octets, target: Octets) -> None:
        raise NotImplementedError

    _encrypt = _decrypt


class AesBlocks:
    """AES on single blocks (ECB), with contexts that are used again: each is with one caller at a time."""

    def __init__(self, key: bytes, *, encrypting: bool) -> None:
        """``key``: 16, 24 or 32 bytes."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415  (12 ms)

        self._cipher = Cipher(algorithms.AES(key), modes.ECB())  # the modes are built on top
        self._encrypting = encrypting
        self._idle: list[CipherContext] = []

    def __call__(self, data: ReadBuffer) -> bytes:
        """The blocks of ``data``, converted."""
        context = self._take()
        converted = context.update(data)
        self._idle.append(context)
        return converted

    def into(self, data: ReadBuffer, target: memoryview) -> None:
        """Convert to ``target``, which has BLOCK bytes to spare and is not the memory of ``data``.

        For 32 KiB 11 us; 13 with new memory for the result each time.
        """
        context = self._take()
        context.update_into(data, target)
        self._idle.append(context)

    def _take(self) -> CipherContext:
        try:
            return self._idle.pop()
        except IndexError:
            return self._cipher.encryptor() if self._encrypting else self._cipher.decryptor()


class IvGenerator:
    """The initialisation vectors of consecutive sectors."""

    name: str

    def __init__(self, name: str, essiv_key: bytes | None = None) -> None:
        """``plain`` (32 bits of the sector's number), ``plain64``, or ``essiv`` with the key that encrypts it."""
        self.name = name
        self._plain = name == "plain"
        self._blocks = None if essiv_key is None else AesBlocks(essiv_key, encrypting=True)

    def __call__(self, numbers: Words) -> Words:
        """For each sector BLOCK bytes, as two words, of its number, as two words; ``numbers`` may be changed."""
        if self._plain:
            numbers[:, 0] &= _LOW_HALF
        if self._blocks is None:
            return numbers
        return np.frombuffer(self._blocks(numbers.data.cast("B")), WORD).reshape(-1, 2)


def essiv_key(key: bytes, hash_name: str) -> bytes:
    """The key of ESSIV: the hash of the volume's key. ValueError when that is not as long as an AES key."""
    salt = hashlib.new(hash_name, key, usedforsecurity=False).digest()
    if len(salt) not in (16, 24, 32):
        raise ValueError(f"a {hash_name} digest of {len(salt)} bytes is no AES key")
    return salt


class CbcCipher(SectorCipher):
    """AES-CBC, begun anew in each sector."""

    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        """``key``: one AES key."""
        self._encrypt_blocks = AesBlocks(key, encrypting=True)
        self._decrypt_blocks = AesBlocks(key, encrypting=False)
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415  (12 ms)

        self._cbc = Cipher(algorithms.AES(key), modes.CBC(bytes(BLOCK)))
        self._idle: list[tuple[CipherContext, Words]] = []
        """Contexts, and the block of which each chains to the next."""
        self._ivs = ivs

    def _vectors(self, numbers: Words) -> Words:
        return self._ivs(numbers)

    def _decrypt(self, ivs: Words, source: Octets, target: Octets) -> None:
        decrypted = self._decrypt_blocks(source.data)
        previous = np.empty(len(source) // WORD.itemsize, WORD)
        previous[2:] = source.view(WORD)[:-2]
        previous.reshape(-1, WORDS_PER_SECTOR)[:, :2] = ivs
        np.bitwise_xor(np.frombuffer(decrypted, np.uint8), previous.view(np.uint8), target)

    def _encrypt(self, ivs: Words, source: Octets, target: Octets) -> None:
        count = len(ivs)
        words, encrypted = source.view(WORD), target.view(WORD)
        if count >= _LANES_FROM:
            self._encrypt_lanes(ivs, words.reshape(count, -1, 2), encrypted.reshape(count, -1, 2))
        else:
            self._encrypt_chain(ivs, words.reshape(count, -1), encrypted.reshape(count, -1))

    def _encrypt_lanes(self, ivs: Words, source: Words, target: Words) -> None:
        previous = ivs
        for number in range(BLOCKS_PER_SECTOR):
            encrypted = self._encrypt_blocks((source[:, number] ^ previous).data.cast("B"))
            previous = np.frombuffer(encrypted, WORD).reshape(-1, 2)
            target[:, number] = previous

    def _encrypt_chain(self, ivs: Words, source: Words, target: Words) -> None:
        """One context for all sectors: what it chains from one to the next is taken out again in advance."""
        try:
            context, chained = self._idle.pop()
        except IndexError:
            context, chained = self._cbc.encryptor(), np.zeros(2, WORD)
        for number in range(len(source)):
            words = source[number].copy()
            words[:2] ^= ivs[number] ^ chained
            encrypted = np.frombuffer(context.update(words.data.cast("B")), WORD)
            target[number] = encrypted
            chained = encrypted[-2:]
        self._idle.append((context, chained))
