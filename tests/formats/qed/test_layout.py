"""The QED header, both ways, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.qed import layout
from nbdserve.formats.qed.layout import HEADER, Header, backing_name_range

GOOD = Header(cluster_size=65536, table_size=4, header_size=1, l1_table_offset=65536, image_size=10 << 20)
FILE_SIZE = 5 * 65536


def parse(data: bytes, file_size: int = FILE_SIZE) -> Header:
    return Header.parse(data, "x.qed", file_size)


def with_field(name: str, value: int | bytes, header: Header = GOOD) -> bytes:
    fields = HEADER.parse(header.build()[: layout.HEADER_LENGTH])
    fields[name] = value
    return bytes(HEADER.build(fields))


def test_a_header_is_read_as_it_was_built() -> None:
    assert parse(GOOD.build()) == GOOD
    assert len(GOOD.build()) == layout.HEADER_LENGTH


def test_the_backing_file_name_is_behind_the_header() -> None:
    header = dataclasses.replace(GOOD, features=layout.FEATURE_BACKING, backing_name="büse \udcff.img")
    data = header.build()
    parsed = parse(data)
    place = backing_name_range(data, parsed, "x.qed")
    assert place == (64, len("büse .img".encode()) + 1)
    assert parsed.with_backing_name(data[place[0] : sum(place)]) == header
    assert header.backing_format is None
    assert dataclasses.replace(header, features=layout.FEATURE_BACKING | 4).backing_format == "raw"


def test_without_the_feature_there_is_no_name() -> None:
    assert backing_name_range(with_field("backing_filename_size", 7), GOOD, "x") is None


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("magic", b"QED\1", CorruptImageError),
        ("features", 8, UnsupportedImageError),
        ("features", 1 << 63, UnsupportedImageError),
        ("cluster_size", 2048, CorruptImageError),
        ("cluster_size", 128 << 20, CorruptImageError),
        ("cluster_size", 65537, CorruptImageError),
        ("table_size", 0, CorruptImageError),
        ("table_size", 3, CorruptImageError),
        ("table_size", 32, CorruptImageError),
        ("header_size", 0, CorruptImageError),
        ("header_size", 65536, CorruptImageError),
        ("image_size", 513, CorruptImageError),
        ("image_size", (1 << 64) - 512, CorruptImageError),
        ("l1_table_offset", 0, CorruptImageError),
        ("l1_table_offset", 65536 + 512, CorruptImageError),
        ("l1_table_offset", 2 * 65536, CorruptImageError),
    ],
)
def test_what_is_refused_is_named(field: str, value: int | bytes, error: type[ImageError]) -> None:
    with pytest.raises(error) as refusal:
        parse(with_field(field, value))
    assert type(refusal.value) is error
    assert (refusal.value.field, refusal.value.value) == (field, value)


def test_a_short_file() -> None:
    with pytest.raises(CorruptImageError, match="too short"):
        parse(GOOD.build()[:63], 63)


@pytest.mark.parametrize(("offset", "length", "field"), [(64, 1024, "size"), (65530, 10, "offset")])
def test_a_backing_name_that_is_not_in_the_header(offset: int, length: int, field: str) -> None:
    fields = HEADER.parse(GOOD.build())
    fields.features, fields.backing_filename_offset, fields.backing_filename_size = 1, offset, length
    data = bytes(HEADER.build(fields))
    with pytest.raises(CorruptImageError) as refusal:
        backing_name_range(data, parse(data), "x.qed")
    assert refusal.value.field == f"backing_filename_{field}"


def test_the_largest_disk() -> None:
    small = dataclasses.replace(GOOD, cluster_size=4096, table_size=1, l1_table_offset=4096)
    assert small.max_image_size == 512 * 512 * 4096
    large = dataclasses.replace(GOOD, cluster_size=64 << 20, table_size=16)
    assert large.max_image_size == (1 << 63) - 512


@pytest.mark.parametrize("length", [1024, 70000])
def test_a_name_that_does_not_fit(length: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        dataclasses.replace(GOOD, backing_name="n" * length).build()


@given(st.binary(min_size=64, max_size=64), st.integers(0, 1 << 40))
def test_any_bytes_are_a_header_or_an_image_error(data: bytes, file_size: int) -> None:
    try:
        header = parse(layout.MAGIC + data[4:], file_size)
    except ImageError:
        return
    assert header.l1_table_offset + header.table_bytes <= file_size
    assert header.l1_used <= header.table_entries
