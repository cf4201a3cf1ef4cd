"""Extended L2 entries: what happens inside a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.subclusters import SubclusterDriver
from tests.formats.qcow2.engine import change, check, content, create, open_image, read, run, write

SUB = 2048


@pytest.fixture
async def driver(tmp_path: Path) -> Qcow2Driver:
    below = tmp_path / "base.raw"
    below.write_bytes(b"b" * (1 << 20))
    path = create(tmp_path / "a.qcow2", "1M", "extended_l2=on,cluster_size=64k", "-b", below, "-F", "raw")
    return await open_image(path)


def _look(driver: Qcow2Driver, offset: int, length: int) -> tuple[int, int]:
    found = driver.lookup(offset, length)
    assert found is not None
    return found[:2]


async def _closed(driver: Qcow2Driver) -> bytes:
    await driver.close()
    path = Path(driver.path)
    assert check(path).get("leaks", 0) == 0
    return content(path)


async def test_only_the_subclusters_written_are_allocated(driver: Qcow2Driver) -> None:
    assert isinstance(driver, SubclusterDriver) and driver.granularity == SUB
    await write(driver, 3 * SUB + 5, b"x" * SUB, b"b" * (1 << 20))
    assert _look(driver, 0, 65536) == (UNALLOCATED, 3 * SUB)
    assert _look(driver, 3 * SUB, 65536) == (DATA, 2 * SUB)
    assert _look(driver, 5 * SUB, 65536) == (UNALLOCATED, 65536)
    before = driver.lookup(3 * SUB, SUB)
    await write(driver, 5 * SUB, b"y" * SUB, b"b" * (1 << 20))
    assert driver.lookup(3 * SUB, 65536) == (DATA, 3 * SUB, before[2] if before else 0)
    expected = bytearray(b"b" * (1 << 20))
    expected[3 * SUB + 5 : 4 * SUB + 5] = b"x" * SUB
    expected[5 * SUB : 6 * SUB] = b"y" * SUB
    assert await _closed(driver) == expected


async def test_zeroes_and_the_last_subcluster_freed(driver: Qcow2Driver) -> None:
    await write(driver, 0, b"x" * 2 * SUB)
    host = (driver.lookup(0, 1) or (0, 0, 0))[2]
    assert await change(driver, "zero", 0, SUB, unmap=True) == [(0, SUB)]
    assert driver.lookup(0, SUB) == (ZERO, SUB, host)
    assert _look(driver, SUB, SUB) == (DATA, SUB)
    assert await change(driver, "discard", SUB, SUB) == [(SUB, SUB)]
    assert driver.lookup(0, 65536) == (ZERO, 2 * SUB, -1)
    await driver.flush()
    assert await _closed(driver) == bytes(2 * SUB) + b"b" * ((1 << 20) - 2 * SUB)


async def test_zero_without_unmap_keeps_the_host_cluster(driver: Qcow2Driver) -> None:
    await write(driver, 0, b"x" * 65536)
    host = (driver.lookup(0, 1) or (0, 0, 0))[2]
    await change(driver, "zero", 0, 65536, unmap=False)
    assert driver.lookup(0, 65536) == (ZERO, 65536, host)
    await write(driver, SUB, b"y")
    assert driver.lookup(SUB, SUB) == (DATA, SUB, host + SUB)
    assert (await _closed(driver))[:65536] == bytes(SUB) + b"y" + bytes(65536 - SUB - 1)


async def test_a_part_of_a_compressed_cluster(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "a.qcow2"
    data = b"abcd" * (1 << 16)
    raw.write_bytes(data)
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "extended_l2=on", raw, path)
    driver = await open_image(path)
    await driver.prepare(0, 65536)
    assert _look(driver, 5000, 65536) == (COMPRESSED, 65536 - 5000)
    assert driver.zero(0, SUB, unmap=True) == 0
    await write(driver, 3 * SUB, b"x" * 100)
    assert _look(driver, 0, 65536) == (DATA, 65536)
    assert await change(driver, "zero", 65536, 65536, unmap=True) == [(65536, 65536)]
    expected = bytearray(data)
    expected[3 * SUB : 3 * SUB + 100] = b"x" * 100
    expected[65536:131072] = bytes(65536)
    assert await read(driver, 0, len(data)) == expected
    assert await _closed(driver) == expected


async def test_a_long_write_that_begins_inside_a_cluster_allocates_that_one_alone(driver: Qcow2Driver) -> None:
    """The clusters behind are not shown before they are written."""
    offset = 65536 - 2 * SUB
    while (allocation := driver.allocate(offset, 4 * 65536)) is None:
        await driver.prepare(offset, 4 * 65536)
    assert allocation.length == 2 * SUB
    await driver.data.write(allocation.host_offset, b"x" * 2 * SUB)
    driver.publish(allocation)
    assert _look(driver, 65536, 65536) == (UNALLOCATED, 65536)
    await driver.close()
