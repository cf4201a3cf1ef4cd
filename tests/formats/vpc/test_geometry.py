"""Geometries are those qemu-img computes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.vpc.geometry import MAX_GEOMETRY, fitting_geometry, geometry_of, image_size
from tests.formats.vpc.files import stock

SIZES = (
    1, 34816, 34817, 1 << 20, 17 * 4096 * 512, 17 * 16384 * 512 + 512, 31 * 16384 * 512, 31 * 16384 * 512 + 512,
    504 << 20, (504 << 20) + 512, 65535 * 16 * 63 * 512 - 512, 65535 * 16 * 63 * 512, 65535 * 16 * 63 * 512 + 512,
    65535 * 16 * 255 * 512 - 512, 65535 * 16 * 255 * 512 + 512, 2040 << 30,
)  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_as_qemu_img(tmp_path: Path, size: int) -> None:
    head = stock(tmp_path / "a.vhd", size).open("rb").read(512)
    assert image_size(size, exact=False) == (
        struct.unpack_from(">Q", head, 48)[0],
        struct.unpack_from(">HBB", head, 56),
    )


def test_exact() -> None:
    assert image_size(1000, exact=True) == (1024, MAX_GEOMETRY)


@pytest.mark.parametrize("exact", [False, True])
def test_too_large(exact: bool) -> None:
    with pytest.raises(ConfigError, match="2040 GiB"):
        image_size((2040 << 30) + 512, exact=exact)


@pytest.mark.parametrize("sectors", [1, 67, 68, 69, 100_000, 1_032_193, 70_000_001])
def test_the_first_that_covers(sectors: int) -> None:
    cylinders, heads, per_track = fitting_geometry(sectors * 512)
    assert cylinders * heads * per_track >= sectors
    assert geometry_of(cylinders * heads * per_track) == (cylinders, heads, per_track)
