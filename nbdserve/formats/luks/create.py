"""Making LUKS volumes: the options, and a header with one passphrase.

Defaults and places are those of QEMU and cryptsetup, so that either would have made the same header.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.encryption import UNLOCK_SECONDS
from nbdserve.formats.encryption.ciphers import essiv_key
from nbdserve.formats.luks import antiforensic, layout
from nbdserve.formats.luks.keys import (
    is_available,
    iterations_per_second,
    key_digest,
    make_cipher,
    pbkdf2_blocks,
)
from nbdserve.formats.luks.layout import CipherSpec, Header, KeySlot
from nbdserve.storage.pool import worker_pool
from nbdserve.units import SECTOR_SIZE

MAX_ITER_TIME_MS: Final = int(UNLOCK_SECONDS * 1000) // 4
"""So that a machine a quarter as fast still opens it."""
_MIN_ITERATIONS: Final = 1000
"""However little time is given: QEMU's minimum, and that of the specification."""
_MAX_ITERATIONS: Final = (1 << 31) - 1
_DIGEST_SHARE: Final = 8
"""The digest of the volume key gets an eighth of the time of the passphrase, as with QEMU and cryptsetup."""
_AES_KEY_BYTES: Final = {"aes-128": 16, "aes-192": 24, "aes-256": 32}


@dataclass(frozen=True, slots=True)
class VolumeOptions:
    """What a new volume is to be like."""

    cipher: CipherSpec
    hash: str
    iter_time_ms: int

    @property
    def header_length(self) -> int:
        """Bytes of the header and all key material: the encrypted data begins there."""
        return layout.slot_offsets(self.cipher)[1]


async def new_volume(options: VolumeOptions, secret: bytes) -> tuple[Header, Sequence[tuple[int, bytes]]]:
    """A header with one passphrase, and ``(offset, bytes)`` of it and its key material, from the header's start."""
    return await worker_pool().run(_new_volume, options, secret)


def _new_volume(options: VolumeOptions, secret: bytes) -> tuple[Header, Sequence[tuple[int, bytes]]]:
    spec, hash_name = options.cipher, options.hash
    offsets, payload_offset = layout.slot_offsets(spec)
    digest_iterations = _iterations(hash_name, layout.DIGEST_BYTES, options.iter_time_ms / _DIGEST_SHARE)
    key, digest_salt = os.urandom(spec.key_bytes), os.urandom(layout.SALT_BYTES)
    slot, material = new_slot(spec, hash_name, key, secret, options.iter_time_ms, offsets[0])
    header = Header(
        cipher=spec,
        hash=hash_name,
        payload_offset=payload_offset,
        digest=key_digest(hash_name, key, digest_salt, digest_iterations),
        digest_salt=digest_salt,
        digest_iterations=digest_iterations,
        uuid=str(uuid.uuid4()),
        slots=tuple(
            slot if number == 0 else KeySlot(False, 0, bytes(layout.SALT_BYTES), offset)
            for number, offset in enumerate(offsets)
        ),
    )
    return header, [(0, header.build()), (offsets[0], material)]


def new_slot(
    spec: CipherSpec, hash_name: str, key: bytes, secret: bytes, iter_time_ms: int, offset: int
) -> tuple[KeySlot, bytes]:
    """A slot in which ``secret`` opens the volume ``key``, and its key material, which is to be at ``offset``. Slow."""
    iterations = _iterations(hash_name, spec.key_bytes, iter_time_ms)
    salt = os.urandom(layout.SALT_BYTES)
    slot_key = hashlib.pbkdf2_hmac(hash_name, secret, salt, iterations, spec.key_bytes)
    material = antiforensic.split(key, layout.STRIPES, hash_name)
    material += bytes(spec.material_bytes - len(material))
    return KeySlot(True, iterations, salt, offset), bytes(make_cipher(spec, slot_key).encrypt(0, material))


def _iterations(hash_name: str, output_bytes: int, milliseconds: float) -> int:
    """Of PBKDF2 in that time."""
    wanted = iterations_per_second(hash_name) * milliseconds / 1000 / pbkdf2_blocks(hash_name, output_bytes)
    return max(_MIN_ITERATIONS, min(int(wanted), _MAX_ITERATIONS))


def parse_volume_options(options: Mapping[str, str]) -> VolumeOptions:
    """The options of qemu-img's ``luks``, without the prefix ``encrypt.``; ConfigError names a bad one.

    ``key-secret`` names the passphrase, and is for the caller to look up.
    """

    def choice(name: str, default: str, choices: Sequence[str]) -> str:
        value = options.get(name, default)
        if value not in choices:
            raise ConfigError(f"{name}={value}: expects one of {', '.join(choices)}")
        return value

    algorithm = choice("cipher-alg", "aes-256", tuple(_AES_KEY_BYTES))
    mode = choice("cipher-mode", "xts", ("xts", "cbc"))
    generator = choice("ivgen-alg", "plain64", layout.IV_GENERATORS)
    hash_name = choice("hash-alg", "sha256", layout.HASHES)
    iv_hash = choice("ivgen-hash-alg", "sha256", layout.HASHES) if generator == "essiv" else None
    key_bytes = _AES_KEY_BYTES[algorithm] * (2 if mode == "xts" else 1)
    if key_bytes * layout.STRIPES % SECTOR_SIZE:
        raise ConfigError(f"cipher-alg={algorithm} with cipher-mode={mode}: QEMU cannot open such volumes")
    for name in (hash_name, iv_hash):
        if name is not None and not is_available(name):
            raise ConfigError(f"{name} is not available in this build of OpenSSL")
    if iv_hash is not None:
        try:
            essiv_key(b"", iv_hash)
        except ValueError as error:
            raise ConfigError(f"ivgen-hash-alg={iv_hash}: {error}") from None
    milliseconds = parse_iter_time(options.get("iter-time"))
    return VolumeOptions(CipherSpec(mode, generator, iv_hash, key_bytes), hash_name, milliseconds)


def parse_iter_time(text: str | None) -> int:
    """Milliseconds of PBKDF2. ConfigError."""
    text = text or "2000"
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= MAX_ITER_TIME_MS):
        raise ConfigError(f"iter-time={text}: expects milliseconds, at most {MAX_ITER_TIME_MS}")
    return int(text)


def passphrase(secret: bytes | None) -> bytes:
    """The passphrase of a new volume. ConfigError when it is not there, or not what QEMU takes: UTF-8."""
    if secret is None:
        raise ConfigError("an encrypted image needs a secret, its passphrase")
    try:
        secret.decode()
    except UnicodeDecodeError:
        raise ConfigError("the secret is not UTF-8, which QEMU requires of a passphrase") from None
    return secret
