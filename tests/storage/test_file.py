"""What the conformance suite does not cover: opening, durability, faults and the non-blocking forms."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageError
from nbdserve.extents import DATA
from nbdserve.storage import aio, blocking
from nbdserve.storage import file as file_module
from nbdserve.storage.file import CACHE_MODES, FileStorage, sync_parent
from nbdserve.storage.pool import worker_pool
from nbdserve.units import KIB, MIB


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "disk"
    file.write_bytes(b"a" * 64 * KIB)
    return str(file)


# --- opening ---------------------------------------------------------------------------------------------------------


async def test_directory_fifo_socket_and_character_device_are_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for file in (tmp_path, fifo, tmp_path / "socket", Path("/dev/null")):
            for read_only in (True, False):
                with pytest.raises(ImageError) as caught:
                    await asyncio.wait_for(FileStorage.open(str(file), read_only=read_only), 60)
                assert str(caught.value).startswith(f"{file}: ")


async def test_a_missing_file_and_a_strange_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing: cannot be opened: No such file"):
        await FileStorage.open(str(tmp_path / "missing"))
    with pytest.raises(ImageError, match="null byte"):
        await FileStorage.open("a\0b")


async def test_unknown_cache_mode(path: str) -> None:
    with pytest.raises(ConfigError, match="invalid cache mode 'fast'"):
        await FileStorage.open(path, cache="fast")


@pytest.mark.parametrize("cache", CACHE_MODES)
async def test_every_cache_mode_reads_and_writes(path: str, cache: str) -> None:
    storage = await FileStorage.open(path, cache=cache)
    await storage.write(1000, b"b" * 5000)
    await storage.flush()
    assert await storage.read(999, 5002) == b"a" + b"b" * 5000 + b"a"
    await storage.close()


async def test_create_empties_a_file_but_not_one_in_use(path: str) -> None:
    storage = await FileStorage.open(path)
    with pytest.raises(ImageError, match="in use"):
        await FileStorage.open(path, create=True)
    assert Path(path).stat().st_size == 64 * KIB
    await storage.close()
    storage = await FileStorage.open(path, create=True)
    assert storage.size == 0
    await storage.close()


async def test_a_failed_open_leaves_no_descriptor(path: str) -> None:
    holder = await FileStorage.open(path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(ImageError):
            await FileStorage.open(path)
        with pytest.raises(ImageError):
            await FileStorage.open("/dev/null")
    assert len(os.listdir("/proc/self/fd")) <= before
    await holder.close()


async def test_a_cancelled_open_leaves_no_descriptor(path: str) -> None:
    await worker_pool().run(int)
    before = len(os.listdir("/proc/self/fd"))
    for steps in range(6):
        task = asyncio.create_task(FileStorage.open(path))
        for _ in range(steps):
            await asyncio.sleep(0.0005)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).close()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_identity_is_that_of_the_file(path: str) -> None:
    os.link(path, path + ".link")
    one = await FileStorage.open(path, read_only=True)
    other = await FileStorage.open(path + ".link", read_only=True)
    assert one.identity == other.identity
    await one.close()
    await other.close()


async def test_from_fd_takes_the_access_mode_of_the_descriptor(path: str) -> None:
    storage = await FileStorage.from_fd(os.open(path, os.O_RDONLY), path)
    assert storage.read_only
    assert storage.size == 64 * KIB
    await storage.close()


async def test_direct_alignment_is_that_of_the_file_system(path: str) -> None:
    storage = await FileStorage.open(path, cache="none")
    assert storage.alignment in (1, 512, 1024, 2048, 4096)
    await storage.close()


async def test_sync_parent(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    await sync_parent(path)
    assert synced == [str(Path(path).parent)]


# --- without blocking ------------------------------------------------------------------------------------------------


def refuse(number: int, counter: list[int]) -> Callable[..., int]:
    def call(*_: object) -> int:
        counter.append(1)
        raise OSError(number, os.strerror(number))

    return call


async def test_reads_of_cached_pages_need_no_thread(path: str) -> None:
    storage = await FileStorage.open(path)
    await storage.read(0, 64 * KIB)
    buffer = bytearray(4096)
    if not storage.try_read_into(0, memoryview(buffer)):
        pytest.skip("this file system has no RWF_NOWAIT")
    assert buffer == b"a" * 4096
    await storage.close()


async def test_a_file_system_without_nowait_is_asked_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    monkeypatch.setattr(os, "preadv", refuse(errno.EOPNOTSUPP, reads))
    storage = await FileStorage.open(path)
    for _ in range(5):
        assert not storage.try_read_into(0, memoryview(bytearray(10)))
    assert len(reads) == 1
    await storage.close()


async def test_refused_nowait_writes_are_tried_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    storage = await FileStorage.open(path)
    monkeypatch.setattr(os, "pwritev", refuse(errno.EOPNOTSUPP, writes))
    storage._in_memory = False
    storage._choose_attempts()
    assert not storage.try_write(0, b"b")
    for _ in range(5):
        storage.try_write(0, b"b")
    assert len(writes) == 1
    await storage.close()


async def test_busy_pages_are_tried_again(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []
    storage = await FileStorage.open(path)
    storage._in_memory = False
    monkeypatch.setattr(os, "preadv", refuse(errno.EAGAIN, attempts))
    monkeypatch.setattr(os, "pwritev", refuse(errno.EAGAIN, attempts))
    storage._choose_attempts()
    for _ in range(3):
        assert not storage.try_read_into(0, memoryview(bytearray(10)))
        assert not storage.try_write(0, b"b")
    assert len(attempts) >= 7, "three of each, and the first look"
    await storage.close()


async def test_what_is_cached_is_sent_as_far_as_the_socket_takes_it(path: str) -> None:
    storage = await FileStorage.open(path)
    data = os.urandom(4 * MIB)
    await storage.write(0, data)
    await storage.read(0, len(data))
    if not storage.can_send(0, len(data)):
        pytest.skip("the kernel does not tell what is cached")
    ours, peer = socket.socketpair()
    with ours, peer:
        ours.setblocking(False)
        received, turns, length = b"", 0, 4 * MIB - 200
        while len(received) < length:
            sent = storage.send(ours.fileno(), 100 + len(received), length - len(received))
            received += peer.recv(sent, socket.MSG_WAITALL)
            turns += 1
        assert turns > 1
        assert received == data[100:-100]
        with pytest.raises(OSError, match="the file ends before byte"):
            storage.send(ours.fileno(), 4 * MIB, 10)
    await storage.close()


async def test_pages_that_are_not_cached_cannot_be_sent(path: str) -> None:
    storage = await FileStorage.open(path)
    await storage.read(0, 64 * KIB)
    if storage._in_memory or not storage.can_send(0, 64 * KIB):
        pytest.skip("the kernel does not tell what is cached")
    assert not storage.can_send(60 * KIB, 5 * KIB), "past the end there is nothing to send"
    os.fsync(storage._fd)
    os.posix_fadvise(storage._fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert not storage.can_send(0, 64 * KIB)
    await storage.read(0, 64 * KIB)
    assert storage.can_send(0, 64 * KIB)
    await storage.close()


async def test_a_partial_attempt_is_no_success(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await FileStorage.open(path)
    storage._in_memory = False
    monkeypatch.setattr(os, "preadv", lambda *_: 5)
    monkeypatch.setattr(os, "pwritev", lambda *_: 5)
    storage._choose_attempts()
    assert not storage.try_read_into(0, memoryview(bytearray(10)))
    assert not storage.try_write(0, b"b" * 10)
    await storage.close()


# --- durability ------------------------------------------------------------------------------------------------------


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


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


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


# --- faults ----------------------------------------------------------------------------------------------------------


async def test_short_reads_and_writes_are_continued(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwrite = os.preadv, os.pwrite
    storage = await FileStorage.open(path)
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset, *flags: preadv(fd, [views[0][:1000]], offset, *flags))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, memoryview(data)[:777], offset))
    data = os.urandom(20_000)
    await storage.write(100, data)
    assert await storage.read(100, 20_000) == data
    await storage.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
async def test_an_error_of_a_write_is_passed_on_and_not_final(
    path: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    storage = await FileStorage.open(path)
    with monkeypatch.context() as faulty:
        faulty.setattr(os, "pwrite", refuse(number, []))
        with pytest.raises(OSError) as caught:
            await storage.write(0, b"b")
        assert caught.value.errno == number
    await storage.write(0, b"b")
    await storage.flush()
    await storage.close()


async def test_a_growing_write_that_fails_halfway_leaves_the_true_size(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = await FileStorage.open(path)
    pwrite = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if offset >= 65 * KIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, memoryview(data)[: 65 * KIB - offset], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError):
        await storage.write(64 * KIB, b"b" * 4096)
    assert storage.size == 65 * KIB == Path(path).stat().st_size
    await storage.close()


async def test_zero_without_fallocate_writes_or_refuses_fast(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await FileStorage.open(path)
    monkeypatch.setattr(blocking, "fallocate", refuse(errno.EOPNOTSUPP, []))
    with pytest.raises(OSError) as caught:
        await storage.zero(0, 4096, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    assert await storage.read(0, 4096) == b"a" * 4096
    for unmap in (True, False):
        await storage.zero(100, 2 * MIB + 5, unmap=unmap)
        assert storage.size == 2 * MIB + 105
        assert await storage.read(0, storage.size) == b"a" * 100 + bytes(2 * MIB + 5)
    await storage.discard(0, 4096)
    assert await storage.read(0, 100) == b"a" * 100
    await storage.close()


async def test_zero_that_runs_out_of_space_says_so(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await FileStorage.open(path)
    monkeypatch.setattr(blocking, "fallocate", refuse(errno.ENOSPC, []))
    with pytest.raises(OSError) as caught:
        await storage.zero(0, 4096)
    assert caught.value.errno == errno.ENOSPC
    await storage.close()


async def test_a_file_system_without_seek_data_is_all_data(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await FileStorage.open(path)
    monkeypatch.setattr(os, "lseek", refuse(errno.EINVAL, []))
    found = await storage.host_map(0, 64 * KIB)
    assert (found.kind.tolist(), found.length.tolist()) == ([DATA], [64 * KIB])
    monkeypatch.setattr(os, "lseek", refuse(errno.EIO, []))
    with pytest.raises(OSError):
        await storage.host_map(0, 64 * KIB)
    await storage.close()


async def test_a_file_system_without_direct_io_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def no_direct(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real(fd, command, argument))

    monkeypatch.setattr(fcntl, "fcntl", no_direct)
    monkeypatch.setattr(file_module, "_MEMORY_FILE_SYSTEMS", frozenset())
    with pytest.raises(ImageError, match=r"no direct I/O.*cache=writeback"):
        await FileStorage.open(path, cache="none", locking=False)


async def test_a_descriptor_number_used_again_is_never_reached(path: str, tmp_path: Path) -> None:
    storage = await FileStorage.open(path)
    read, write = storage.try_read_into, storage.try_write
    await storage.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    try:
        assert not read(0, memoryview(bytearray(10)))
        assert not write(0, b"x")
        assert os.fstat(other).st_size == 0
    finally:
        os.close(other)
    assert await worker_pool().run(int) == 0


async def test_a_file_that_is_held_is_closed_when_it_is_let_go(path: str) -> None:
    storage = await FileStorage.open(path)
    descriptor = storage._fd
    storage.hold()
    storage.hold()
    await storage.close()
    assert await storage.read(0, 4) == b"aaaa", "what is to be sent can be loaded"
    storage.let_go()
    assert os.fstat(descriptor)
    storage.let_go()
    await settled(lambda: storage._fd == -1)
    with pytest.raises(OSError, match="is closed"):
        await storage.read(0, 4)
    await storage.close()


async def test_what_is_written_while_the_file_is_extended_stays(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await FileStorage.open(path)
    extend_file = blocking.extend_file

    def late(fd: int, size: int) -> None:
        os.pwrite(fd, b"new", size)
        extend_file(fd, size)

    monkeypatch.setattr(blocking, "extend_file", late)
    await storage.extend(MIB)
    assert storage.size == MIB + 3
    assert await storage.read(MIB, 3) == b"new"
    await storage.extend(100)
    assert storage.size == MIB + 3
    await storage.close()


async def test_writeback_is_begun_once_at_a_time_and_awaited_by_close(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = [], threading.Event()

    def slow(fd: int) -> None:
        begun.append(fd)
        go_on.wait(60)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file_module, "begin_writeback", slow)
    storage = await FileStorage.open(path)
    storage.begin_writeback()
    storage.begin_writeback()
    closing = asyncio.create_task(storage.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    go_on.set()
    await closing
    assert len(begun) == 1
    storage.begin_writeback()  # closed: nothing happens
