"""Many small writes with one system call: Linux AIO (io_submit(2)).

On a buffered file io_submit does the writes before it returns. What counts is that a worker thread gives up the
interpreter lock once for all of them: after each single pwrite it would have to wait until the event loop lets go of
the lock.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.syscalls import io_collect, io_destroy, io_setup, io_submit
from nbdserve.units import KIB, MIB

FullWrite: TypeAlias = Callable[[int, int, ReadBuffer], None]
"""Writes all of ``(fd, offset, data)`` or raises OSError."""

_MAX_REQUESTS: Final = 128
_STAGING_SIZE: Final = 1 * MIB
_LARGEST_STAGED: Final = 64 * KIB
"""Longer pieces are written one by one: for them the system call is the smaller part."""
_IOCB: Final = struct.Struct("=QIIHhIQQqQII")
"""struct iocb of linux/aio_abi.h on a little-endian machine: data, key, rw_flags, opcode, priority, fd, buf, nbytes,
offset, reserved, flags, resfd."""
_IOCB_CMD_PWRITE: Final = 1
_EVENT: Final = struct.Struct("=QQqq")


class _Ring:
    """The memory of one thread for one batch at a time."""

    def __init__(self) -> None:
        self.context = io_setup(_MAX_REQUESTS)
        # A context outlives its thread, and the machine has few: 65,536 requests in all by default.
        # At the exit of the process the kernel destroys them together: one by one each waits 40 ms for its own.
        weakref.finalize(self, io_destroy, self.context).atexit = False
        self.staging = bytearray(_STAGING_SIZE)
        self.view = memoryview(self.staging)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.staging))
        self.iocbs = bytearray(_IOCB.size * _MAX_REQUESTS)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.iocbs))
        addresses = range(first, first + len(self.iocbs), _IOCB.size)
        self.pointers = (ctypes.c_void_p * _MAX_REQUESTS)(*addresses)
        self.events = bytearray(_EVENT.size * _MAX_REQUESTS)
        self.events_buffer = (ctypes.c_char * len(self.events)).from_buffer(self.events)


class _Local(threading.local):
    ring: _Ring | None = None
    unavailable = False


_local: Final = _Local()


def write_singly(write: FullWrite, fd: int, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
    """``write_all`` without AIO: for direct I/O, whose read-modify-writes must know of every other write."""
    for offset, data in pieces:
        write(fd, offset, data)


def write_all(write: FullWrite, fd: int, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
    """Write every ``(offset, data)``; ``write`` does those that gain nothing here, and what AIO leaves undone."""
    ring = _ring() if len(pieces) > 1 else None
    if ring is None:
        write_singly(write, fd, pieces)
        return
    requests: list[tuple[int, int, int]] = []
    used = 0
    for offset, data in pieces:
        length = len(data)
        if length > _LARGEST_STAGED:
            write(fd, offset, data)
            continue
        if used + length > _STAGING_SIZE or len(requests) == _MAX_REQUESTS:
            _submit(ring, write, fd, requests)
            requests, used = [], 0
        ring.view[used : used + length] = data
        requests.append((offset, used, length))
        used += length
    if requests:
        _submit(ring, write, fd, requests)


def _ring() -> _Ring | None:
    """This thread's ring; None where the kernel or a sandbox has no AIO."""
    if _local.ring is None and not _local.unavailable:
        try:
            _local.ring = _Ring()
        except OSError:
            _local.unavailable = True
    return _local.ring


def _submit(ring: _Ring, write: FullWrite, fd: int, requests: Sequence[tuple[int, int, int]]) -> None:
    pack, iocbs, address = _IOCB.pack_into, ring.iocbs, ring.address
    for index, (offset, start, length) in enumerate(requests):
        pack(iocbs, index * _IOCB.size, index, 0, 0, _IOCB_CMD_PWRITE, 0, fd, address + start, length, offset, 0, 0, 0)
    try:
        submitted = io_submit(ring.context, ring.pointers, len(requests))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            raise
        submitted = 0
    left = set(range(submitted, len(requests)))
    if submitted:
        io_collect(ring.context, submitted, ring.events_buffer)
        for index, _, result, _ in _EVENT.iter_unpack(memoryview(ring.events)[: submitted * _EVENT.size]):
            if result != requests[index][2]:
                left.add(index)
    for index in sorted(left):  # refused, or written in part: done again in full, so that the error, if any, is raised
        offset, start, length = requests[index]
        write(fd, offset, ring.view[start : start + length])
