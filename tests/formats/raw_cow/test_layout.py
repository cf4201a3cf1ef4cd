from __future__ import annotations

import struct

import pytest

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.raw_cow.layout import HEADER_SIZE, Header, header_checksum, stored_time, with_checksum
from nbdserve.units import GIB, KIB, MIB

HEADER = Header(
    size=GIB,
    raw_file="my_vm.img",
    backing_file="ubuntu.img",
    backing_format="qcow2",
    mtime=1311067534,
    compatible=5,
    autoclear=6,
)
FILE_SIZE = HEADER.end_offset


def field(data: bytes, at: int, value: bytes) -> bytes:
    """The header with other bytes at ``at``, and the checksum that goes with them."""
    return with_checksum(data[:at] + value + data[at + len(value) :])


def test_the_places_of_the_fields() -> None:
    """Written down once more, as the packed big-endian struct of the proposal with this project's fields behind it."""
    data = HEADER.build()
    assert len(data) == HEADER_SIZE
    assert struct.unpack_from(">4sI1024s1024siQI", data) == (
        b"RCOW",
        1,
        b"ubuntu.img".ljust(1024, b"\0"),
        b"my_vm.img".ljust(1024, b"\0"),
        1311067534,
        GIB,
        512,
    )
    assert struct.calcsize(">4sI1024s1024siQI") == 2072
    assert struct.unpack_from(">QQQ32s32sIQQI", data, 2072) == (
        0,
        5,
        6,
        b"qcow2".ljust(32, b"\0"),
        b"raw".ljust(32, b"\0"),
        65536,
        4096,
        GIB,
        header_checksum(data),
    )
    assert data[2184:] == bytes(4096 - 2184)


def test_both_ways() -> None:
    assert Header.parse(HEADER.build(), "x", FILE_SIZE) == HEADER
    alone = Header(size=512, raw_file="r\udcff", cluster_size=512, bitmap_offset=8192)
    assert Header.parse(alone.build(), "x", alone.end_offset) == alone


def test_sizes() -> None:
    assert (HEADER.clusters, HEADER.bitmap_bytes, HEADER.end_offset) == (16384, 2048, 4096 + 2048)
    odd = Header(size=9 * 64 * KIB + 512, raw_file="r")
    assert (odd.clusters, odd.bitmap_bytes, odd.end_offset) == (10, 2, 4096 + 512)


@pytest.mark.parametrize(
    ("at", "value", "name"),
    [
        (0, b"OOOM", "magic"),
        (4, b"\0\0\0\2", "version"),
        (8, b"x" * 1024, "backing_file"),
        (1032, b"x" * 1024, "raw_file"),
        (1032, b"\0", "raw_file"),
        (2060, (GIB + 1).to_bytes(8, "big"), "size"),
        (2060, (1 << 63).to_bytes(8, "big"), "size"),
        (2060, ((1 << 63) - 512).to_bytes(8, "big"), "size"),
        (2060, (2 * GIB).to_bytes(8, "big"), "bitmap_offset"),
        (2068, (4096).to_bytes(4, "big"), "sectorsize"),
        (2072, (1 << 40).to_bytes(8, "big"), "incompatible_features"),
        (2096, b"x" * 32, "backing_format"),
        (2128, b"qcow2", "raw_format"),
        (2128, b"\0", "raw_format"),
        (2160, (0).to_bytes(4, "big"), "cluster_size"),
        (2160, (256).to_bytes(4, "big"), "cluster_size"),
        (2160, (4 * MIB).to_bytes(4, "big"), "cluster_size"),
        (2160, (65537).to_bytes(4, "big"), "cluster_size"),
        (2164, (0).to_bytes(8, "big"), "bitmap_offset"),
        (2164, (4097).to_bytes(8, "big"), "bitmap_offset"),
        (2164, (1 << 63).to_bytes(8, "big"), "bitmap_offset"),
        (2164, (4608).to_bytes(8, "big"), "bitmap_offset"),
        (2172, (513).to_bytes(8, "big"), "backing_limit"),
    ],
)
def test_a_bad_field_is_named(at: int, value: bytes, name: str) -> None:
    with pytest.raises(ImageError) as caught:
        Header.parse(field(HEADER.build(), at, value), "disk.raw-cow", FILE_SIZE)
    assert caught.value.field == name
    assert str(caught.value).startswith("disk.raw-cow: ")


@pytest.mark.parametrize("at", [5, 100, 2070, 2180, 2183, 4095])
def test_any_damage_is_found(at: int) -> None:
    data = bytearray(HEADER.build())
    data[at] ^= 0x10
    with pytest.raises(ImageError) as caught:
        Header.parse(data, "x", FILE_SIZE)
    assert caught.value.field == ("version" if at == 5 else "header_crc32c")


def test_a_short_file() -> None:
    for length in (0, 100, 4095):
        with pytest.raises(CorruptImageError, match="too short"):
            Header.parse(HEADER.build()[:length], "x", length)


def test_unknown_features_are_listed() -> None:
    data = field(HEADER.build(), 2072, ((1 << 40) | 1).to_bytes(8, "big"))
    with pytest.raises(UnsupportedImageError, match="bit 0, bit 40"):
        Header.parse(data, "x", FILE_SIZE)


@pytest.mark.parametrize(
    "header",
    [
        Header(size=512, raw_file="r" * 1024),
        Header(size=512, raw_file="a\0b"),
        Header(size=512, raw_file="r", backing_file="é" * 512),
        Header(size=512, raw_file="r", backing_file="b", backing_format="f" * 32),
    ],
)
def test_a_name_that_does_not_fit(header: Header) -> None:
    with pytest.raises(ValueError, match=r"raw_file|backing_file|backing_fmt"):
        header.build()
    Header(size=512, raw_file="r" * 1023).build()


def test_times_after_2038_are_stored_in_32_bits() -> None:
    times = (0.5, (1 << 31) - 1, 1 << 31, 1 << 32)
    assert [stored_time(seconds) for seconds in times] == [0, (1 << 31) - 1, -(1 << 31), 0]
