"""Sizes: alignment, and the way users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.units import (
    GIB,
    KIB,
    MIB,
    TIB,
    align_down,
    align_up,
    div_ceil,
    format_size,
    is_power_of_two,
    parse_size,
)

_offsets = st.integers(0, (1 << 64) - 1)
_alignments = st.integers(1, 1 << 22)


@given(_offsets, _alignments)
def test_a_value_lies_between_its_neighbouring_multiples(value: int, alignment: int) -> None:
    low, high = align_down(value, alignment), align_up(value, alignment)
    assert low <= value <= high
    assert low % alignment == high % alignment == 0
    assert high - low == (0 if value % alignment == 0 else alignment)
    assert div_ceil(value, alignment) * alignment == high


def test_powers_of_two() -> None:
    assert [value for value in range(-8, 70) if is_power_of_two(value)] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("512b", 512),
        ("64k", 64 * KIB),
        ("64K", 64 * KIB),
        (" 1.5G ", 3 * GIB // 2),
        ("10T", 10 * TIB),
        ("1KiB", KIB),
        ("2P", 1 << 51),
        ("7E", 7 << 60),
        (str((1 << 63) - 1), (1 << 63) - 1),
    ],
)
def test_sizes_as_users_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "K",
        "-1",
        "1.G",
        "1 K",
        "1KK",
        "0x10",
        "1e3",
        "8E",
        str(1 << 63),
        "nan",
        "inf",
        pytest.param("9" * 5000, id="9"),
    ],
)
def test_what_is_no_size_is_named_in_the_error(text: str) -> None:
    with pytest.raises(ValueError, match="invalid size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (64 * KIB, "64 KiB"),
        (1000 * KIB, "1000 KiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (10 * TIB, "10 TiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert format_size(size) == text
