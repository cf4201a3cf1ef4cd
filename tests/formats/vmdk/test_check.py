from pathlib import Path
from typing import Any

import pytest

from nbdserve.errors import ImageError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.vmdk.driver import VmdkDriver
from nbdserve.formats.vmdk.layout import UNCLEAN_AT
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.formats.vmdk.files import GRAIN, content, driver_of, patch, qemu_io, stock, tables
from tests.support.images import needs_qemu

pytestmark = needs_qemu
RGD, GD = 0x15 * 512, 0x1E * 512
"""Where the directories of the image of these tests are,"""
RGT, GT = 0x16 * 512, 0x1F * 512
"""and their first tables."""


def image(path: Path) -> Path:
    stock(path, 64 * MIB)
    qemu_io(path, "write -P 1 0 256k", "write -P 2 33M 64k")
    data = path.read_bytes()
    assert int.from_bytes(data[GD : GD + 4], "little") * 512 == GT
    assert int.from_bytes(data[RGD : RGD + 4], "little") * 512 == RGT
    return path


async def checked(path: Path, *, repair: bool = False, **options: Any) -> CheckResult:
    storage = await FileStorage.open(str(path), read_only=not repair)
    driver = await VmdkDriver.open(storage, options, read_only=True)
    try:
        return await driver.check(repair_errors=repair)
    finally:
        await driver.close()


async def test_a_good_image(tmp_path: Path) -> None:
    path = image(tmp_path / "a.vmdk")
    result = await checked(path)
    assert (result.corruptions, result.leaks, result.check_errors, result.messages) == (0, 0, 0, [])
    assert (result.total_clusters, result.allocated_clusters, result.fragmented_clusters) == (1024, 5, 0)
    assert result.image_end_offset == path.stat().st_size
    for kind in ("monolithicFlat", "twoGbMaxExtentSparse"):
        driver = await driver_of(stock(tmp_path / f"{kind}.vmdk", MIB, f"subformat={kind}"))
        assert (await driver.check()).corruptions == 0
        await driver.close()


def word(value: int) -> bytes:
    return value.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("place", "value", "count"),
    [
        (RGT + 8, word(0), 1),
        (RGT + 100, word(128) * 3, 3),
        (GT + 8, word(0xFFFFFFF), 1),
        (GT + 8, word(5), 1),
        (GT + 8, word(1), 1),
        (GD, word(0), 1),
        (GD, word(0xFFFFFFF), 1),
        (GD + 4, word(GT // 512), 1),
        (RGD, word(0), 1),
        (RGD + 4, word(0xFFFFFFF), 1),
    ],
)
async def test_what_one_copy_still_has_is_repaired(tmp_path: Path, place: int, value: bytes, count: int) -> None:
    path = image(tmp_path / "a.vmdk")
    good, before = path.read_bytes(), content(path)
    patch(path, place, value)
    bad = path.read_bytes()
    result = await checked(path)
    assert result.corruptions >= count
    assert len(result.messages) > 0
    assert path.read_bytes() == bad
    result = await checked(path, repair=True)
    assert (result.corruptions, result.corruptions_fixed >= count) == (0, True)
    assert path.read_bytes() == good
    assert (await checked(path)).corruptions == 0
    assert content(path) == before


async def test_a_table_that_is_valid_wins_over_its_copy(tmp_path: Path) -> None:
    path = image(tmp_path / "a.vmdk")
    patch(path, GT + 40, word(128))
    await checked(path, repair=True)
    primary, redundant = tables(path)
    assert primary == redundant
    assert primary[10] == 128
    # And now two grains are in one place, which nothing can repair.
    result = await checked(path, repair=True)
    assert (result.corruptions, result.corruptions_fixed) == (1, 0)
    assert "overlap" in result.messages[0]


async def test_what_is_invalid_in_both_stays_and_is_counted(tmp_path: Path) -> None:
    path = image(tmp_path / "a.vmdk")
    for place in (GT, RGT):
        patch(path, place + 20, word(0x7FFFFFFF))
    before = path.read_bytes()
    result = await checked(path, repair=True)
    assert (result.corruptions, result.corruptions_fixed) == (1, 0)
    assert "entry 5 is 0x7fffffff" in result.messages[0]
    assert path.read_bytes() == before


async def test_the_mark_of_a_crash_is_cleared_by_a_repair(tmp_path: Path) -> None:
    path = image(tmp_path / "a.vmdk")
    patch(path, UNCLEAN_AT, b"\1")
    await checked(path)
    assert path.read_bytes()[UNCLEAN_AT] == 1
    await checked(path, repair=True)
    assert path.read_bytes()[UNCLEAN_AT] == 0


async def test_copies_that_differ_after_a_crash_are_harmless(tmp_path: Path) -> None:
    path = image(tmp_path / "a.vmdk")
    good = path.read_bytes()
    patch(path, UNCLEAN_AT, b"\1")
    patch(path, RGT + 8, word(0) * 2)
    result = await checked(path)
    assert (result.corruptions, result.leaks) == (0, 2)
    storage = await FileStorage.open(str(path))
    driver = await VmdkDriver.open(storage, {}, read_only=True)
    result = await driver.check(repair_leaks=True)
    await driver.close()
    assert (result.leaks, result.leaks_fixed) == (0, 2)
    assert path.read_bytes() == good
    # An entry that only the copy has is more than that.
    patch(path, UNCLEAN_AT, b"\1")
    patch(path, GT + 8, word(0xFFFFFFF))
    result = await checked(path)
    assert (result.corruptions, result.leaks) == (2, 0)


async def test_a_repair_needs_a_writable_file(tmp_path: Path) -> None:
    driver = await driver_of(image(tmp_path / "a.vmdk"), read_only=True)
    with pytest.raises(ImageError, match="writing"):
        await driver.check(repair_errors=True)
    await driver.close()


async def test_messages_are_bounded_and_errors_are_not(tmp_path: Path) -> None:
    path = image(tmp_path / "a.vmdk")
    for place in (GT, RGT):
        patch(path, place, word(0x7FFFFFFF) * 512)
    result = await checked(path)
    assert result.corruptions == 512
    assert len(result.messages) == 100


async def test_changes_in_memory_are_checked(tmp_path: Path) -> None:
    driver = await driver_of(image(tmp_path / "a.vmdk"))
    while (allocation := driver.allocate(GRAIN * 20, GRAIN)) is None:
        await driver.prepare(GRAIN * 20, GRAIN)
    await driver.data.write(allocation.host_offset, bytes(GRAIN))
    driver.publish(allocation)
    assert (await driver.check()).allocated_clusters == 6
    await driver.close()
    assert content(tmp_path / "a.vmdk")[: 256 * KIB] == b"\1" * 256 * KIB
