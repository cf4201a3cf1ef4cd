"""What the conformance suite does not cover: opening, faults and the non-blocking forms. And `test_file_durability`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import threading
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageError
from nbdserve.extents import DATA
from nbdserve.storage import blocking
from nbdserve.storage import file as file_module
from nbdserve.storage.file import CACHE_MODES, FileStorage
from nbdserve.storage.pool import worker_pool
from nbdserve.units import KIB, MIB

# --- opening ---------------------------------------------------------------------------------------------------------
from tests.storage.helpers import refuse, settled


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


# --- without blocking ------------------------------------------------------------------------------------------------


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
