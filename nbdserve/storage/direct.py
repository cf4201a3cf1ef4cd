"""Reads and writes that bypass the page cache (O_DIRECT), at any offset and length."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from nbdserve.buffers import fill_zeroes
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.blocking import write_fully
from nbdserve.units import MIB, align_down, align_up

_BOUNCE_SIZE: Final = MIB


class _Bounce(threading.local):
    """One page-aligned buffer per worker thread."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, _BOUNCE_SIZE))


class WriteGate:
    """Writes of whole blocks run side by side; a read-modify-write runs alone.

    A read-modify-write puts back bytes of its block that it read before, which would undo another write to them.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._sharing = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Together with other holders of this."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._sharing += 1
        try:
            yield
        finally:
            with self._condition:
                self._sharing -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With no other holder of any kind."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._alone = True
            self._condition.wait_for(lambda: not self._sharing)
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()


class DirectFile:
    """The blocking half of a file opened with O_DIRECT, for worker threads; bytes go through aligned bounce buffers."""

    def __init__(self, alignment: int, *, fixed_size: bool) -> None:
        self._alignment = alignment
        self._fixed_size = fixed_size
        self._bounce = _Bounce()
        self._gate = WriteGate()

    def gate_for(self, offset: int, length: int) -> AbstractContextManager[None]:
        """What a change of the range has to hold: whole blocks share the file, parts of blocks have it alone."""
        return self._gate.alone() if (offset | length) % self._alignment else self._gate.shared()

    def read_fully(self, fd: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; zeroes past the end of the file."""
        done = 0
        while done < len(buffer):
            start = align_down(offset + done, self._alignment)
            skip = offset + done - start
            count = min(len(buffer) - done, _BOUNCE_SIZE - skip)
            got = self._read_blocks(fd, start, align_up(skip + count, self._alignment)) - skip
            if got <= 0:
                fill_zeroes(buffer[done:])
                return
            count = min(count, got)
            buffer[done : done + count] = self._bounce.view[skip : skip + count]
            done += count

    def write_fully(self, fd: int, offset: int, data: ReadBuffer) -> None:
        """Write all of ``data``, growing the file no further than to their end."""
        view = memoryview(data)
        if not view:
            return
        with self.gate_for(offset, len(view)):
            if (offset | len(view)) % self._alignment:
                self._write_unaligned(fd, offset, view)
            else:
                self._write_blocks(fd, offset, view)

    def _read_blocks(self, fd: int, start: int, length: int) -> int:
        """Fill the bounce buffer; the bytes got, fewer only at the end of the file."""
        done = 0
        while done < length:
            count = os.preadv(fd, [self._bounce.view[done:length]], start + done)
            done += count
            if count == 0 or done % self._alignment:
                break
        return done

    def _write_blocks(self, fd: int, offset: int, data: memoryview) -> None:
        for start in range(0, len(data), _BOUNCE_SIZE):
            piece = data[start : start + _BOUNCE_SIZE]
            bounce = self._bounce.view[: len(piece)]
            bounce[:] = piece
            write_fully(fd, offset + start, bounce)

    def _write_unaligned(self, fd: int, offset: int, data: memoryview) -> None:
        size = 0 if self._fixed_size else os.fstat(fd).st_size
        end = offset + len(data)
        done = 0
        while done < len(data):
            start = align_down(offset + done, self._alignment)
            skip = offset + done - start
            count = min(len(data) - done, _BOUNCE_SIZE - skip)
            length = align_up(skip + count, self._alignment)
            # Only a first and a last block can be partial, but reading what lies between costs less than two reads.
            got = self._read_blocks(fd, start, length) if skip or skip + count < length else length
            if got < length:
                fill_zeroes(self._bounce.view[got:length])
            self._bounce.view[skip : skip + count] = data[done : done + count]
            write_fully(fd, start, self._bounce.view[:length])
            done += count
        if not self._fixed_size and end % self._alignment and align_up(end, self._alignment) > max(size, end):
            os.ftruncate(fd, max(size, end))
