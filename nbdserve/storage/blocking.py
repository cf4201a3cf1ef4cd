"""Blocking work on a file descriptor, as the worker threads run it.

Each function does all of its work or raises OSError.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np

from nbdserve.buffers import ZEROES, fill_zeroes
from nbdserve.errors import ImageError
from nbdserve.extents import DATA, ZERO, RunArray
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    block_discard,
    block_zero_out,
    cached_pages,
    fallocate,
)
from nbdserve.units import KIB, MIB, align_down, align_up

FullRead: TypeAlias = Callable[[int, int, memoryview], None]
"""``read_fully``, or its direct I/O form: ``(fd, offset, buffer)``."""
FullWrite: TypeAlias = Callable[[int, int, ReadBuffer], None]
"""``write_fully``, or its direct I/O form: ``(fd, offset, data)``."""
Pieces: TypeAlias = Sequence[tuple[int, ReadBuffer]]
"""Offsets, and what is to be written there."""

_MODE: Final = 0o644
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}
_PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")
_LONG: Final = 64 * KIB
_probe: Final = bytearray(1)
_UNSUPPORTED: Final = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY))
"""What a file system or a driver answers that has no such call. EINVAL is not among them: it is a fault of ours."""


def open_image_file(path: str, flags: int, opened: list[int]) -> int:
    """Open without waiting for the other end of a FIFO, which is refused later; the descriptor goes to ``opened``, too.

    ImageError naming the path.
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK, _MODE)
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(path, f"cannot be opened: {problem}") from error
    opened.append(fd)
    os.set_blocking(fd, True)
    return fd


def check_kind(path: str, mode: int) -> None:
    """ImageError unless ``mode``, of the file at ``path``, is that of something an image can be in."""
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise ImageError(path, f"is {kind}", hint="an image is a regular file or a block device")


def read_fully(fd: int, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer``; zeroes past the end of the file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            fill_zeroes(buffer[done:])
            return
        done += count


def write_and_sync(
    write_each: Callable[[FullWrite, int, Pieces], None],
    write: FullWrite,
    fd: int,
    pieces: Pieces,
    failed_sync: list[OSError],
) -> None:
    """Write all, as ``write_each`` does it with ``write``, and fdatasync. OSError, in ``failed_sync`` if of that."""
    write_each(write, fd, pieces)
    try:
        os.fdatasync(fd)
    except OSError as error:
        failed_sync.append(error)
        raise


def read_all(read: FullRead, fd: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
    """``read`` every ``(offset, buffer)``."""
    for offset, buffer in pieces:
        read(fd, offset, buffer)


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether the range can be read without waiting for the disk. Quick: for the event loop.

    A page that readahead is still filling is in the cache, too, and sendfile would wait for it. Readahead goes upwards,
    so a last byte that can be read without waiting says that the others can be.
    """
    last = offset + length - 1
    try:
        pages = last // _PAGE_SIZE - offset // _PAGE_SIZE + 1
        return cached_pages(fd, offset, length) >= pages and os.preadv(fd, (_probe,), last, os.RWF_NOWAIT) == 1
    except OSError:
        return False


def send_cached(fd: int, socket_fd: int, offset: int, length: int, path: str) -> int:
    """sendfile(2) of a range that ``is_cached``, as far as the socket takes it now. OSError(EIO) past the end."""
    sent = 0
    while sent < length:
        try:
            count = os.sendfile(socket_fd, fd, offset + sent, length - sent)
        except BlockingIOError:
            break
        if not count:
            raise OSError(errno.EIO, f"{path}: the file ends before byte {offset + length}")
        sent += count
    return sent


def write_fully(fd: int, offset: int, data: ReadBuffer) -> None:
    """Write all of ``data``."""
    done = os.pwrite(fd, data, offset) if data else 0
    if done < len(data):
        rest = memoryview(data)
        while done < len(rest):
            count = os.pwrite(fd, rest[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the kernel wrote nothing")
            done += count


class InTurn:
    """Writes into the page cache of one file, of which the kernel lets one at a time.

    Whoever waits in the kernel for another's long write spins on a processor meanwhile: 12 % of the time of a copy.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()

    def write_fully(self, fd: int, offset: int, data: ReadBuffer) -> None:
        """As the function of that name."""
        if len(data) < _LONG:
            write_fully(fd, offset, data)
        else:
            with self._turn:
                write_fully(fd, offset, data)


def extend_file(fd: int, size: int) -> None:
    """Make the file at least ``size`` > 0 bytes long, whoever else is writing past its end.

    A look at the size and an ftruncate could cut off what is written between them. To allocate the last byte never
    does, nor to append zeroes, which may go too far.
    """
    try:
        fallocate(fd, 0, size - 1, 1)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        while (missing := size - os.fstat(fd).st_size) > 0:
            os.pwritev(fd, [ZEROES[: min(missing, len(ZEROES))]], 0, os.RWF_APPEND)


def write_zeroes(write: FullWrite, fd: int, offset: int, length: int) -> None:
    """``write`` zeroes over the range."""
    end = offset + length
    while offset < end:
        count = min(MIB, end - offset)
        write(fd, offset, ZEROES[:count] if count < MIB else ZEROES)
        offset += count


def _try_fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """False where the file system has no such mode."""
    try:
        fallocate(fd, mode, offset, length)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def try_zero_file(fd: int, offset: int, length: int, unmap: bool) -> bool:
    """Zero a range of a regular file through its allocation, growing the file; False where it has to be written.

    The file is never grown with ftruncate, which would cut off what another thread writes beyond the range meanwhile.
    """
    end = offset + length
    if not unmap:
        if _try_fallocate(fd, FALLOC_FL_ZERO_RANGE, offset, length):
            return True
        # tmpfs has no ZERO_RANGE: give the space back, then reserve it anew.
        return _try_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) and _try_fallocate(
            fd, 0, offset, length
        )
    # The last byte is reserved to move the end of the file, and the hole takes it back.
    if end > os.fstat(fd).st_size and not _try_fallocate(fd, 0, end - 1, 1):
        return False
    return _try_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) or _try_fallocate(
        fd, FALLOC_FL_ZERO_RANGE, offset, length
    )


def try_zero_device(fd: int, offset: int, length: int, unmap: bool, fast: bool) -> bool:
    """Zero whole logical blocks of a block device without sending zeroes to it, where ``fast``; else by any means.

    fallocate(2) fails where the device has no command for it, BLKZEROOUT then writes zeroes inside the kernel.
    """
    mode = FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE
    if _try_fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, offset, length):
        return True
    if fast:
        return False
    try:
        block_zero_out(fd, offset, length)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def discard_file(fd: int, offset: int, length: int) -> None:
    """Give back the space of the range, where the file system can; the size stays."""
    _try_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def discard_device(fd: int, offset: int, length: int, block_size: int) -> None:
    """Discard the whole logical blocks inside the range, where the device can."""
    start, end = align_up(offset, block_size), align_down(offset + length, block_size)
    if start >= end:
        return
    try:
        block_discard(fd, start, end - start)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def seek_map(fd: int, offset: int, length: int, size: int, max_runs: int) -> RunArray:
    """DATA and ZERO runs from SEEK_DATA and SEEK_HOLE; all DATA where the file system does not know its holes."""
    starts: list[int] = []
    kinds: list[int] = []
    position, end = offset, offset + length
    while position < end and len(starts) < max_runs:
        kind, following = _next_run(fd, position, size, end)
        starts.append(position)
        kinds.append(kind)
        position = min(following, end)
    start = np.array(starts, np.int64)
    kind_column = np.array(kinds, np.uint8)
    lengths = np.diff(start, append=np.int64(position))
    return RunArray(start, lengths, kind_column, np.where(kind_column == DATA, start, -1))


def _next_run(fd: int, position: int, size: int, end: int) -> tuple[int, int]:
    """The kind at ``position`` and where its run ends, ``end`` or more if it goes that far."""
    if position >= size:
        return ZERO, end
    try:
        data = os.lseek(fd, position, os.SEEK_DATA)
        return (DATA, os.lseek(fd, position, os.SEEK_HOLE)) if data <= position else (ZERO, data)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data from here on
            return ZERO, end
        if error.errno in (errno.EINVAL, *_UNSUPPORTED):
            return DATA, size
        raise
