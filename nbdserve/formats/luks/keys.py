"""From a passphrase to the key of a LUKS volume (LUKS On-Disk Format Specification 1.2.3, section 3).

PBKDF2 is slow on purpose, for as long as the header says: by default two seconds of the machine that made it. It runs
on a worker thread, where nothing else waits for it, but it cannot be interrupted. So its time is estimated first, from
the speed of this processor, and a header that asks for more than is allowed in all is refused by the iterations it
names, before they begin.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.encryption import UNLOCK_SECONDS
from nbdserve.formats.encryption.ciphers import (
    CbcCipher,
    IvGenerator,
    LockedCipher,
    SectorCipher,
    essiv_key,
    needed_secret,
)
from nbdserve.formats.encryption.xts import XtsCipher
from nbdserve.formats.luks import antiforensic, layout
from nbdserve.formats.luks.layout import CipherSpec, Header, KeySlot
from nbdserve.storage.base import Storage
from nbdserve.storage.pool import worker_pool
from nbdserve.units import div_ceil

_CALIBRATION_SECONDS: Final = 0.01


def make_cipher(spec: CipherSpec, key: bytes) -> SectorCipher:
    """The cipher under ``key``. ValueError when the hash of its ESSIV makes no AES key."""
    ivs = IvGenerator(spec.iv_generator, None if spec.iv_hash is None else essiv_key(key, spec.iv_hash))
    return XtsCipher(key, ivs) if spec.mode == "xts" else CbcCipher(key, ivs)


async def open_volume(header: Header, storage: Storage, offset: int, options: Mapping[str, Any]) -> SectorCipher:
    """The cipher of the volume whose header is at ``offset``.

    Options: ``secret``, the passphrase; with ``metadata_only`` it is not asked for, and the content is locked;
    ``unlock_seconds``, of processor time. ImageError when the passphrase opens none of the slots, and for what cannot
    be tried. OSError.
    """
    _try_hashes(header, storage.path)
    if options.get("metadata_only"):
        return LockedCipher(storage.path)
    allowed = options.get("unlock_seconds", UNLOCK_SECONDS)
    key = await unlock(header, storage, offset, needed_secret(options, storage.path), allowed)
    return make_cipher(header.cipher, key)


def _try_hashes(header: Header, path: str) -> None:
    for field, value, name in (
        ("LUKS hash spec", header.hash, header.hash),
        ("LUKS cipher mode", header.cipher.mode_text, header.cipher.iv_hash),
    ):
        if name is not None and not is_available(name):
            raise UnsupportedImageError(path, "not available in this build of OpenSSL", field=field, value=value)
    if header.cipher.iv_hash is not None:
        try:
            essiv_key(b"", header.cipher.iv_hash)
        except ValueError as error:
            raise CorruptImageError(path, str(error), field="LUKS cipher mode", value=header.cipher.mode_text) from None


def is_available(hash_name: str) -> bool:
    """Whether OpenSSL has it: a build may leave old ones out."""
    try:
        hashlib.pbkdf2_hmac(hash_name, b"", b"", 1)
    except ValueError:
        return False
    return True


async def unlock(header: Header, storage: Storage, offset: int, secret: bytes, allowed: float) -> bytes:
    """The volume key, from the first slot that the passphrase opens, within ``allowed`` seconds."""
    async for _, key in open_slots(header, storage, offset, secret, allowed):
        return key
    tried = [number for number, slot in enumerate(header.slots) if slot.active]
    problem = "the secret opens none of them" if tried else "none is in use, so no secret can open it"
    raise ImageError(storage.path, problem, field="LUKS key slots", value=tried)


async def opens(header: Header, storage: Storage, offset: int, secret: bytes) -> bool:
    """Whether the passphrase opens a slot."""
    async for _ in open_slots(header, storage, offset, secret, UNLOCK_SECONDS):
        return True
    return False


async def open_slots(
    header: Header, storage: Storage, offset: int, secret: bytes, allowed: float
) -> AsyncIterator[tuple[int, bytes]]:
    """The slots that the passphrase opens, ascending, each with the volume key; all within ``allowed`` seconds.

    UnsupportedImageError before one that would take longer.
    """
    pool, path, key_bytes = worker_pool(), storage.path, header.cipher.key_bytes
    speed = await pool.run(iterations_per_second, header.hash)
    spent = 0.0

    def charge(field: str, iterations: int, output_bytes: int) -> None:
        nonlocal spent
        spent += iterations * pbkdf2_blocks(header.hash, output_bytes) / speed
        if spent > allowed:
            raise UnsupportedImageError(
                path,
                f"to try the passphrase would take about {spent:.0f} seconds, and {allowed:g} are allowed",
                field=field,
                value=iterations,
                hint="nbdserve serve --unlock-seconds allows more",
            )

    for number, slot in enumerate(header.slots):
        if not slot.active:
            continue
        charge(f"LUKS key slot {number} iterations", slot.iterations, key_bytes)
        charge("LUKS key iterations", header.digest_iterations, layout.DIGEST_BYTES)
        material = await storage.read(offset + slot.offset, header.cipher.material_bytes)
        key = await pool.run(_open_slot, header, slot, material, secret)
        if key is not None:
            yield number, key


def _open_slot(header: Header, slot: KeySlot, material: bytearray, secret: bytes) -> bytes | None:
    """The volume key, if ``secret`` is the slot's passphrase. Slow."""
    key_bytes = header.cipher.key_bytes
    slot_key = hashlib.pbkdf2_hmac(header.hash, secret, slot.salt, slot.iterations, key_bytes)
    make_cipher(header.cipher, slot_key).decrypt(0, memoryview(material))
    key = antiforensic.merge(material[: key_bytes * slot.stripes], key_bytes, header.hash)
    digest = key_digest(header.hash, key, header.digest_salt, header.digest_iterations)
    return key if hmac.compare_digest(digest, header.digest) else None


def key_digest(hash_name: str, key: bytes, salt: bytes, iterations: int) -> bytes:
    """By which the header tells whether a volume key is the right one. Slow."""
    return hashlib.pbkdf2_hmac(hash_name, key, salt, iterations, layout.DIGEST_BYTES)


def pbkdf2_blocks(hash_name: str, output_bytes: int) -> int:
    """PBKDF2 does all its iterations anew for each so many bytes as a digest has."""
    return div_ceil(output_bytes, hashlib.new(hash_name, usedforsecurity=False).digest_size)


@functools.cache
def iterations_per_second(hash_name: str) -> float:
    """PBKDF2's speed in one block, by the time this thread has had the processor; measured once, in 20 ms."""
    iterations = 1000
    while True:
        start = time.thread_time()
        hashlib.pbkdf2_hmac(hash_name, b"passphrase", bytes(layout.SALT_BYTES), iterations, 1)
        seconds = time.thread_time() - start
        if seconds >= _CALIBRATION_SECONDS:
            return iterations / seconds
        iterations *= 2
