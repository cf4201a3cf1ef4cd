"""What the check of Parallels images finds, and what it mends."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest

from nbdserve.errors import RequestError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.parallels import extension
from nbdserve.formats.parallels.driver import ParallelsDriver
from nbdserve.formats.parallels.extension import DirtyBitmap
from nbdserve.formats.parallels.layout import IN_USE, Header, plan
from nbdserve.units import KIB, MIB
from tests.formats import flat
from tests.formats.parallels.test_extension import ID, TRANSIT
from tests.support import images

pytestmark = images.needs_qemu
CLUSTER = 64 * KIB
SIZE = 6 * CLUSTER


def _image(path: Path, entries: list[int], clusters: int, *, tail: int = 0, in_use: bool = False) -> Path:
    """``clusters`` clusters of data, each full of its number, counted from 1 as an entry does."""
    header = plan(SIZE, cluster_size=CLUSTER)
    if in_use:
        header = dataclasses.replace(header, in_use=IN_USE)
    data = b"".join(bytes([number + 1]) * CLUSTER for number in range(clusters))
    path.write_bytes((header.build() + struct.pack("<6I", *entries)).ljust(CLUSTER, b"\0") + data + b"j" * tail)
    return path


async def _check(path: Path, **how: bool) -> CheckResult:
    result: CheckResult = await flat.check_alone(ParallelsDriver, path, **how)
    return result


def _stock(path: Path) -> tuple[int, int]:
    out = images.run("qemu-img", "check", "--output=json", "-f", "parallels", path, codes=(0, 2, 3))
    found = json.loads(out)
    return found.get("corruptions", 0), found.get("leaks", 0)


async def test_clean(tmp_path: Path) -> None:
    path = _image(tmp_path / "a", [0, 2, 1, 3, 0, 4], 4)
    result = await _check(path, repair_leaks=True, repair_errors=True)
    assert (result.corruptions, result.leaks, result.check_errors, result.messages) == (0, 0, 0, [])
    assert (result.total_clusters, result.allocated_clusters, result.fragmented_clusters) == (6, 4, 2)
    stock = json.loads(images.run("qemu-img", "check", "--output=json", "-f", "parallels", path))
    assert stock["image-end-offset"] == result.image_end_offset == 5 * CLUSTER
    assert stock["total-clusters"] == 6 and stock["allocated-clusters"] == 4


@pytest.mark.parametrize(
    ("entries", "clusters", "tail", "in_use", "corruptions", "leaks"),
    [
        pytest.param([0, 1, 0, 0, 0, 0], 1, 0, True, 1, 0, id="in use"),
        pytest.param([0, 1, 0, 0, 0, 0], 1, 100_000, False, 0, 2, id="tail"),
        pytest.param([0, 1, 0, 0, 0, 0], 1, 512, True, 1, 1, id="in use, tail"),
        pytest.param([0, 1, 9, 0, 0xFFFFFFFF, 0], 1, 0, False, 2, 0, id="outside"),
        pytest.param([2, 1, 2, 2, 1, 0], 2, 0, False, 3, 0, id="shared"),
        pytest.param([2, 1, 2, 8, 0, 0], 2, 512, True, 3, 1, id="everything"),
    ],
)
async def test_faults_are_found_and_mended(
    tmp_path: Path, entries: list[int], clusters: int, tail: int, in_use: bool, corruptions: int, leaks: int
) -> None:
    path = _image(tmp_path / "a", entries, clusters, tail=tail, in_use=in_use)
    before = path.read_bytes()
    result = await _check(path)
    assert (result.corruptions, result.leaks) == (corruptions, leaks)
    if 2 not in entries:  # what is shared, QEMU does not see
        assert _stock(path)[0] == corruptions
    assert path.read_bytes() == before
    fixed = await _check(path, repair_leaks=True, repair_errors=True)
    assert (fixed.corruptions, fixed.leaks) == (0, 0)
    assert (fixed.corruptions_fixed, fixed.leaks_fixed) == (corruptions, leaks)
    images.check(path, "parallels")
    model = b"".join(bytes([e if e <= clusters else 0]) * CLUSTER for e in entries)
    assert flat.content(path, "parallels") == model
    at = 5 * CLUSTER
    images.qemu_io(path, "parallels", [f"write -P 0x77 0 {CLUSTER}", f"write -P 0x66 {at} 512"])
    model = b"\x77" * CLUSTER + model[CLUSTER:at] + b"\x66" * 512 + bytes(CLUSTER - 512)
    assert flat.content(path, "parallels") == model
    images.check(path, "parallels")


async def test_only_what_is_asked_for_is_mended(tmp_path: Path) -> None:
    path = _image(tmp_path / "a", [0, 1, 9, 0, 0, 0], 1, tail=512, in_use=True)
    result = await _check(path, repair_leaks=True)
    assert (result.corruptions, result.leaks, result.corruptions_fixed, result.leaks_fixed) == (2, 0, 0, 1)
    assert path.stat().st_size == 2 * CLUSTER
    result = await _check(path, repair_errors=True)
    assert (result.corruptions, result.corruptions_fixed) == (0, 2)


@pytest.mark.parametrize("transit", [False, True])
async def test_the_clusters_of_a_bitmap_are_in_use(tmp_path: Path, transit: bool) -> None:
    header = plan(SIZE, cluster_size=CLUSTER)
    header = dataclasses.replace(header, extension_offset=2 * CLUSTER)
    bitmap = extension.build_bitmap(DirtyBitmap(ID, CLUSTER, (3 * CLUSTER // 512,)), header)
    body = extension.build((bitmap, TRANSIT) if transit else (bitmap,), CLUSTER)
    head = (header.build() + struct.pack("<I", 1)).ljust(CLUSTER, b"\0")
    path = tmp_path / "a"
    path.write_bytes(head + b"d" * CLUSTER + body + b"\x05".ljust(CLUSTER, b"\0") + b"j" * 512)
    result = await _check(path, repair_leaks=True, repair_errors=True)
    assert (result.leaks_fixed, result.corruptions) == (0 if transit else 1, 0)
    assert path.stat().st_size == (4 * CLUSTER + 512 if transit else 4 * CLUSTER)
    driver = await flat.open_with(ParallelsDriver, path, read_only=True)
    assert [r async for r in driver.dirty_ranges(driver.extension.bitmaps[0])] == [
        (0, CLUSTER),
        (2 * CLUSTER, CLUSTER),
    ]
    await driver.close()


async def test_a_bitmap_outside_the_file_makes_no_file_longer(tmp_path: Path) -> None:
    header = plan(SIZE, cluster_size=CLUSTER)
    header = dataclasses.replace(header, extension_offset=2 * CLUSTER)
    bitmap = extension.build_bitmap(DirtyBitmap(ID, CLUSTER, ((1 << 64) - 1,)), header)
    head = (header.build() + struct.pack("<I", 1)).ljust(CLUSTER, b"\0")
    path = tmp_path / "a"
    path.write_bytes(head + b"d" * CLUSTER + extension.build((bitmap,), CLUSTER) + bytes(CLUSTER))
    result = await _check(path, repair_leaks=True, repair_errors=True)
    assert (result.leaks_fixed, result.image_end_offset, path.stat().st_size) == (1, 3 * CLUSTER, 3 * CLUSTER)


async def test_repairing_an_image_in_use_drops_its_bitmaps(tmp_path: Path) -> None:
    path = _image(tmp_path / "a", [0, 1, 0, 0, 0, 0], 1, in_use=True)
    with path.open("r+b") as file:
        file.seek(56)
        file.write(struct.pack("<Q", 2 * CLUSTER // 512))
    await _check(path, repair_errors=True)
    assert Header.parse(path.read_bytes(), "a", 9 * MIB).extension_offset == 0


async def test_an_open_image_is_checked_as_it_is_in_memory(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a", SIZE, "parallels", cluster_size=str(CLUSTER))
    driver = await flat.open_with(ParallelsDriver, path)
    await flat.write(driver, CLUSTER, b"x")
    result = await driver.check()
    assert (result.allocated_clusters, result.corruptions, result.leaks) == (1, 1, 0)
    assert result.messages == ["ERROR: the image was not closed"]
    await driver.close()
    assert (await _check(path)).corruptions == 0


async def test_nothing_is_written_after_a_repair(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a", SIZE, "parallels", cluster_size=str(CLUSTER))
    for first in (False, True):
        driver = await flat.open_with(ParallelsDriver, path)
        if first:
            await flat.write(driver, CLUSTER, b"x")
        await driver.check(repair_leaks=True, repair_errors=True)
        for offset in (0, CLUSTER):
            with pytest.raises(RequestError, match="repaired since it was opened"):
                await flat.write(driver, offset, b"y")
        await driver.close()
        images.check(path, "parallels")
