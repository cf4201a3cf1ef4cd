"""Where the second map of a VDI image is, and what is written there."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from nbdserve.formats.vdi.layout import FREE, Header, plan
from nbdserve.formats.vdi.two_maps import TwoMaps, placeholder_words
from nbdserve.units import GIB, MIB, TIB


def _moved(size: int, map_offset: int, data_offset: int, **fields: int) -> Header:
    return dataclasses.replace(plan(size), map_offset=map_offset, data_offset=data_offset, **fields)


@pytest.mark.parametrize("size", [0, 512, 5 * MIB + 512, 100 * GIB, 200 * GIB, 2 * TIB])
def test_images_made_here_have_room(size: int) -> None:
    header = plan(size)
    maps = TwoMaps.of(header)
    assert maps is not None
    assert maps.active == 512 and maps.other % 512 == 0
    assert maps.most >= 1024
    behind = header.disk_blocks * 4 + maps.most * 4
    assert maps.active + behind <= maps.other
    assert maps.other + behind <= header.data_offset
    back = TwoMaps.of(dataclasses.replace(header, map_offset=maps.other, blocks=header.disk_blocks + maps.most))
    assert back is not None and back.other == 512


def test_a_map_behind_the_middle_has_its_second_at_the_beginning() -> None:
    maps = TwoMaps.of(_moved(200 * GIB, MIB, 2 * MIB))  # as VirtualBox lays it out
    assert maps is not None
    assert (maps.active, maps.other) == (MIB, 512)


@pytest.mark.parametrize(
    "header",
    [
        _moved(5 * MIB, 512, 1024),  # as QEMU lays it out
        _moved(5 * MIB, 512, 512 + 3 * 512),
        _moved(256 * GIB, MIB, 2 * MIB),
        _moved(5 * MIB, 512, MIB, blocks=200_000),
        _moved(5 * MIB, MIB, 512),
        _moved(5 * MIB, 512, MIB, header_size=1 << 31),
    ],
)
def test_no_room(header: Header) -> None:
    assert TwoMaps.of(header) is None


def test_placeholders_begin_with_a_sector() -> None:
    words, count = placeholder_words(130, [7, 9])
    assert count == 258
    assert struct.unpack(f"<{len(words) // 4}I", words) == (FREE,) * 126 + (7, 9) + (FREE,) * 126
    assert placeholder_words(128, [])[0] == b""


def test_placeholders_that_there_is_no_room_for_are_left_out() -> None:
    maps = TwoMaps(512, 4096, 10, 3)
    assert maps.placeholders({1, 2, 3, 4}) == ([], 10)
    assert maps.placeholders(()) == ([], 10)
    ((at, words),), count = maps.placeholders({1, 2, 3})
    assert (at, len(words), count) == (4096 + 40, 1024 - 40, 131)


def test_the_other_place_gets_what_it_lacks() -> None:
    maps = TwoMaps(512, 4096, 1000, 9)
    maps.note([(0, b"a" * 1024), (2048, b"b" * 100)])
    assert maps.missing([]) == [(4096, b"a" * 512), (4608, b"a" * 512), (6144, b"b" * 100)]
    written = [(512, b"c" * 512)]
    assert maps.missing(written) == [(4096, b"a" * 512), (6144, b"b" * 100)]
    maps.switched(written)
    assert (maps.active, maps.other) == (4096, 512)
    assert maps.missing([]) == [(1024, b"c" * 512)]
    maps.switched([])
    assert maps.missing([]) == []
