"""LUKS headers: both ways, as qemu-img sees them, and every bad field by its name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.luks import layout
from nbdserve.formats.luks.layout import CipherSpec, Header, KeySlot, parse_cipher, slot_offsets
from tests.formats.encryption.stock import QUICK, Stock
from tests.support import images

ROOM = 4 << 20
SLOT = 208
"""Where the first key slot is in the header; each has 48 bytes."""


def header(**changes: Any) -> Header:
    spec = CipherSpec("xts", "plain64", None, 64)
    offsets, payload = slot_offsets(spec)
    fields: dict[str, Any] = {
        "cipher": spec,
        "hash": "sha256",
        "payload_offset": payload,
        "digest": bytes(range(20)),
        "digest_salt": bytes(range(32)),
        "digest_iterations": 1000,
        "uuid": "54ab3614-5473-43e3-a1d0-665929128d75",
        "slots": tuple(
            KeySlot(number in (0, 5), 2000 + number, bytes([number]) * 32, offset)
            for number, offset in enumerate(offsets)
        ),
    }
    return Header(**fields | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cipher": CipherSpec("cbc", "essiv", "sha256", 32), "hash": "sha512"},
        {"cipher": CipherSpec("cbc", "plain", None, 16), "payload_offset": 8 << 20},
    ],
)
def test_both_ways(changes: dict[str, Any]) -> None:
    one = header(**changes)
    data = one.build()
    assert len(data) == layout.HEADER_BYTES == 592
    assert Header.parse(data, "disk", ROOM) == one
    assert Header.parse(data + b"rest", "disk", ROOM).build() == data


@images.needs_qemu
@pytest.mark.parametrize("options", ["", "cipher-alg=aes-128,cipher-mode=cbc,hash-alg=sha1"])
def test_the_facts_are_those_of_qemu_img(tmp_path: Path, options: str) -> None:
    path = Stock(tmp_path).create("a.luks", "luks", f"key-secret=s,{QUICK},{options}".rstrip(","), "1M")
    data = path.read_bytes()
    found = Header.parse(data[:592], str(path), len(data))
    assert found.build() == data[:592]
    assert found.describe() == images.info(path)["format-specific"]["data"]
    offsets, payload = slot_offsets(found.cipher)
    assert ([slot.offset for slot in found.slots], found.payload_offset) == (offsets, payload)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [
        (0, b"LUKX", "LUKS magic"),
        (6, b"\0\2", "LUKS version"),
        (8, b"serpent\0", "LUKS cipher name"),
        (8, b"a" * 32, "LUKS cipher name"),
        (8, b"\xff\xff\0", "LUKS cipher name"),
        (40, b"ecb\0", "LUKS cipher mode"),
        (40, b"ctr-plain64\0", "LUKS cipher mode"),
        (40, b"xts-benbi\0", "LUKS cipher mode"),
        (40, b"xts-plain64:sha256\0", "LUKS cipher mode"),
        (40, b"cbc-essiv\0", "LUKS cipher mode"),
        (40, b"cbc-essiv:\0", "LUKS cipher mode"),
        (40, b"cbc-essiv:whirlpool\0", "LUKS cipher mode"),
        (40, b"x" * 32, "LUKS cipher mode"),
        (72, b"whirlpool\0", "LUKS hash spec"),
        (72, b"s" * 32, "LUKS hash spec"),
        (104, u32(7), "LUKS payload offset sector"),
        (104, u32(0), "LUKS payload offset sector"),
        (108, u32(0), "LUKS key bytes"),
        (108, u32(16), "LUKS key bytes"),
        (108, u32(0xFFFFFFFF), "LUKS key bytes"),
        (164, u32(0), "LUKS key iterations"),
        (168, b"u" * 40, "LUKS uuid"),
        (SLOT, u32(1), "LUKS key slot 0 state"),
        (SLOT + 4, u32(0), "LUKS key slot 0 iterations"),
        (SLOT + 40, u32(0), "LUKS key slot 0 key material offset"),
        (SLOT + 40, u32(0xFFFFFFFF), "LUKS key slot 0 key material offset"),
        (SLOT + 44, u32(3999), "LUKS key slot 0 stripes"),
        (SLOT + 48 * 3 + 44, u32(0xFFFFFFFF), "LUKS key slot 3 stripes"),
        (SLOT + 48 * 7 + 40, u32(513), "LUKS key slot 7 key material offset"),
    ],
)
def test_bad_fields_are_named(at: int, value: bytes, field: str) -> None:
    data = bytearray(header().build())
    data[at : at + len(value)] = value
    with pytest.raises((CorruptImageError, UnsupportedImageError)) as caught:
        Header.parse(data, "disk", ROOM)
    assert caught.value.path == "disk"
    assert caught.value.field is not None
    if field != "LUKS payload offset sector":  # the slots, which must be before it, are looked at first
        assert caught.value.field == field
    assert caught.value.value is not None


def test_key_material_of_active_slots_is_there() -> None:
    data = header().build()
    end = header().slots[5].offset + 64 * 4000
    Header.parse(data, "disk", end)
    with pytest.raises(CorruptImageError) as caught:
        Header.parse(data, "disk", end - 1)
    assert caught.value.field == "LUKS key slot 5 key material offset"


@pytest.mark.parametrize("length", [0, 6, 591])
def test_a_short_header(length: int) -> None:
    with pytest.raises(CorruptImageError):
        Header.parse(header().build()[:length], "disk", ROOM)


@pytest.mark.parametrize(
    ("text", "key_bytes", "algorithm"),
    [
        ("xts-plain64", 64, "aes-256"),
        ("xts-plain", 48, "aes-192"),
        ("xts-essiv:sha256", 32, "aes-128"),
        ("cbc-essiv:sha256", 32, "aes-256"),
        ("cbc-plain64", 24, "aes-192"),
        ("cbc-plain", 16, "aes-128"),
    ],
)
def test_ciphers_by_their_text(text: str, key_bytes: int, algorithm: str) -> None:
    spec = parse_cipher("disk", "aes", text, key_bytes)
    assert (spec.mode_text, spec.algorithm) == (text, algorithm)
    assert spec.material_bytes % 512 == 0
    assert 0 <= spec.material_bytes - key_bytes * 4000 < 512


def test_every_value_of_every_byte_parses_or_is_refused() -> None:
    good = header().build()
    for at in range(0, len(good), 3):
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            data = bytearray(good)
            data[at] = value
            try:
                Header.parse(data, "disk", ROOM)
            except ImageError as error:
                assert error.field
