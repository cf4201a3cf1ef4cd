"""The parent locator, both ways, and what a hostile one may not do."""

from __future__ import annotations

import time
from uuid import UUID, uuid4

import pytest

from nbdserve.errors import ConfigError, CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.vhdx.locator import ENTRY, HEAD, VHDX_LOCATOR, ParentLocator, locator_for

GUID = uuid4()


def _built(values: dict[str, str]) -> bytes:
    return ParentLocator(values).build()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("parent.vhdx", "relative_path", "parent.vhdx"),
        ("../up/é parent.vhdx", "relative_path", "..\\up\\é parent.vhdx"),
        ("/srv/images/parent.vhdx", "absolute_win32_path", "\\srv\\images\\parent.vhdx"),
    ],
)
def test_a_name_there_and_back(name: str, key: str, value: str) -> None:
    locator = locator_for(name, GUID)
    assert locator.values == {"parent_linkage": f"{{{GUID}}}", key: value}
    again = ParentLocator.parse(locator.build(), "x")
    assert again == locator
    assert again.name == name
    assert again.linkages("x") == (GUID,)


def test_paths_are_tried_in_the_order_of_the_specification() -> None:
    everything = {
        "parent_linkage": f"{{{GUID}}}",
        "absolute_win32_path": "\\\\?\\d:\\p.vhdx",
        "volume_path": "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\p.vhdx",
        "relative_path": "..\\p.vhdx",
    }
    assert ParentLocator.parse(_built(everything), "x").name == "../p.vhdx"
    del everything["relative_path"]
    assert ParentLocator.parse(_built(everything), "x").name.startswith("//?/Volume{")
    del everything["volume_path"]
    assert ParentLocator.parse(_built(everything), "x").name == "//?/d:/p.vhdx"


def test_both_linkages_count_in_any_case_of_letters() -> None:
    other = uuid4()
    values = {
        "parent_linkage": f"{{{str(GUID).upper()}}}",
        "parent_linkage2": f"{{{other}}}",
        "relative_path": "p",
        "unknown": "x",
    }
    locator = ParentLocator.parse(_built(values), "x")
    assert locator.linkages("x") == (GUID, other)
    assert "unknown" not in locator.values


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"relative_path": "p"}, "parent_linkage"),
        ({"parent_linkage2": f"{{{GUID}}}", "relative_path": "p"}, "parent_linkage"),
        ({"parent_linkage": "me", "relative_path": "p"}, "parent_linkage"),
        ({"parent_linkage": f"{{{GUID}}}"}, "parent locator"),
        ({"parent_linkage": f"{{{GUID}}}", "relative_path": ""}, "parent locator"),
    ],
)
def test_a_parent_that_cannot_be_told(values: dict[str, str], field: str) -> None:
    with pytest.raises(CorruptImageError) as caught:
        ParentLocator.parse(_built(values), "x")
    assert caught.value.field == field


def _raw(count: int, *entries: tuple[int, int, int, int], kind: UUID = VHDX_LOCATOR, tail: bytes = b"") -> bytes:
    head: bytes = HEAD.build({"locator_type": kind.bytes_le, "reserved": 0, "count": count})
    return head + b"".join(ENTRY.pack(*entry) for entry in entries) + tail


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"short", "length of parent locator"),
        (_raw(0, kind=UUID(int=3)), "LocatorType"),
        (_raw(1), "KeyValueCount"),
        (_raw(0xFFFF), "KeyValueCount"),
        (_raw(1, (32, 32, 40, 2), tail=b"ab"), "offset of key"),
        (_raw(1, (0xFFFF_FFFF, 0, 2, 2)), "offset of key"),
        (_raw(1, (32, 32, 2, 2), tail=b"\x00\xd8"), "key"),
        (_raw(1, (32, 60, 26, 200), tail="relative_path".encode("utf-16-le")), "offset of relative_path"),
    ],
)
def test_locators_that_cannot_be(data: bytes, field: str) -> None:
    with pytest.raises(ImageError) as caught:
        ParentLocator.parse(data, "x")
    assert caught.value.field == field
    assert isinstance(caught.value, CorruptImageError | UnsupportedImageError)


def test_a_key_that_is_there_twice() -> None:
    key = "relative_path".encode("utf-16-le")
    with pytest.raises(CorruptImageError, match="relative_path"):
        ParentLocator.parse(_raw(2, *[(44, 44, len(key), 2)] * 2, tail=key), "x")


def test_many_entries_over_the_same_bytes_cost_little() -> None:
    """The item has at most 1 MiB, but each entry could name 128 KiB of it."""
    data = _raw(65535, *[(20, 20, 65534, 65534)] * 65535)
    started = time.process_time()
    with pytest.raises(CorruptImageError):
        ParentLocator.parse(data, "x")
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", ["a\\b.vhdx", "a\udcff.vhdx"])
def test_names_that_cannot_be_stored(name: str) -> None:
    with pytest.raises(ConfigError, match="backing_file="):
        locator_for(name, GUID)


def test_a_name_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="65535"):
        locator_for("a" * 40000, GUID).build()
