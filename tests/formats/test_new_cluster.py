"""A plain cluster in new space: shown when it is written, and given back when that fails."""

from __future__ import annotations

import errno

import pytest

from nbdserve.formats.new_cluster import write_new
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB


class Full(MemoryStorage):
    """No write is possible while ``full``."""

    full = False

    async def write(self, offset: int, data: ReadBuffer) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        await super().write(offset, data)


async def test_it_is_shown_when_it_is_written_and_given_back_otherwise() -> None:
    storage = Full()
    await Qcow2Driver.create(storage, MIB, {})
    driver = await Qcow2Driver.open(storage, {}, read_only=False)
    cluster = memoryview(b"x" * 64 * KIB)
    while driver.lookup(0, 64 * KIB) is None:
        await driver.load(0)
    before = driver.lookup(0, 64 * KIB)
    storage.full = True
    with pytest.raises(OSError, match="No space left"):
        await write_new(driver, 0, cluster)
    assert driver.lookup(0, 64 * KIB) == before
    storage.full = False
    await write_new(driver, 0, cluster)
    run = driver.lookup(0, 64 * KIB)
    assert run is not None
    assert await storage.read(run[2], 64 * KIB) == bytes(cluster)
    await driver.flush()
    found = await driver.check()
    assert (found.corruptions, found.leaks) == (0, 0)
    await driver.close()
