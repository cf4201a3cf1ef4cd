"""The qcow header, both ways, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.qcow import layout
from nbdserve.formats.qcow.layout import HEADER, Header

GOOD = Header(size=10 << 20, cluster_bits=12, l2_bits=9, l1_table_offset=48)
FILE_SIZE = 560


def parse(data: bytes, file_size: int = FILE_SIZE) -> Header:
    return Header.parse(data, "x.qcow", file_size)


def with_field(name: str, value: int | bytes) -> bytes:
    fields = HEADER.parse(GOOD.build())
    fields[name] = value
    return bytes(HEADER.build(fields))


def test_a_header_is_read_as_it_was_built() -> None:
    assert parse(GOOD.build()) == GOOD
    assert len(GOOD.build()) == layout.HEADER_LENGTH


def test_the_name_of_the_backing_file_follows_and_is_padded() -> None:
    header = dataclasses.replace(GOOD, backing_name="base", l1_table_offset=56)
    data = header.build()
    assert data[48:] == b"base\0\0\0\0"
    parsed = parse(data)
    assert (parsed.backing_offset, parsed.backing_length) == (48, 4)
    assert parsed.with_backing_name(b"base").backing_name == "base"


def test_the_disk_has_whole_sectors() -> None:
    """QEMU rounds down."""
    assert [dataclasses.replace(GOOD, size=size).disk_size for size in (2, 511, 512, 1535)] == [0, 0, 512, 1024]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("magic", b"QFI\xfa", CorruptImageError),
        ("version", 2, UnsupportedImageError),
        ("cluster_bits", 8, CorruptImageError),
        ("cluster_bits", 17, CorruptImageError),
        ("l2_bits", 5, CorruptImageError),
        ("l2_bits", 14, CorruptImageError),
        ("size", 0, CorruptImageError),
        ("size", 1, CorruptImageError),
        ("size", 1 << 63, CorruptImageError),
        ("size", 9 << 40, UnsupportedImageError),
        ("crypt_method", 2, UnsupportedImageError),
        ("l1_table_offset", 0, CorruptImageError),
        ("l1_table_offset", 560, CorruptImageError),
        ("l1_table_offset", (1 << 64) - 8, CorruptImageError),
    ],
)
def test_what_is_refused_is_named(field: str, value: int | bytes, error: type[ImageError]) -> None:
    with pytest.raises(error) as refusal:
        parse(with_field(field, value))
    assert type(refusal.value) is error
    assert (refusal.value.field, refusal.value.value) == (field, value)


@pytest.mark.parametrize(
    ("offset", "length", "field"), [(48, 1024, "backing_file_size"), (550, 11, "backing_file_offset")]
)
def test_a_backing_name_that_cannot_be(offset: int, length: int, field: str) -> None:
    fields = HEADER.parse(GOOD.build())
    fields.backing_file_offset, fields.backing_file_size = offset, length
    with pytest.raises(CorruptImageError) as refusal:
        parse(bytes(HEADER.build(fields)))
    assert refusal.value.field == field


def test_without_an_offset_there_is_no_name_whatever_its_length() -> None:
    assert parse(with_field("backing_file_size", 1 << 31)).backing_length == 0


def test_a_short_file() -> None:
    with pytest.raises(CorruptImageError, match="too short"):
        parse(GOOD.build()[:47], 47)


def test_a_name_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="longer than"):
        dataclasses.replace(GOOD, backing_name="n" * 1024).build()


@given(st.binary(min_size=48, max_size=48), st.integers(0, 1 << 40))
def test_any_bytes_are_a_header_or_an_image_error(data: bytes, file_size: int) -> None:
    try:
        header = parse(layout.MAGIC + b"\0\0\0\1" + data[8:], file_size)
    except ImageError:
        return
    assert header.l1_table_offset + header.l1_entries * 8 <= file_size
