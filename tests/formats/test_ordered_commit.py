"""The order of stages, group commit, and what a failure leaves to be done again."""

from __future__ import annotations

import asyncio
import errno
import logging

import pytest

from nbdserve.formats.append_space import AppendSpace
from nbdserve.formats.ordered_commit import Batch, OrderedCommit, Piece
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage


class Recorder(MemoryStorage):
    """Logs writes by offset and flushes as -1; fails the ``fail_at``-th of them from then on counted, once."""

    def __init__(self) -> None:
        super().__init__(size=1 << 16)
        self.log: list[int] = []
        self.fail_at = -1
        self.flushing: asyncio.Event | None = None

    def _count(self, offset: int) -> None:
        self.log.append(offset)
        if self.fail_at == 0:
            self.fail_at = -1
            raise OSError(errno.EIO, "injected")
        self.fail_at -= self.fail_at > 0

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self._count(offset)
        await super().write(offset, data)

    async def flush(self) -> None:
        self._count(-1)
        if self.flushing is not None:
            await self.flushing.wait()


class Sectors:
    """A table of 512-byte sectors at ``host_offset``, all of one byte that counts the changes."""

    def __init__(self, host_offset: int) -> None:
        self.host_offset = host_offset
        self.dirty: set[int] = set()
        self.value = 0

    def change(self, *sectors: int) -> None:
        self.value += 1
        self.dirty.update(sectors)

    def pieces(self, sectors: frozenset[int]) -> list[Piece]:
        return [(self.host_offset + sector * 512, bytes([self.value]) * 512) for sector in sorted(sectors)]


class Format:
    """A format with new tables, two stages, and space that is freed."""

    def __init__(self) -> None:
        self.storage, self.data = Recorder(), Recorder()
        self.data.log = self.storage.log
        self.new, self.inner, self.outer = Sectors(0x1000), Sectors(0x2000), Sectors(0x3000)
        self.space = AppendSpace(self.data, 4096, 1 << 16)
        self.pins = 0
        self.commits = OrderedCommit(self.storage, self._collect, data=[self.data])

    def _collect(self, batch: Batch) -> None:
        batch.free(self.space)
        self.pins += 1
        batch.finally_(self._unpin)
        batch.hidden.add_dirty(self.new)
        batch.stage(self._barrier_inner).add_dirty(self.inner)
        batch.stage(self._barrier_outer).add_dirty(self.outer)

    def _unpin(self) -> None:
        self.pins -= 1

    async def _barrier_inner(self, pieces: list[Piece]) -> None:
        await self.storage.write_stable(pieces)

    async def _barrier_outer(self, pieces: list[Piece]) -> None:
        await self.storage.write_stable(pieces)

    def change(self) -> None:
        self.new.change(0)
        self.inner.change(0, 1)
        self.outer.change(2)


EVERYTHING = [-1, 0x1000, -1, 0x2000, 0x2200, -1, 0x3400, -1]


async def test_the_order_of_stages() -> None:
    fmt = Format()
    fmt.change()
    await fmt.commits.commit()
    assert fmt.storage.log == EVERYTHING
    assert not (fmt.new.dirty or fmt.inner.dirty or fmt.outer.dirty)


async def test_nothing_changed_costs_the_flush_of_the_data() -> None:
    fmt = Format()
    await fmt.commits.commit()
    assert fmt.storage.log == [-1]
    fmt.outer.change(0)
    fmt.storage.log.clear()
    await fmt.commits.commit()
    assert fmt.storage.log == [-1, 0x3000, -1]


async def test_data_in_the_same_file_is_flushed_with_new_tables() -> None:
    storage, table = Recorder(), Sectors(0)
    commits = OrderedCommit(storage, lambda batch: batch.hidden.add_dirty(table))
    table.change(0)
    await commits.commit()
    assert storage.log == [0, -1]
    await commits.commit()
    assert storage.log == [0, -1, -1]


async def test_flushes_that_wait_together_share_a_commit() -> None:
    fmt = Format()
    fmt.data.flushing = asyncio.Event()
    fmt.outer.change(0)
    first = asyncio.create_task(fmt.commits.commit())
    for _ in range(3):
        await asyncio.sleep(0)
    fmt.outer.change(1)
    others = [asyncio.create_task(fmt.commits.commit()) for _ in range(20)]
    await asyncio.sleep(0)
    assert fmt.storage.log == [-1] and not first.done()
    fmt.data.flushing.set()
    await asyncio.gather(first, *others)
    assert fmt.storage.log == [-1, 0x3000, -1, -1, 0x3200, -1]


async def test_a_cancelled_flush_does_not_stop_the_commit() -> None:
    fmt = Format()
    fmt.data.flushing = asyncio.Event()
    fmt.outer.change(0)
    first, second = asyncio.create_task(fmt.commits.commit()), asyncio.create_task(fmt.commits.commit())
    await asyncio.sleep(0)
    first.cancel()
    fmt.data.flushing.set()
    await second
    assert fmt.storage.log == [-1, 0x3000, -1]


@pytest.mark.parametrize("where", ["storage", "data"])
async def test_after_a_failure_everything_not_stable_is_written_again(where: str) -> None:
    for fail_at in range(20):
        fmt = Format()
        fmt.space.take(2)
        fmt.space.free(1 << 16)
        fmt.change()
        getattr(fmt, where).fail_at = fail_at
        try:
            await fmt.commits.commit()
        except OSError:
            pass
        else:
            break
        assert fmt.pins == 0
        assert fmt.space.take()[0] == (1 << 16) + 8192
        assert fmt.outer.dirty == {2}
        fmt.outer.change(7)
        await fmt.commits.settle()
        assert fmt.space.take()[0] == 1 << 16
        expected = Format()
        expected.change()
        expected.outer.change(7)
        await expected.commits.commit()
        assert await fmt.storage.read(0, 1 << 14) == await expected.storage.read(0, 1 << 14)
    else:
        raise AssertionError("the commit has more steps than were tried")
    assert fail_at == (7 if where == "storage" else 1)


async def test_a_stage_that_is_stable_is_not_written_again() -> None:
    fmt = Format()
    fmt.change()
    fmt.storage.fail_at = 6  # the last stage's flush
    with pytest.raises(OSError, match="injected"):
        await fmt.commits.commit()
    fmt.storage.log.clear()
    await fmt.commits.commit()
    assert fmt.storage.log == [-1, 0x3400, -1]


async def test_an_error_while_collecting_loses_nothing() -> None:
    fmt = Format()
    fmt.change()
    broken = True

    def collect(batch: Batch) -> None:
        fmt._collect(batch)
        if broken:
            raise ValueError("a bug")

    commits = OrderedCommit(fmt.storage, collect, data=[fmt.data])
    with pytest.raises(ValueError, match="a bug"):
        await commits.commit()
    assert fmt.storage.log == []
    broken = False
    await commits.commit()
    assert fmt.storage.log == EVERYTHING


async def test_freed_space_is_reused_only_after_the_last_stage(caplog: pytest.LogCaptureFixture) -> None:
    fmt = Format()
    fmt.space.take(2)
    fmt.space.free(1 << 16)
    fmt.storage.flushing = asyncio.Event()
    fmt.outer.change(0)
    flush = asyncio.create_task(fmt.commits.commit())
    for _ in range(5):
        await asyncio.sleep(0)
    assert fmt.space.take()[0] == (1 << 16) + 8192
    fmt.storage.flushing.set()
    await flush
    await fmt.commits.settle()
    assert fmt.space.take()[0] == 1 << 16
    assert not caplog.records


async def test_space_that_cannot_be_punched_is_not_reused(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Recorder):
        async def discard(self, offset: int, length: int) -> None:
            raise OSError(errno.EIO, "no discard")

    storage = Refusing()
    space = AppendSpace(storage, 4096, 1 << 16, punch=True)
    commits = OrderedCommit(storage, lambda batch: batch.free(space))
    space.free(0)
    with caplog.at_level(logging.WARNING):
        await commits.settle()
    assert "freed space stays unused" in caplog.text
    assert space.free_ranges == []
