"""The Parallels header both ways, and what is refused, field by field."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.parallels import layout
from nbdserve.formats.parallels.layout import MAGIC_V1, Header, plan
from nbdserve.units import KIB, MIB, TIB
from tests.support import images

FILE = 2 * MIB


def _patched(at: int, value: int, width: str = "<I") -> bytes:
    data = bytearray(plan(10 * MIB).build())
    struct.pack_into(width, data, at, value)
    return bytes(data)


@pytest.mark.parametrize("magic", [layout.MAGIC_V1, layout.MAGIC_EXT])
def test_what_is_built_is_parsed(magic: bytes) -> None:
    header = dataclasses.replace(
        plan(10 * MIB + 512, cluster_size=63 * 512),
        magic=magic,
        in_use=layout.IN_USE,
        flags=1,
        extension_offset=630 * 512,
        heads=3,
        cylinders=5,
    )
    assert Header.parse(header.build(), "x", FILE) == header


@pytest.mark.parametrize(
    ("at", "value", "kind", "field"),
    [
        (0, 0, CorruptImageError, "magic"),
        (16, 1, UnsupportedImageError, "version"),
        (16, 3, UnsupportedImageError, "version"),
        (28, 0, CorruptImageError, "tracks"),
        (28, layout.MAX_CLUSTER_SECTORS + 1, CorruptImageError, "tracks"),
        (28, 0xFFFFFFFF, CorruptImageError, "tracks"),
        (28, 1, CorruptImageError, "bat_entries"),
        (32, 9, CorruptImageError, "bat_entries"),
        (32, 0, CorruptImageError, "bat_entries"),
        (32, FILE // 4, CorruptImageError, "bat_entries"),
        (32, 0xFFFFFFFF, CorruptImageError, "bat_entries"),
        (36, 0xFFFFFFFF, CorruptImageError, "bat_entries"),
        (40, 1, CorruptImageError, "bat_entries"),
        (48, 2047, CorruptImageError, "data_off"),
        (48, 6144, CorruptImageError, "data_off"),
        (48, 0xFFFFF800, CorruptImageError, "data_off"),
    ],
)
def test_bad_fields_are_refused(at: int, value: int, kind: type[ImageError], field: str) -> None:
    with pytest.raises(kind) as caught:
        Header.parse(_patched(at, value), "x.hds", FILE)
    assert caught.value.field == field
    assert str(caught.value).startswith("x.hds: ")


def test_short_files_are_refused() -> None:
    data = plan(10 * MIB).build()
    with pytest.raises(CorruptImageError, match="too short"):
        Header.parse(data[:63], "x", 63)
    with pytest.raises(CorruptImageError, match="a table of so many does not fit"):
        Header.parse(data, "x", 64 + 39)
    Header.parse(data, "x", 64 + 40)


def test_a_data_offset_before_the_end_of_the_header_is_refused() -> None:
    with pytest.raises(CorruptImageError, match="not a multiple of the cluster size"):
        Header.parse(_patched(48, 1), "x", FILE)


def test_data_inside_the_table_is_refused() -> None:
    header = dataclasses.replace(plan(MIB, cluster_size=512), data_offset=8192)
    with pytest.raises(CorruptImageError, match="inside the block allocation table") as caught:
        Header.parse(header.build(), "x", FILE)
    assert (caught.value.field, caught.value.value) == ("data_off", 16)


@pytest.mark.parametrize(("magic", "offset"), [(layout.MAGIC_V1, 512), (layout.MAGIC_EXT, 64 * KIB)])
def test_without_a_data_offset_it_is_behind_the_table(magic: bytes, offset: int) -> None:
    header = dataclasses.replace(plan(MIB, cluster_size=64 * KIB), magic=magic, data_offset=0)
    assert Header.parse(header.build(), "x", FILE).data_offset == offset


def test_the_size_of_a_v1_image_has_32_bits() -> None:
    data = bytearray(dataclasses.replace(plan(10 * MIB), magic=MAGIC_V1).build())
    data[40] = 1
    header = Header.parse(data, "x", FILE)
    assert (header.size, header.entry_scale, header.host_limit) == (10 * MIB, 512, 2 * TIB)
    assert plan(MIB).entry_scale == MIB


@pytest.mark.parametrize("size", [0, 512, MIB, MIB + 512, 2 * TIB])
@pytest.mark.parametrize("cluster_size", [512 * 63, 64 * KIB, MIB, layout.MAX_CLUSTER_SECTORS * 512])
def test_planned_data_is_aligned_and_behind_the_table(size: int, cluster_size: int) -> None:
    header = plan(size, cluster_size=cluster_size)
    assert header.data_offset % cluster_size == 0
    assert header.bat_end <= header.data_offset < header.bat_end + cluster_size
    assert header.bat_entries * cluster_size >= size > (header.bat_entries - 1) * cluster_size
    assert Header.parse(header.build(), "x", header.data_offset) == header


@pytest.mark.parametrize("cluster_size", [0, 511, 1000, (layout.MAX_CLUSTER_SECTORS + 1) * 512])
def test_cluster_sizes_that_are_none(cluster_size: int) -> None:
    with pytest.raises(ValueError, match="must be a multiple of 512"):
        plan(MIB, cluster_size=cluster_size)


def test_a_cluster_size_that_is_too_small() -> None:
    plan(layout.MAX_BAT_ENTRIES * 512, cluster_size=512)
    with pytest.raises(ValueError, match="too small for a disk"):
        plan(layout.MAX_BAT_ENTRIES * 512 + 512, cluster_size=512)


@images.needs_qemu
@pytest.mark.parametrize("size", [512, MIB + 512, 200 * MIB])
def test_our_header_is_that_of_qemu(tmp_path: Path, size: int) -> None:
    images.create(tmp_path / "a", size, fmt="parallels")
    data = (tmp_path / "a").read_bytes()
    header = Header.parse(data, "a", len(data))
    assert header == dataclasses.replace(plan(size), in_use=layout.CLOSED_BY_OLD)
