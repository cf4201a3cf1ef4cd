"""When what was written to a file is stable, and who is told if it is not."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdserve.errors import ImageError
from nbdserve.storage import aio
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.storage.helpers import refuse, settled


class Syncs:
    """Stands for fdatasync: each call waits to be released, and may fail."""

    def __init__(self) -> None:
        self.started = 0
        self.released = threading.Semaphore(0)
        self.error: OSError | None = None

    def __call__(self, fd: int) -> None:
        self.started += 1
        assert self.released.acquire(timeout=60)
        if self.error is not None:
            raise self.error


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    made = Syncs()
    monkeypatch.setattr(os, "fdatasync", made)
    return made


async def test_flushes_that_come_meanwhile_share_the_next_one(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path)
    first = asyncio.create_task(storage.flush())
    await settled(lambda: syncs.started == 1)
    others = [asyncio.create_task(storage.flush()) for _ in range(10)]
    await asyncio.sleep(0.01)
    assert syncs.started == 1
    syncs.released.release()
    await first
    await settled(lambda: syncs.started == 2)
    assert not any(other.done() for other in others)
    syncs.released.release()
    await asyncio.gather(*others)
    assert syncs.started == 2
    await storage.close()


async def test_a_cancelled_flush_spares_those_that_share_it(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path)
    tasks = [asyncio.create_task(storage.flush()) for _ in range(3)]
    await settled(lambda: syncs.started == 1)
    tasks[1].cancel()
    syncs.released.release(2)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[0] is None
    assert isinstance(results[1], asyncio.CancelledError)
    assert results[2] is None
    await storage.close()


async def test_a_failed_flush_is_final(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path)
    await storage.write(0, b"b")
    syncs.error = OSError(errno.EIO, "Input/output error")
    waiting = [asyncio.create_task(storage.flush()) for _ in range(3)]
    await settled(lambda: syncs.started == 1)
    syncs.released.release(10)
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, OSError)
        assert result.errno == errno.EIO
    syncs.error = None
    assert syncs.started == 1
    for call in (
        storage.flush,
        lambda: storage.write(0, b"c"),
        lambda: storage.write_all([(0, b"c")]),
        lambda: storage.zero(0, 1),
        lambda: storage.truncate(0),
    ):
        with pytest.raises(OSError, match="a flush failed") as caught:
            await call()
        assert caught.value.errno == errno.EIO
    assert not storage.try_write(0, b"c")
    assert await storage.read(0, 2) == b"ba"
    await storage.close()


async def test_a_write_covered_by_the_flush_was_written_before_the_sync(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path)
    running = asyncio.create_task(storage.flush())
    await settled(lambda: syncs.started == 1)
    await storage.write(0, b"late")
    covering = asyncio.create_task(storage.flush())
    await asyncio.sleep(0.01)
    syncs.released.release()
    await running
    await asyncio.sleep(0.01)
    assert not covering.done()
    syncs.released.release()
    await covering
    assert syncs.started == 2
    await storage.close()


async def test_a_flush_after_nothing_has_changed_is_no_sync(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path)
    syncs.released.release(100)
    changes: tuple[Callable[[], Awaitable[None]], ...] = (
        lambda: storage.write(0, b"b"),
        lambda: storage.write_all([(0, b"b"), (100, b"c")]),
        lambda: storage.zero(0, 512),
        lambda: storage.discard(0, 512),
        lambda: storage.truncate(64 * KIB),
    )
    for number, change in enumerate(changes, 1):
        await change()
        for _ in range(3):
            await storage.flush()
        assert syncs.started == number
    await _attempt(storage)
    await storage.flush()
    assert syncs.started == len(changes) + 1
    await storage.close()


@pytest.mark.parametrize("in_memory", [True, False])
async def test_a_write_that_ends_while_a_sync_runs_needs_another(path: str, syncs: Syncs, in_memory: bool) -> None:
    storage = await FileStorage.open(path)
    storage._in_memory = in_memory
    storage._choose_attempts()
    await storage.write(0, b"b")
    writes: tuple[Callable[[], Awaitable[None]], ...] = (
        lambda: storage.write(0, b"c"),
        lambda: _attempt(storage),
    )
    for write in writes:
        before = syncs.started
        running = asyncio.create_task(storage.flush())
        await settled(lambda: syncs.started == before + 1)  # noqa: B023
        await write()
        syncs.released.release()
        await running
        syncs.released.release()
        await storage.flush()
        assert syncs.started == before + 2
        await storage.flush()
        assert syncs.started == before + 2
        await storage.write(0, b"b")
    await storage.close()


async def _attempt(storage: FileStorage) -> None:
    if not storage.try_write(0, b"d" * 4096):
        await storage.write(0, b"d" * 4096)


async def test_write_stable_is_one_job_of_writes_and_a_sync(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path)
    syncs.released.release(1)
    await storage.write_stable([(0, b"one"), (70 * KIB, b"two")])
    assert syncs.started == 1
    assert storage.size == 70 * KIB + 3
    assert await storage.read(0, 4) == b"onea"
    assert await storage.read(70 * KIB, 3) == b"two"
    await storage.flush()
    assert syncs.started == 1, "nothing has changed since"
    await storage.close()


async def test_write_stable_is_not_counted_as_the_sync_of_what_ended_meanwhile(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path)
    stable = asyncio.create_task(storage.write_stable([(0, b"one")]))
    await settled(lambda: syncs.started == 1)
    await storage.write(4096, b"late")
    syncs.released.release(2)
    await stable
    await storage.flush()
    assert syncs.started == 2
    await storage.close()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_failing_sync_of_write_stable_is_final(path: str, syncs: Syncs, cancelled: bool) -> None:
    storage = await FileStorage.open(path)
    syncs.error = OSError(errno.EIO, "Input/output error")
    writing = asyncio.create_task(storage.write_stable([(0, b"b")]))
    await settled(lambda: syncs.started == 1)
    if cancelled:
        writing.cancel()
    syncs.released.release(10)
    with pytest.raises(asyncio.CancelledError if cancelled else OSError, match=None if cancelled else "a flush failed"):
        await writing
    syncs.error = None
    for call in (
        storage.flush,
        lambda: storage.write(0, b"c"),
        lambda: storage.write_stable([(0, b"c")]),
    ):
        with pytest.raises(OSError, match="a flush failed") as caught:
            await call()
        assert caught.value.errno == errno.EIO
    assert not storage.try_write(0, b"c")
    assert syncs.started == 1
    await storage.close()


async def test_a_failing_write_of_write_stable_is_passed_on_and_not_final(
    path: str, syncs: Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = await FileStorage.open(path)
    syncs.released.release(10)
    with monkeypatch.context() as faulty:
        faulty.setattr(os, "pwrite", refuse(errno.ENOSPC, []))
        with pytest.raises(OSError) as caught:
            await storage.write_stable([(0, b"b")])
        assert caught.value.errno == errno.ENOSPC
    assert syncs.started == 0
    await storage.flush()
    assert syncs.started == 1, "what was written in part is not taken for stable"
    await storage.write_stable([(0, b"b")])
    await storage.close()


async def test_write_stable_of_an_unsafe_storage_does_not_sync(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path, cache="unsafe")
    await storage.write_stable([(0, b"b"), (10, b"c")])
    assert syncs.started == 0
    assert await storage.read(0, 11) == b"b" + b"a" * 9 + b"c"
    await storage.close()


async def _direct(path: str) -> FileStorage:
    """The file opened for direct I/O; the test is skipped where there is none."""
    try:
        storage = await FileStorage.open(path, cache="none")
    except ImageError:
        pytest.skip("this file system has no direct I/O")
    if storage._direct is None:
        pytest.skip("a file system in memory")
    return storage


async def test_direct_writes_never_bypass_the_gate(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An AIO write beside a read-modify-write of the same block would be undone by it."""
    submitted: list[int] = []
    monkeypatch.setattr(aio, "io_submit", refuse(errno.EIO, submitted))
    storage = await _direct(path)
    await storage.write_all([(0, b"b" * 4096), (8192, b"c" * 4096)])
    await storage.write_stable([(0, b"d" * 4096), (8192, b"e" * 4096)])
    assert not submitted
    await storage.close()


async def test_a_file_that_is_extended_is_not_cut_by_a_write_at_its_end(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = await _direct(path)
    cut, cutting, go_on = os.ftruncate, threading.Event(), threading.Event()

    def slow(fd: int, size: int) -> None:
        cutting.set()
        assert go_on.wait(60)
        cut(fd, size)

    monkeypatch.setattr(os, "ftruncate", slow)
    write = asyncio.create_task(storage.write(64 * KIB, b"b"))
    await asyncio.to_thread(cutting.wait)
    extend = asyncio.create_task(storage.extend(MIB))
    await asyncio.sleep(0.05)  # it would be done by now, if it did not wait
    go_on.set()
    await asyncio.gather(write, extend)
    assert storage.size == Path(path).stat().st_size == MIB
    await storage.close()


async def test_unsafe_and_read_only_do_not_sync(path: str, syncs: Syncs) -> None:
    for options in ({"cache": "unsafe"}, {"read_only": True}):
        storage = await FileStorage.open(path, **options)
        await storage.flush()
        await storage.close()
    assert syncs.started == 0


async def test_close_waits_for_the_flushes(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path)
    flushes = [asyncio.create_task(storage.flush()) for _ in range(2)]
    await settled(lambda: syncs.started == 1)
    flushes.append(asyncio.create_task(storage.flush()))
    await asyncio.sleep(0)
    closing = asyncio.create_task(storage.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    syncs.released.release(2)
    await asyncio.gather(closing, *flushes)
    assert syncs.started == 2


async def test_a_cancelled_close_closes(path: str, syncs: Syncs) -> None:
    storage = await FileStorage.open(path)
    flush = asyncio.create_task(storage.flush())
    await settled(lambda: syncs.started == 1)
    closing = asyncio.create_task(storage.close())
    await asyncio.sleep(0)
    closing.cancel()
    syncs.released.release()
    await flush
    with pytest.raises(asyncio.CancelledError):
        await closing
    await (await FileStorage.open(path)).close()  # nobody holds its locks
