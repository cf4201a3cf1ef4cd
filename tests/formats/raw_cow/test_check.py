from __future__ import annotations

import pytest

from nbdserve.errors import ImageError
from nbdserve.formats.raw_cow.driver import RawCowDriver
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
    alone = {"companions": [files.image]}
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
