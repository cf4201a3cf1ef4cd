"""The bytes of a LUKS version 1 header, both ways (LUKS On-Disk Format Specification 1.2.3; big endian).

The same header begins a ``luks`` file and the LUKS area of an encrypted qcow2 image. Pure: nothing here does I/O.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Final

import construct as c

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.units import SECTOR_SIZE, align_up

MAGIC: Final = b"LUKS\xba\xbe"
KEY_SLOTS: Final = 8
STRIPES: Final = 4000
"""The one number that is in use: cryptsetup writes it, and QEMU opens no other."""
SLOT_ACTIVE: Final = 0x00AC71F3
SLOT_INACTIVE: Final = 0x0000DEAD
DIGEST_BYTES: Final = 20
SALT_BYTES: Final = 32
KEY_MATERIAL_AT: Final = 4096
"""Where the key material of the first slot begins, and what everything is aligned to."""

KEY_BYTES: Final = {"xts": (32, 48, 64), "cbc": (16, 24, 32)}
"""By cipher mode. XTS takes two AES keys."""
IV_GENERATORS: Final = ("plain", "plain64", "essiv")
HASHES: Final = ("sha1", "sha224", "sha256", "sha384", "sha512", "md5", "ripemd160")

KEY_SLOT: Final[Any] = c.Struct(
    "state" / c.Int32ub,
    "iterations" / c.Int32ub,
    "salt" / c.Bytes(SALT_BYTES),
    "key_material_sector" / c.Int32ub,
    "stripes" / c.Int32ub,
)
HEADER: Final[Any] = c.Struct(
    "magic" / c.Bytes(6),
    "version" / c.Int16ub,
    "cipher_name" / c.Bytes(32),
    "cipher_mode" / c.Bytes(32),
    "hash_spec" / c.Bytes(32),
    "payload_sector" / c.Int32ub,
    "key_bytes" / c.Int32ub,
    "digest" / c.Bytes(DIGEST_BYTES),
    "digest_salt" / c.Bytes(SALT_BYTES),
    "digest_iterations" / c.Int32ub,
    "uuid" / c.Bytes(40),
    "key_slots" / c.Array(KEY_SLOTS, KEY_SLOT),
)
HEADER_BYTES: Final[int] = HEADER.sizeof()
"""592"""
SLOT_BYTES: Final[int] = KEY_SLOT.sizeof()
SLOTS_AT: Final = HEADER_BYTES - KEY_SLOTS * SLOT_BYTES
"""Where the slots begin in the header."""


@dataclass(frozen=True, slots=True)
class KeySlot:
    """A copy of the volume key, encrypted under one passphrase, if ``active``."""

    active: bool
    iterations: int
    """Of PBKDF2."""
    salt: bytes
    offset: int
    """Of the key material, bytes from the start of the header."""
    stripes: int = STRIPES

    def fields(self) -> dict[str, Any]:
        """As the header has them."""
        return {
            "state": SLOT_ACTIVE if self.active else SLOT_INACTIVE,
            "iterations": self.iterations,
            "salt": self.salt,
            "key_material_sector": self.offset // SECTOR_SIZE,
            "stripes": self.stripes,
        }

    def build(self) -> bytes:
        """Its 48 bytes of the header."""
        data: bytes = KEY_SLOT.build(self.fields())
        return data


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """How sectors are encrypted: AES, with what."""

    mode: str
    """``xts`` or ``cbc``."""
    iv_generator: str
    iv_hash: str | None
    """Of ``essiv``."""
    key_bytes: int

    @property
    def algorithm(self) -> str:
        """QEMU's name for it: ``aes-128``, ``aes-192``, ``aes-256``."""
        return f"aes-{self.key_bytes * (4 if self.mode == 'xts' else 8)}"

    @property
    def mode_text(self) -> str:
        """As the header has it: ``xts-plain64``, ``cbc-essiv:sha256``."""
        text = f"{self.mode}-{self.iv_generator}"
        return text if self.iv_hash is None else f"{text}:{self.iv_hash}"

    @property
    def material_bytes(self) -> int:
        """Of a slot's key material, in whole sectors."""
        return align_up(self.key_bytes * STRIPES, SECTOR_SIZE)


@dataclass(frozen=True, slots=True)
class Header:
    """A LUKS header, checked against itself and the room there is."""

    cipher: CipherSpec
    hash: str
    payload_offset: int
    """Bytes from the start of the header."""
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @classmethod
    def parse(cls, data: bytes | bytearray, path: str, room: int) -> Header:
        """The header in the first HEADER_BYTES of ``data``; ``room`` bytes from its start on are there.

        CorruptImageError and UnsupportedImageError name field and value.
        """
        if len(data) < HEADER_BYTES:
            raise CorruptImageError(path, "too short for a LUKS header", field="LUKS header length", value=len(data))
        fields = HEADER.parse(bytes(data))
        if fields.magic != MAGIC:
            raise CorruptImageError(path, "not a LUKS header", field="LUKS magic", value=fields.magic)
        if fields.version != 1:
            raise UnsupportedImageError(path, "version 1 is known", field="LUKS version", value=fields.version)
        spec = parse_cipher(
            path,
            _text(path, "cipher name", fields.cipher_name),
            _text(path, "cipher mode", fields.cipher_mode),
            fields.key_bytes,
        )
        hash_name = _text(path, "hash spec", fields.hash_spec)
        if hash_name not in HASHES:
            raise UnsupportedImageError(path, f"known are {', '.join(HASHES)}", field="LUKS hash spec", value=hash_name)
        if not fields.digest_iterations:
            raise CorruptImageError(path, "must not be 0", field="LUKS key iterations", value=0)
        slots = tuple(
            _parse_slot(path, number, slot, spec, fields.payload_sector, room)
            for number, slot in enumerate(fields.key_slots)
        )
        _refuse_overlaps(path, slots, spec)
        if fields.payload_sector * SECTOR_SIZE < KEY_MATERIAL_AT:
            raise CorruptImageError(
                path, "overlaps the header", field="LUKS payload offset sector", value=fields.payload_sector
            )
        return cls(
            cipher=spec,
            hash=hash_name,
            payload_offset=fields.payload_sector * SECTOR_SIZE,
            digest=fields.digest,
            digest_salt=fields.digest_salt,
            digest_iterations=fields.digest_iterations,
            uuid=_text(path, "uuid", fields.uuid),
            slots=slots,
        )

    def build(self) -> bytes:
        """The header's HEADER_BYTES."""
        data: bytes = HEADER.build(
            {
                "magic": MAGIC,
                "version": 1,
                "cipher_name": b"aes".ljust(32, b"\0"),
                "cipher_mode": self.cipher.mode_text.encode().ljust(32, b"\0"),
                "hash_spec": self.hash.encode().ljust(32, b"\0"),
                "payload_sector": self.payload_offset // SECTOR_SIZE,
                "key_bytes": self.cipher.key_bytes,
                "digest": self.digest,
                "digest_salt": self.digest_salt,
                "digest_iterations": self.digest_iterations,
                "uuid": self.uuid.encode().ljust(40, b"\0"),
                "key_slots": [slot.fields() for slot in self.slots],
            }
        )
        return data

    def describe(self, format_name: str | None = None) -> dict[str, Any]:
        """What qemu-img prints, in its order, as the format-specific information; ``format_name`` only inside qcow2."""
        spec = self.cipher
        facts: dict[str, Any] = {"ivgen-alg": spec.iv_generator, "hash-alg": self.hash, "cipher-alg": spec.algorithm}
        facts["uuid"] = self.uuid
        if spec.iv_hash is not None:
            facts["ivgen-hash-alg"] = spec.iv_hash
        if format_name is not None:
            facts["format"] = format_name
        facts["cipher-mode"] = spec.mode
        facts["slots"] = [
            {"active": True, "iters": slot.iterations, "key-offset": slot.offset, "stripes": slot.stripes}
            if slot.active
            else {"active": False, "key-offset": slot.offset}
            for slot in self.slots
        ]
        facts["payload-offset"] = self.payload_offset
        facts["master-key-iters"] = self.digest_iterations
        return facts


def slot_offsets(spec: CipherSpec) -> tuple[list[int], int]:
    """Where the key material of each slot and the payload go in a new volume, as cryptsetup and QEMU place them."""
    step = align_up(spec.key_bytes * STRIPES, KEY_MATERIAL_AT)
    return [KEY_MATERIAL_AT + number * step for number in range(KEY_SLOTS)], KEY_MATERIAL_AT + KEY_SLOTS * step


def parse_cipher(path: str, name: str, mode_text: str, key_bytes: int) -> CipherSpec:
    """The cipher a header names. UnsupportedImageError for what AES, XTS and CBC do not cover, by its name."""
    if name != "aes":
        raise UnsupportedImageError(path, "only aes is supported", field="LUKS cipher name", value=name)
    mode, _, iv_text = mode_text.partition("-")
    iv_generator, colon, iv_hash = iv_text.partition(":")
    field = "LUKS cipher mode"
    if mode not in KEY_BYTES:
        raise UnsupportedImageError(path, "only xts and cbc are supported", field=field, value=mode_text)
    if iv_generator not in IV_GENERATORS or bool(colon) != (iv_generator == "essiv"):
        raise UnsupportedImageError(
            path, "only plain, plain64 and essiv:HASH are supported for the IV", field=field, value=mode_text
        )
    if colon and iv_hash not in HASHES:
        raise UnsupportedImageError(path, f"known hashes are {', '.join(HASHES)}", field=field, value=mode_text)
    if key_bytes not in KEY_BYTES[mode]:
        raise CorruptImageError(path, f"aes-{mode} has {KEY_BYTES[mode]}", field="LUKS key bytes", value=key_bytes)
    return CipherSpec(mode, iv_generator, iv_hash if colon else None, key_bytes)


def _text(path: str, field: str, stored: bytes) -> str:
    text, end, _ = stored.partition(b"\0")
    if not end or not text.isascii():
        raise CorruptImageError(path, "not a terminated ASCII text", field=f"LUKS {field}", value=stored)
    return text.decode("ascii")


def _parse_slot(path: str, number: int, fields: Any, spec: CipherSpec, payload_sector: int, room: int) -> KeySlot:
    def bad(field: str, value: int, problem: str) -> ImageError:
        return CorruptImageError(path, problem, field=f"LUKS key slot {number} {field}", value=value)

    if fields.state not in (SLOT_ACTIVE, SLOT_INACTIVE):
        raise bad("state", fields.state, f"must be {SLOT_ACTIVE:#x} or {SLOT_INACTIVE:#x}")
    active = fields.state == SLOT_ACTIVE
    offset = fields.key_material_sector * SECTOR_SIZE
    if fields.stripes != STRIPES:
        raise bad("stripes", fields.stripes, f"must be {STRIPES}")
    if active and not fields.iterations:
        raise bad("iterations", 0, "must not be 0")
    if offset < align_up(HEADER_BYTES, SECTOR_SIZE):
        raise bad("key material offset", fields.key_material_sector, "overlaps the header")
    if offset + spec.key_bytes * STRIPES > payload_sector * SECTOR_SIZE:
        raise bad("key material offset", fields.key_material_sector, "overlaps the payload")
    if active and offset + spec.key_bytes * STRIPES > room:
        raise bad("key material offset", fields.key_material_sector, f"ends after the {room} bytes there are")
    return KeySlot(active, fields.iterations, fields.salt, offset, fields.stripes)


def _refuse_overlaps(path: str, slots: tuple[KeySlot, ...], spec: CipherSpec) -> None:
    """Setting a key in one of two slots that overlap would destroy the other."""
    ordered = sorted((slot.offset, number) for number, slot in enumerate(slots))
    for (offset, number), (follows, other) in itertools.pairwise(ordered):
        if offset + spec.key_bytes * STRIPES > follows:
            raise CorruptImageError(
                path,
                f"overlaps that of slot {number}",
                field=f"LUKS key slot {other} key material offset",
                value=follows // SECTOR_SIZE,
            )
