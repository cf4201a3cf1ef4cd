"""Buffered writes on the event loop, where the file system has no RWF_NOWAIT for them (ext4).

Such a write copies into the page cache, 2 to 7 us for 4 KiB, where a trip to a worker thread costs 25. It has to wait
only while the file is being synced or changed elsewhere, when a page must be read first, and when the kernel
throttles writers. The first three are known beforehand, and the write is then left to a worker. The last is found
out: a write that took longer than 2 ms sends all writes of the file to the workers, for 5 ms the first time and
twice as long each time it happens again soon after, up to a minute.
"""

from __future__ import annotations

import os
from time import monotonic
from typing import Final

from nbdserve.storage.base import ReadBuffer
from nbdserve.units import KIB

_LONGEST: Final = 64 * KIB
"""8 us. For a longer one a worker thread, which lets the event loop go on, is worth its trip."""
_TOO_SLOW: Final = 0.002
_FIRST_PAUSE: Final = 0.005
_LONGEST_PAUSE: Final = 60.0
_PAGE_MASK: Final = os.sysconf("SC_PAGE_SIZE") - 1


class InlineWrites:
    """The writes of one file, and how long they took."""

    def __init__(self) -> None:
        self._paused_until = 0.0
        self._pause = _FIRST_PAUSE
        self._probe = (bytearray(1),)
        self._pair = (bytearray(2),)

    def try_write(self, fd: int, offset: int, data: ReadBuffer) -> bool:
        """Write if that should not have to wait; False: do all of it another way."""
        length = len(data)
        started = monotonic()
        if length > _LONGEST or started < self._paused_until:
            return False
        try:
            if (offset | length) & _PAGE_MASK and not self._ends_cached(fd, offset, offset + length):
                return False
            done = os.pwrite(fd, data, offset) == length
        except OSError:
            return False
        if monotonic() - started > _TOO_SLOW:
            self._back_off(started)
        return done

    def _ends_cached(self, fd: int, offset: int, end: int) -> bool:
        """Whether the pages that are written in part are there; False or a BlockingIOError otherwise.

        Asking takes 1 us. Once is enough for two pages side by side: for the bytes where they meet.
        """
        last = end - 1 & ~_PAGE_MASK
        if last - _PAGE_MASK <= offset < last:
            return os.preadv(fd, self._pair, last - 1, os.RWF_NOWAIT) == 2
        return self._is_cached(fd, offset) and self._is_cached(fd, end - 1)

    def _is_cached(self, fd: int, offset: int) -> bool:
        return os.preadv(fd, self._probe, offset, os.RWF_NOWAIT) == 1

    def _back_off(self, now: float) -> None:
        soon = now - self._paused_until < self._pause
        self._pause = min(self._pause * 2, _LONGEST_PAUSE) if soon else _FIRST_PAUSE
        self._paused_until = now + self._pause
