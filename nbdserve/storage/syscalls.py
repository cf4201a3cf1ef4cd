"""The Linux calls Python does not wrap: they block, release the interpreter lock, raise OSError. And the hot preadv."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable
from typing import Final

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

TMPFS_MAGIC: Final = 0x01021994
RAMFS_MAGIC: Final = 0x858458F6

RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_BENEATH: Final = 0x08

_SYNC_FILE_RANGE_WRITE: Final = 2

_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F

# The numbers below 424 differ between machines; those from there on do not.
_SYS_IO_SETUP, _SYS_IO_DESTROY, _SYS_IO_GETEVENTS, _SYS_IO_SUBMIT = {
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
}.get(os.uname().machine, (-1, -1, -1, -1))
_SYS_OPENAT2: Final = 437
_SYS_CACHESTAT: Final = 451
_STATX_DIOALIGN: Final = 0x2000
_AT_EMPTY_PATH: Final = 0x1000

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long


def _raise_errno() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) on ``length`` > 0 bytes."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        if ctypes.get_errno() != 4:  # EINTR
            _raise_errno()


def begin_writeback(fd: int) -> None:
    """sync_file_range(2): begin to write all that is dirty to the disk; what becomes of it is not waited for."""
    if _libc.sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE) != 0:
        _raise_errno()


def file_system_type(fd: int) -> int:
    """``f_type`` of fstatfs(2), a magic number."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) != 0:
        _raise_errno()
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], "little") & 0xFFFFFFFF


def direct_io_alignment(fd: int) -> int:
    """The alignment of offsets and lengths O_DIRECT needs on ``fd``, from statx(2); 4096 where the kernel does not say.

    4096 suits every device in use: no logical block is larger.
    """
    statx = getattr(_libc, "statx", None)
    buffer = ctypes.create_string_buffer(256)
    if statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return 4096
    mask, _memory_align, offset_align = struct.unpack_from("=I148xII", buffer.raw)
    if not mask & _STATX_DIOALIGN or not offset_align:
        return 4096
    return max(int(offset_align), 512)


_cachestat_range = (ctypes.c_uint64 * 2)()
_cachestat_result = (ctypes.c_uint64 * 5)()


def cached_pages(fd: int, offset: int, length: int) -> int:
    """How many pages of the range are in the page cache, from cachestat(2); OSError(ENOSYS) before Linux 6.5.

    1 us for 256 KiB. For one thread: the arguments are reused.
    """
    _cachestat_range[0], _cachestat_range[1] = offset, length
    if _libc.syscall(_SYS_CACHESTAT, fd, _cachestat_range, _cachestat_result, 0) != 0:
        _raise_errno()
    return _cachestat_result[0]


def io_setup(max_requests: int) -> ctypes.c_ulong:
    """An AIO context, io_setup(2); OSError where there is none: ENOSYS, EPERM in a sandbox, EAGAIN past aio-max-nr."""
    context = ctypes.c_ulong(0)
    if _libc.syscall(_SYS_IO_SETUP, max_requests, ctypes.byref(context)) != 0:
        _raise_errno()
    return context


def io_destroy(context: ctypes.c_ulong) -> None:
    """io_destroy(2): give back a context in which no request is under way."""
    _libc.syscall(_SYS_IO_DESTROY, context)


def io_submit(context: ctypes.c_ulong, requests: ctypes.Array[ctypes.c_void_p], count: int) -> int:
    """io_submit(2): start the first ``count`` of ``requests`` (addresses of struct iocb); how many were taken."""
    taken: int = _libc.syscall(_SYS_IO_SUBMIT, context, ctypes.c_long(count), requests)
    if taken < 0:
        _raise_errno()
    return taken


def io_collect(context: ctypes.c_ulong, count: int, events: ctypes.Array[ctypes.c_char]) -> None:
    """io_getevents(2): wait until ``count`` requests are complete, and store their struct io_event in ``events``."""
    done = 0
    while done < count:
        address = ctypes.byref(events, done * 32)
        wanted = ctypes.c_long(count - done)
        result = _libc.syscall(_SYS_IO_GETEVENTS, context, wanted, wanted, address, None)
        if result < 0 and ctypes.get_errno() != 4:  # EINTR
            _raise_errno()
        done += max(result, 0)


def openat2(directory_fd: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2) with close-on-exec; OSError(ENOSYS) before Linux 5.6, EXDEV when ``resolve`` forbids the path."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    name = os.fsencode(path)
    fd: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(directory_fd), ctypes.c_char_p(name), how, ctypes.c_size_t(len(how))
    )
    if fd < 0:
        _raise_errno()
    return fd


def logical_block_size(fd: int) -> int:
    """Bytes per logical block of the block device ``fd``."""
    return int(struct.unpack("=I", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def block_discard(fd: int, offset: int, length: int) -> None:
    """BLKDISCARD of whole logical blocks."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length))


def block_zero_out(fd: int, offset: int, length: int) -> None:
    """BLKZEROOUT of whole logical blocks; the kernel writes zeroes where the device has no command for it."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))


def nowait_reader(fd: int) -> Callable[[int, memoryview], bool]:
    """``try_read_into`` for ``fd``. A closure finds its values faster than a method does, and this is the hot path."""
    preadv, flags = os.preadv, os.RWF_NOWAIT

    def try_read_into(offset: int, buffer: memoryview) -> bool:
        try:
            return preadv(fd, (buffer,), offset, flags) == len(buffer)
        except OSError:
            return False

    return try_read_into
