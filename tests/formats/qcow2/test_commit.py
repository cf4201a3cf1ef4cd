"""The order of writes and barriers, group commit, and what a failure leaves to be done again."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from tests.formats.qcow2.engine import change, check, content, create, write


class Recorder(MemoryStorage):
    """Logs ``(what, offset)``; fails the ``fail_at``-th write or flush from then on counted, once."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.log: list[tuple[str, int]] = []
        self.fail_at = -1
        self.flushing: asyncio.Event | None = None

    def _count(self, what: str, offset: int) -> None:
        self.log.append((what, offset))
        if self.fail_at == 0:
            self.fail_at = -1
            raise OSError(errno.EIO, "injected")
        self.fail_at -= self.fail_at > 0

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self._count("write", offset)
        await super().write(offset, data)

    async def flush(self) -> None:
        self._count("flush", 0)
        if self.flushing is not None:
            await self.flushing.wait()

    def flushes(self) -> int:
        return sum(what == "flush" for what, _ in self.log)


async def _open(path: Path, **options: Any) -> tuple[Qcow2Driver, Recorder]:
    storage = Recorder(path.read_bytes())
    driver = await Qcow2Driver.open(storage, options, read_only=False)
    storage.log.clear()
    return driver, storage


async def test_nothing_changed_costs_one_flush(tmp_path: Path) -> None:
    driver, storage = await _open(create(tmp_path / "a", "8M"))
    await driver.flush()
    assert storage.log == [("flush", 0)]


async def test_an_allocating_write_costs_two_barriers_and_an_overwrite_one(tmp_path: Path) -> None:
    driver, storage = await _open(create(tmp_path / "a", "8M"))
    await write(driver, 0, b"x" * 65536)
    await driver.flush()
    block, l1, l2, data = 0x20000, 0x30000, 0x40000, 0x50000
    assert storage.log == [
        ("write", data),
        ("write", block),
        ("write", l2),
        ("flush", 0),
        ("write", l1),
        ("flush", 0),
    ]
    storage.log.clear()
    await write(driver, 0, b"y" * 65536)
    await driver.flush()
    assert storage.log == [("write", data), ("flush", 0)]
    storage.log.clear()
    await write(driver, 65536, b"y" * 65536)
    await driver.flush()
    assert storage.log == [("write", 0x60000), ("write", block), ("flush", 0), ("write", l2), ("flush", 0)]


async def test_a_new_refcount_block_has_a_barrier_of_its_own(tmp_path: Path) -> None:
    driver, storage = await _open(create(tmp_path / "a", "8M", "cluster_size=512,refcount_bits=64"))
    await write(driver, 0, b"x" * 65536)
    storage.log.clear()
    await driver.flush()
    assert storage.flushes() == 3
    table = driver.header.refcount_table_offset
    order = [offset for what, offset in storage.log]
    blocks = [driver.refcounts.block_offset(index) for index in range(1, 3)]
    assert max(order.index(block) for block in blocks) < order.index(0) < order.index(table)


async def test_flushes_that_wait_together_share_a_commit(tmp_path: Path) -> None:
    driver, storage = await _open(create(tmp_path / "a", "8M"))
    storage.flushing = asyncio.Event()
    await write(driver, 0, b"x")
    first = asyncio.create_task(driver.flush())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await write(driver, 1 << 20, b"y")
    others = [asyncio.create_task(driver.flush()) for _ in range(20)]
    await asyncio.sleep(0)
    assert not first.done() and storage.flushes() == 1
    storage.flushing.set()
    await asyncio.gather(first, *others)
    assert storage.flushes() == 4


async def test_a_cancelled_flush_does_not_stop_the_commit(tmp_path: Path) -> None:
    driver, storage = await _open(create(tmp_path / "a", "8M"))
    storage.flushing = asyncio.Event()
    await write(driver, 0, b"x")
    first, second = asyncio.create_task(driver.flush()), asyncio.create_task(driver.flush())
    await asyncio.sleep(0)
    first.cancel()
    storage.flushing.set()
    await second
    assert first.cancelled() or first.cancelling()
    assert storage.flushes() == 2


@pytest.mark.parametrize("options", ["", "cluster_size=512,refcount_bits=64", "extended_l2=on,cluster_size=16k"])
async def test_after_a_failure_everything_is_written_again(tmp_path: Path, options: str) -> None:
    """A failing write or flush at each point of a commit; the next flush completes the work."""
    path = create(tmp_path / "a", "4M", options)
    for fail_at in range(60):
        driver, storage = await _open(path)
        await write(driver, 0, b"a" * 300_000)
        await driver.flush()
        await change(driver, "discard", 65536, 65536)
        await write(driver, 1 << 20, b"b" * 300_000)
        storage.log.clear()
        storage.fail_at = fail_at
        try:
            await driver.flush()
        except OSError:
            pass
        else:
            break
        await write(driver, 2 << 20, b"c" * 300_000)
        await _settle(driver)
        result = tmp_path / "b"
        result.write_bytes(await storage.read(0, storage.size))
        assert check(result).get("leaks", 0) == 0
        expected = bytearray(4 << 20)
        expected[:300_000] = b"a" * 300_000
        expected[65536:131072] = bytes(65536)
        expected[1 << 20 : (1 << 20) + 300_000] = b"b" * 300_000
        expected[2 << 20 : (2 << 20) + 300_000] = b"c" * 300_000
        assert content(result) == expected
    else:
        raise AssertionError("the commit has more steps than were tried")
    assert fail_at > 3


async def _settle(driver: Qcow2Driver) -> None:
    for _ in range(4):
        await driver.flush()


async def test_freed_space_is_punched_when_discard_is_unmap(tmp_path: Path) -> None:
    for discard, kept in (("ignore", True), ("unmap", False)):
        driver, storage = await _open(create(tmp_path / "a", "8M"), discard=discard)
        await write(driver, 0, b"x" * (1 << 20))
        await driver.flush()
        used = storage.allocated_size()
        await change(driver, "discard", 0, 1 << 20)
        assert storage.allocated_size() == used
        await _settle(driver)
        assert (storage.allocated_size() == used) == kept
