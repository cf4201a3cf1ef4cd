from __future__ import annotations

import pytest

from nbdserve.errors import ImageError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.raw_cow.check import BackingSeen
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.formats.raw_cow.header import HeaderSector, read_header
from nbdserve.units import MIB
from tests.formats.raw_cow.engine import Files


async def broken(*, bits: bytes = b"", extra: int = 0, raw_size: int = MIB) -> Files:
    """An image of 16 clusters, the first ten of which are in the raw file."""
    files = Files(None)
    await files.create(MIB)
    await files.image.write(4096, b"\xff\x03" + bits)
    await files.image.truncate(files.image.size + extra)
    await files.raw.truncate(raw_size)
    return files


async def test_a_good_image() -> None:
    result = await (await (await broken()).driver(read_only=True)).check()
    assert (result.corruptions, result.leaks, result.messages) == (0, 0, [])
    assert (result.total_clusters, result.allocated_clusters, result.image_end_offset) == (16, 10, 4608)


@pytest.mark.parametrize(
    ("damage", "leaks", "message"),
    [
        ({"bits": b"\x81\x01"}, 3, "3 bits are set behind the last cluster"),
        ({"extra": 512 * 5}, 5, "5 sectors follow the bitmap"),
        ({"extra": 1}, 1, "1 sectors follow the bitmap"),
    ],
)
async def test_leaks(damage: dict[str, int], leaks: int, message: str) -> None:
    files = await broken(**damage)  # type: ignore[arg-type]
    driver = await files.driver(read_only=True)
    result = await driver.check()
    assert (result.corruptions, result.leaks, result.messages) == (0, leaks, [message])
    result = await driver.check(repair_leaks=True)
    assert (result.leaks, result.leaks_fixed) == (0, leaks)
    result = await (await files.driver(read_only=True)).check()
    assert (result.leaks, files.image.size) == (0, 4608)


@pytest.mark.parametrize(("raw_size", "lost"), [(0, 10), (65536, 9), (65537, 9), (65536 * 10 - 1, 1), (65536 * 10, 0)])
async def test_a_raw_file_that_was_cut_off(raw_size: int, lost: int) -> None:
    files = await broken(raw_size=raw_size)
    driver = await files.driver(read_only=True)
    result = await driver.check(repair_leaks=True)
    assert (result.corruptions, result.leaks, files.raw.size) == (lost, 0, raw_size)
    result = await driver.check(repair_errors=True)
    assert (result.corruptions, result.corruptions_fixed) == (0, lost)
    if lost:
        assert files.raw.size == MIB


async def test_a_raw_file_that_is_longer_than_the_disk_is_told() -> None:
    files = await broken(raw_size=MIB + 5)
    result = await (await files.driver(read_only=True)).check()
    assert (result.corruptions, result.leaks) == (0, 0)
    assert result.messages == ["the raw file has 5 bytes behind the end of the disk: they are no part of it"]


async def check_with(backing: BackingSeen, *, mtime: int, bits: bytes = b"\xff\x03") -> CheckResult:
    files = Files(b"content")
    await files.create(MIB)
    await files.image.write(4096, bits)
    _, stored = await read_header(files.image)
    await HeaderSector(files.image, stored).patch(mtime=mtime)
    driver = await files.driver(read_only=True)
    if backing != BackingSeen():
        driver.see_backing(backing.changed_at, backing.problem)
    return await driver.check()


@pytest.mark.parametrize(
    ("backing", "mtime", "message"),
    [
        (BackingSeen(), 1000, ""),
        (BackingSeen(1000.9), 1000, ""),
        (BackingSeen((1 << 32) + 1000.0), 1000, ""),
        (BackingSeen(2000.0), 0, ""),
        (
            BackingSeen(2000.0),
            1000,
            "WARNING the backing file 'base' was changed at 1970-01-01 00:33:20 UTC, and when this image was made it "
            "was of 1970-01-01 00:16:40 UTC: what is not in the raw file may have changed too",
        ),
        (BackingSeen(problem="it is gone"), 1000, "ERROR it is gone"),
    ],
)
async def test_the_backing_file_is_what_it_was(backing: BackingSeen, mtime: int, message: str) -> None:
    result = await check_with(backing, mtime=mtime)
    assert result.messages == [message] * bool(message)
    assert (result.corruptions, result.check_errors) == (0, bool(backing.problem))


@pytest.mark.parametrize("backing", [BackingSeen(2000.0), BackingSeen(problem="it is gone")])
async def test_a_backing_file_that_does_not_show_does_not_matter(backing: BackingSeen) -> None:
    result = await check_with(backing, mtime=1000, bits=b"\xff\xff")
    assert (result.messages, result.check_errors) == ([], 0)


async def test_a_raw_file_that_is_not_open_is_not_judged() -> None:
    files = await broken(raw_size=0)
    driver = await RawCowDriver.open(files.image, {"companions": [files.image]}, read_only=True)
    assert (await driver.check()).corruptions == 0


async def test_a_read_only_file_is_not_repaired() -> None:
    files = await broken(extra=512)
    files.image.read_only = True
    driver = await files.driver(read_only=True)
    assert (await driver.check()).leaks == 1
    with pytest.raises(ImageError, match="read-only"):
        await driver.check(repair_leaks=True)


async def test_a_wrong_checksum_of_the_header() -> None:
    files = await broken()
    header = bytes(await files.image.read(0, 4096))
    await files.image.write(2056, b"\x12")  # in the time stamp
    for read_only in (True, False):
        with pytest.raises(ImageError, match="header_crc32c"):
            await files.driver(read_only=read_only)
    companions = await RawCowDriver.companions(files.image)
    assert companions[0].name == "vm.img"
    alone = {"companions": [files.image], "metadata_only": True}
    with pytest.raises(ImageError, match="header_crc32c"):
        await RawCowDriver.open(files.image, alone, read_only=False)
    driver = await RawCowDriver.open(files.image, alone, read_only=True)
    result = await driver.check(repair_leaks=True)
    assert (result.corruptions, result.messages) == (1, ["the header's checksum is wrong"])
    result = await driver.check(repair_errors=True)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert (await driver.check()).corruptions == 0
    await files.driver()
    changed = bytes(await files.image.read(0, 4096))
    assert [at for at in range(4096) if changed[at] != header[at]] == [2056, 2180, 2181, 2182, 2183]
