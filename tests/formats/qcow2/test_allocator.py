"""Free clusters: found lowest first, given back only after a commit, never metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nbdserve.errors import RequestError
from nbdserve.formats.qcow2.allocator import _merged, runs_of
from tests.formats.qcow2.engine import change, check, create, open_image, write


def test_ranges_are_joined_and_double_references_kept() -> None:
    assert _merged([(5, 2), (7, 1), (1, 1), (7, 1)]) == [(1, 1), (5, 3), (7, 1)]


def test_runs() -> None:
    assert runs_of(np.array([], np.int64)) == []
    assert runs_of(np.array([3, 4, 5, 9, 10, 2], np.int64)) == [(3, 3), (9, 2), (2, 1)]


async def test_holes_are_filled_before_the_file_grows(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "64M")
    driver = await open_image(path)
    await write(driver, 0, b"x" * (4 << 20))
    await driver.flush()
    size = driver.storage.size
    for offset in range(0, 4 << 20, 1 << 18):
        await change(driver, "discard", offset, 1 << 17)
    await driver.flush()
    await driver.flush()
    await write(driver, 8 << 20, b"y" * (2 << 20))
    assert driver.storage.size == size
    await write(driver, 16 << 20, b"z")
    assert driver.storage.size > size
    await driver.close()
    assert check(path).get("leaks", 0) == 0


async def test_zeroed_is_claimed_only_beyond_everything_ever_written(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "64M")
    driver = await open_image(path)
    await driver.prepare(0, 1 << 20)
    first = driver.allocate(0, 1 << 20)
    assert first is not None and first.zeroed and first.length == 1 << 20
    driver.abandon(first)
    await driver.flush()
    await driver.flush()
    again = driver.allocate(0, 1 << 20)
    assert again is not None and again.host_offset == first.host_offset and not again.zeroed
    await driver.data.write(again.host_offset, b"x" * again.length)
    driver.publish(again)
    await driver.close()
    assert check(path).get("leaks", 0) == 0


async def test_metadata_with_refcount_0_is_not_handed_out(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "64M")
    with path.open("r+b") as file:
        file.seek(0x20000)
        file.write(bytes(8))  # the refcounts of header, refcount table, refcount block and L1 table
    driver = await open_image(path)
    with pytest.raises(RequestError, match="hold metadata"):
        await write(driver, 0, b"x")
    await driver.close()


async def test_many_tables_are_written_back_before_memory_is_full_of_them(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "256M", "cluster_size=512")
    driver = await open_image(path)
    driver.cache._generation = 16
    for offset in range(0, 256 << 20, 256 << 10):
        await write(driver, offset, b"x" * 512)
    assert len(driver.cache.changed) <= 20
    await driver.close()
    assert check(path).get("leaks", 0) == 0
