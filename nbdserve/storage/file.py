"""Regular files and block devices."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Final, Self, TypeVar, TypeVarTuple

from nbdserve.errors import ConfigError, ImageError
from nbdserve.extents import RunArray
from nbdserve.storage import aio, blocking
from nbdserve.storage.base import BlockingWrite, ReadBuffer, Storage
from nbdserve.storage.direct import DirectFile
from nbdserve.storage.inline import InlineWrites
from nbdserve.storage.locks import lock_image
from nbdserve.storage.pool import JobFuture, worker_pool
from nbdserve.storage.syscalls import (
    RAMFS_MAGIC,
    TMPFS_MAGIC,
    begin_writeback,
    cached_pages,
    direct_io_alignment,
    file_system_type,
    logical_block_size,
    nowait_reader,
)
from nbdserve.units import align_down, align_up

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CACHE_MODES: Final = ("writeback", "none", "writethrough", "directsync", "unsafe")
"""QEMU's names. Here ``none`` and ``directsync`` mean O_DIRECT and ``unsafe`` a flush that does nothing; that each
write of ``writethrough`` and ``directsync`` is followed by a flush is the block layer's, which knows the metadata."""

_MEMORY_FILE_SYSTEMS: Final = frozenset((TMPFS_MAGIC, RAMFS_MAGIC))


class FileStorage(Storage):
    """A file descriptor as storage, on the worker pool of the running event loop.

    ``try_read_into`` and ``try_write`` are instance attributes: the fastest form this file system has. Look them up
    for each call; a refused form is replaced for good.
    """

    identity: tuple[int, int]
    """``(st_dev, st_ino)``: equal for two names of one file."""
    is_device: bool
    """It is a block device."""

    def __init__(self, fd: int, path: str, *, cache: str = "writeback") -> None:
        """Take over ``fd``; callers use ``open`` or ``from_fd``. A failed call leaves ``fd`` open."""
        if cache not in CACHE_MODES:
            raise ConfigError(f"{path}: invalid cache mode {cache!r}: use one of {', '.join(CACHE_MODES)}")
        status = os.fstat(fd)
        blocking.check_kind(path, status.st_mode)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        self.path = path
        self.read_only = flags & os.O_ACCMODE == os.O_RDONLY
        self.identity = (status.st_dev, status.st_ino)
        self._fd = fd
        self.is_device = stat.S_ISBLK(status.st_mode)
        self._unsafe = cache == "unsafe"
        self._pool = worker_pool()
        self._failure: str | None = None
        self._running = 0
        self._changing = 0
        """Jobs under way that write or sync."""
        self._closed = False
        self._held = 0
        self._quiet: JobFuture[None] | None = None
        self._flushing = False
        self._next_flush: JobFuture[None] | None = None
        self._writing_back = False
        self._changes = 1
        """Changes completed; counted at their end, because a flush covers no more than what was complete before it."""
        self._stable_changes = 0
        self._block_size = logical_block_size(fd) if self.is_device else 1
        self._in_memory = not self.is_device and file_system_type(fd) in _MEMORY_FILE_SYSTEMS
        self._direct = self._make_direct(flags) if cache in ("none", "directsync") else None
        self._read_fully = blocking.read_fully if self._direct is None else self._direct.read_fully
        self._write_fully = (self._direct or blocking.InTurn()).write_fully
        self._write_each = aio.write_all if self._direct is None else aio.write_singly
        self.blocking_read = partial(self._read_fully, fd)
        self.has_workers = not self.read_only
        self.grows_zeroed = not self.is_device
        self.size = 0
        self._measure()
        self._choose_attempts()

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        read_only: bool = False,
        cache: str = "writeback",
        create: bool = False,
        locking: bool = True,
        force_share: bool = False,
    ) -> Self:
        """Open the image file ``path`` and take QEMU's locks on it.

        ``create`` makes the file, or empties it once it is locked. ``locking`` False takes no locks;
        ``force_share`` takes none that would refuse another user (QEMU's ``-U``; for a read-only look).
        Raises ImageError naming the path.
        """
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_CREAT if create else 0)
        opened: list[int] = []
        try:
            fd = await worker_pool().run(blocking.open_image_file, path, flags, opened)
        except BaseException:
            for fd in opened:  # the task was cancelled while the file was opened
                os.close(fd)
            raise
        return await cls.from_fd(fd, path, cache=cache, empty=create, locking=locking, force_share=force_share)

    @classmethod
    async def from_fd(
        cls,
        fd: int,
        path: str,
        *,
        cache: str = "writeback",
        empty: bool = False,
        locking: bool = True,
        force_share: bool = False,
    ) -> Self:
        """Take over an open descriptor, whose access mode says whether the storage is read-only; as ``open``.

        The descriptor is closed when this fails.
        """
        try:
            storage = cls(fd, path, cache=cache)
            if locking:
                await worker_pool().run(lock_image, fd, path, not storage.read_only, force_share)
            if empty and not storage.is_device:
                await storage.truncate(0)
        except BaseException:
            os.close(fd)
            raise
        return storage

    async def share(self, *, cache: str = "writeback") -> Self:
        """The same open file once more, under the locks this one has taken, which last until both are closed."""
        return await self.from_fd(os.dup(self._fd), self.path, cache=cache, locking=False)

    def _make_direct(self, flags: int) -> DirectFile | None:
        if self._in_memory:  # its pages are the only copy: there is no cache to bypass
            return None
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            hint = "use cache=writeback"
            raise ImageError(
                self.path, "its file system has no direct I/O, which cache=none needs", hint=hint
            ) from error
        self.alignment = self._block_size if self.is_device else direct_io_alignment(self._fd)
        return DirectFile(self.alignment, fixed_size=self.is_device)

    def _measure(self) -> None:
        """Set ``size`` from the file; fstat and lseek answer from memory."""
        self.size = os.lseek(self._fd, 0, os.SEEK_END) if self.is_device else os.fstat(self._fd).st_size

    # --- without blocking ----------------------------------------------------------------------------------------

    def _choose_attempts(self) -> None:
        if self._direct is not None:
            return
        if self._in_memory:
            self.try_read_into = self._try_read_memory  # type: ignore[method-assign]
            self.can_send = self._is_inside  # type: ignore[method-assign]
            if not self.read_only:
                self.try_write = self._try_write_memory  # type: ignore[method-assign]
            return
        try:
            os.preadv(self._fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:
            return
        self.try_read_into = nowait_reader(self._fd)  # type: ignore[assignment,method-assign]
        if not self.read_only:
            self.try_write = self._try_write_nowait  # type: ignore[method-assign]
        try:
            cached_pages(self._fd, 0, 1)
        except OSError:
            return
        self.can_send = self._is_cached  # type: ignore[method-assign]

    def _try_write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        self._changes += 1
        if offset + len(data) > self.size:
            return False
        try:
            return os.pwritev(self._fd, (data,), offset, os.RWF_NOWAIT) == len(data)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                self._inline = InlineWrites()
                self.try_write = self._try_write_inline  # type: ignore[method-assign]
            return False

    def _try_write_inline(self, offset: int, data: ReadBuffer) -> bool:
        if self._changing or not self._inline.try_write(self._fd, offset, data):
            return False
        self._changes += 1
        self.size = max(self.size, offset + len(data))
        return True

    def _try_read_memory(self, offset: int, buffer: memoryview) -> bool:
        try:
            return os.preadv(self._fd, (buffer,), offset) == len(buffer)
        except OSError:
            return False

    def _try_write_memory(self, offset: int, data: ReadBuffer) -> bool:
        try:
            done = os.pwrite(self._fd, data, offset)
        except OSError:
            return False
        self._changes += 1
        self.size = max(self.size, offset + done)
        return done == len(data)

    def _is_inside(self, offset: int, length: int) -> bool:
        return offset + length <= self.size

    def _is_cached(self, offset: int, length: int) -> bool:
        return blocking.is_cached(self._fd, offset, length)

    def send(self, socket_fd: int, offset: int, length: int) -> int:
        return blocking.send_cached(self._fd, socket_fd, offset, length, self.path)

    def _forbid_try_write(self) -> None:
        self.try_write = super().try_write  # type: ignore[method-assign]

    # --- on the worker threads -----------------------------------------------------------------------------------

    async def _run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        if self._closed and not self._held:
            raise OSError(errno.EBADF, f"{self.path} is closed")
        self._running += 1
        try:
            return await self._pool.run(fn, *args)
        finally:
            self._ended()

    async def _change(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """``_run`` for what modifies the file."""
        self._check_writable()
        self._changing += 1
        try:
            return await self._run(fn, *args)
        finally:
            self._changing -= 1
            self._changes += 1

    def _ended(self) -> None:
        self._running -= 1
        if not self._running and self._quiet is not None:
            self._quiet.set_result(None)

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, f"{self.path} is open read-only")
        if self._failure is not None:
            raise OSError(errno.EIO, self._failure)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._run(self._read_fully, self._fd, offset, buffer)

    async def read_all(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        await self._run(blocking.read_all, self._read_fully, self._fd, pieces)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        try:
            await self._change(self._write_fully, self._fd, offset, data)
        finally:
            if offset + len(data) > self.size:
                self._measure()

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        try:
            await self._change(self._write_each, self._write_fully, self._fd, pieces)
        finally:
            self._measure()

    async def work(self, fn: Callable[[BlockingWrite], T]) -> T:
        try:
            return await self._change(fn, partial(self._write_fully, self._fd))
        finally:
            self._measure()

    async def write_stable(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        if self._unsafe:
            await self.write_all(pieces)
            return
        before = self._changes
        failed_sync: list[OSError] = []
        try:
            await self._change(
                blocking.write_and_sync, self._write_each, self._write_fully, self._fd, pieces, failed_sync
            )
        except BaseException as error:
            if failed_sync:  # what is raised may be that the caller was cancelled
                self._fail(failed_sync[0])
                if isinstance(error, OSError):
                    self._check_writable()
            raise
        finally:
            self._measure()
        self._stable_changes = self._changes if self._changes == before + 1 else max(before, self._stable_changes)

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        self._check_writable()
        if length == 0:
            return
        try:
            await self._change(self._zero, self._fd, offset, length, unmap, fast)
        finally:
            if offset + length > self.size:
                self._measure()

    def _zero(self, fd: int, offset: int, length: int, unmap: bool, fast: bool) -> None:
        end = offset + length
        start = min(align_up(offset, self._block_size), end)
        stop = max(align_down(end, self._block_size), start)
        if fast and (start, stop) != (offset, end):
            raise OSError(errno.ENOTSUP, f"{self.path}: part of a block is not zeroed fast")
        with self._gate(offset, length):
            if start == stop:
                done = False
            elif self.is_device:
                done = blocking.try_zero_device(fd, start, stop - start, unmap, fast)
            else:
                done = blocking.try_zero_file(fd, start, stop - start, unmap)
        if fast and not done:
            raise OSError(errno.ENOTSUP, f"{self.path}: its file system or device has no fast zeroing")
        if not done:
            start = stop = end
        blocking.write_zeroes(self._write_fully, fd, offset, start - offset)
        blocking.write_zeroes(self._write_fully, fd, stop, end - stop)

    def _gate(self, offset: int, length: int) -> AbstractContextManager[None]:
        """What keeps a change of the range apart from read-modify-writes, under direct I/O."""
        return nullcontext() if self._direct is None else self._direct.gate_for(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        self._check_writable()
        length = min(length, self.size - offset)
        if length > 0:
            await self._change(self._discard, self._fd, offset, length)

    def _discard(self, fd: int, offset: int, length: int) -> None:
        with self._gate(offset, length):
            if self.is_device:
                blocking.discard_device(fd, offset, length, self._block_size)
            else:
                blocking.discard_file(fd, offset, length)

    async def truncate(self, size: int) -> None:
        """Set the size. A block device keeps its own: OSError(EINVAL) when ``size`` is larger."""
        self._check_writable()
        if self.is_device:
            if size > self.size:
                raise OSError(errno.EINVAL, f"{self.path}: a block device cannot grow")
            return
        try:
            await self._change(self._truncate, self._fd, size)
        finally:
            self._measure()

    async def extend(self, size: int) -> None:
        if self.is_device:
            await self.truncate(max(size, self.size))
            return
        try:
            await self._change(self._extend, self._fd, size)
        finally:
            self._measure()

    def _truncate(self, fd: int, size: int) -> None:
        with self._gate(size, 0):
            os.ftruncate(fd, size)

    def _extend(self, fd: int, size: int) -> None:
        with self._gate(0, 0):  # a read-modify-write at the end of the file cuts off what is not its own
            blocking.extend_file(fd, size)

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        return await self._run(blocking.seek_map, self._fd, offset, length, self.size, max_runs)

    def allocated_size(self) -> int:
        return self.size if self.is_device else os.fstat(self._fd).st_blocks * 512

    # --- durability ----------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """fdatasync, unless nothing has changed since the last one.

        Callers that come while one runs share the next: the running one may not cover their writes.
        """
        if self.read_only:
            return
        self._check_writable()
        if self._unsafe or self._stable_changes == self._changes:
            return
        if self._closed:
            raise OSError(errno.EBADF, f"{self.path} is closed")
        if self._next_flush is None:
            self._next_flush = JobFuture(loop=self._pool.loop)
        joined = self._next_flush
        if not self._flushing:
            self._start_flush()
        await joined
        self._check_writable()

    def _start_flush(self) -> None:
        joined, self._next_flush = self._next_flush, None
        assert joined is not None
        self._flushing = True
        self._running += 1
        self._changing += 1
        self._pool.submit(os.fdatasync, (self._fd,), partial(self._flushed, joined, self._changes))

    def _flushed(self, joined: JobFuture[None], changes: int, _: None, error: BaseException | None) -> None:
        self._flushing = False
        self._changing -= 1
        if error is not None:
            self._fail(error)
        else:
            self._stable_changes = changes
        joined.set_result(None)
        if self._next_flush is not None:
            if self._failure is None:
                self._start_flush()
            else:
                self._next_flush.set_result(None)
                self._next_flush = None
        self._ended()

    def begin_writeback(self) -> None:
        if not (self._writing_back or self._closed or self._unsafe or self._direct is not None):
            self._writing_back = True
            self._running += 1
            self._pool.submit(begin_writeback, (self._fd,), self._writeback_begun)

    def _writeback_begun(self, _: None, error: BaseException | None) -> None:
        # An error is the next fdatasync's, too.
        self._writing_back = False
        self._ended()

    def _fail(self, error: BaseException) -> None:
        # The kernel reports a lost page once and marks it clean: a second fdatasync would succeed without it.
        self._failure = f"{self.path}: a flush failed ({error}), data may be lost: reopen the image"
        self._forbid_try_write()

    async def close(self) -> None:
        """Let the calls in progress end, then give the descriptor and its locks back.

        While a client has not taken what is to be sent from the file, they are kept, and given back after that.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._running:
                self._quiet = JobFuture(loop=self._pool.loop)
                await self._quiet
        finally:
            self._quiet = None
            if not self._held:
                await self._close_now()

    def descriptor(self, *, read_only: bool) -> int:
        """Another descriptor of the same file, whatever its name has become, for ``from_fd``. OSError."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        return os.open(f"/proc/self/fd/{self._fd}", flags | os.O_CLOEXEC)

    def hold(self) -> None:
        self._held += 1

    def let_go(self) -> None:
        self._held -= 1
        if self._closed and not self._held and not self._running:
            self._pool.loop.create_task(self._close_now())

    async def _close_now(self) -> None:
        # A read after this fails instead of reaching whatever file gets the number next.
        fd, self._fd = self._fd, -1
        self.try_read_into = super().try_read_into  # type: ignore[method-assign]
        self.blocking_read = None
        await self._pool.run(os.close, fd)
