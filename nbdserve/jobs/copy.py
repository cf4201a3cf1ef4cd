"""Copying the content of a disk to another, with several requests in flight.

What reads as zeroes stays zeroes, what belongs to a common base stays there; the rest is read, searched for zeroes,
and written, or compressed.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from nbdserve.block.pieces import Piece, zero_pieces
from nbdserve.errors import RequestError
from nbdserve.jobs.stretches import Stretch, What
from nbdserve.jobs.zeroes import data_runs
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import GIB, KIB, MIB, SECTOR_SIZE

CHUNK: Final = 2 * MIB
"""The longest read and write. Longer ones do not fit the processor's cache between the two."""
_ZERO_STEP: Final = GIB
_LARGEST_UNIT: Final = 64 * KIB


class Source(Protocol):
    """What can be copied from: a node, or a filter on one."""

    async def read_pieces(self, offset: int, buffer: memoryview) -> list[Piece]:
        """As ``Node.read_pieces``."""


class Target(Protocol):
    """What can be copied to."""

    async def write(self, offset: int, data: ReadBuffer) -> None:
        """As ``Node.write``."""

    async def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """As ``Node.zero``."""


class Pace(Protocol):
    """Who is asked before each request: a ``Job``."""

    @property
    def pause_requested(self) -> bool:
        """``throttle`` will wait until nothing is in flight and then some."""

    async def throttle(self, length: int) -> None:
        """Wait until ``length`` more bytes may be copied."""


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy."""

    requests: int = 8
    """How many at a time."""
    sparse: int = 4 * KIB
    """Runs of zeroes in the data, of at least so many bytes, become zeroes of the target; 0: none do."""
    unit: int = 4 * KIB
    """Zeroes are looked for in pieces of this size (``unit_for``)."""
    zeroed: bool = False
    """What is not written reads as zeroes in the target."""
    unmap: bool = True
    """Zeroes may give space back."""
    write_zeroes: bool = False
    """Zeroes are written like data: the target has no other way to say that they are its own, and not the base's."""
    compress: Callable[[int, memoryview], Awaitable[None]] | None = None
    """Writes one or more whole units compressed, instead of ``Target.write``; ``unit`` is their size then."""
    in_order: bool = False
    """Writes begin one after the other, in the order of their offsets."""
    skip_errors: Callable[[int, int, Exception], None] | None = None
    """Called with offset, length and error of what cannot be read; it counts as zeroes. None: it ends the copy."""
    progress: Callable[[int], None] | None = None
    """Called with every number of bytes that are done."""


def unit_for(granularity: int, sparse: int) -> int:
    """The size of the pieces to look for zeroes in, for a target that allocates by ``granularity``.

    A target that allocates 64 KiB at once gains nothing from a hole inside them; in larger ones a hole of the file
    remains.
    """
    smallest = min(4 * KIB, 1 << max(sparse, SECTOR_SIZE).bit_length() - 1)
    return max(smallest, min(granularity, _LARGEST_UNIT))


class _Stopped:
    """No pace at all."""

    pause_requested = False

    async def throttle(self, length: int) -> None:
        """At once."""


_UNPACED: Final = _Stopped()


class Copy:
    """One copy under way. ``shift`` is added to the offsets of the source for those in the target."""

    def __init__(
        self, source: Source, target: Target, options: CopyOptions, *, pace: Pace = _UNPACED, shift: int = 0
    ) -> None:
        self._source = source
        self._target = target
        self._options = options
        self._pace = pace
        self._shift = shift
        self._running: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._free = asyncio.Semaphore(options.requests)
        self._spare: list[mmap.mmap] = []
        self._last: asyncio.Task[None] | None = None

    async def run(self, what: AsyncIterable[Stretch]) -> None:
        """Copy all of it. The first error ends the copy, after what is in flight has ended.

        RequestError or OSError, whose message names source or target by its path.
        """
        try:
            async for stretch in what:
                await self._copy(stretch)
            await self._drain()
        except BaseException:
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running)
            raise
        finally:
            self._spare.clear()  # not closed: the traceback of an error may still have a view

    async def _copy(self, stretch: Stretch) -> None:
        offset, length, what = stretch
        end = offset + length
        # "Fully allocated" means zeroes as well.
        fills = what == What.ZERO and (self._options.write_zeroes or not self._options.sparse)
        if what == What.SKIP or (what == What.ZERO and self._options.zeroed and not fills):
            await self._pace.throttle(0)
            self._done(length)
            return
        step = _ZERO_STEP if what == What.ZERO and not fills else CHUNK
        while offset < end:
            part = min(end, offset - offset % step + step) - offset
            if self._pace.pause_requested:
                await self._drain()
            await self._pace.throttle(part)
            await self._free.acquire()
            if self._failure is not None:
                self._free.release()
                raise self._failure
            work = self._zero(offset, part) if step == _ZERO_STEP else self._data(offset, part, self._last, fills)
            task = asyncio.get_running_loop().create_task(work)
            self._running.add(task)
            task.add_done_callback(self._ended)
            self._last = task if self._options.in_order else None
            offset += part

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._free.release()
        if not task.cancelled() and (error := task.exception()) is not None and self._failure is None:
            self._failure = error

    async def _drain(self) -> None:
        while self._running:
            await asyncio.wait(self._running)
        if self._failure is not None:
            raise self._failure

    def _done(self, length: int) -> None:
        if self._options.progress is not None:
            self._options.progress(length)

    async def _zero(self, offset: int, length: int) -> None:
        await self._target.zero(offset + self._shift, length, unmap=self._options.unmap)
        self._done(length)

    async def _data(self, offset: int, length: int, before: asyncio.Task[None] | None, fills: bool) -> None:
        buffer = self._spare.pop() if self._spare else mmap.mmap(-1, CHUNK)
        try:
            with memoryview(buffer) as whole, whole[:length] as data:
                if fills:
                    zero_pieces(data, [(True, length)])
                else:
                    await self._read(offset, data)
                if before is not None:
                    await asyncio.wait([before])
                await self._write(offset + self._shift, data)
        finally:
            self._spare.append(buffer)
        self._done(length)

    async def _read(self, offset: int, data: memoryview) -> None:
        try:
            zero_pieces(data, await self._source.read_pieces(offset, data))
        except (OSError, RequestError) as error:
            if self._options.skip_errors is None:
                raise
            if len(data) <= SECTOR_SIZE:
                zero_pieces(data, [(True, len(data))])
                self._options.skip_errors(offset, len(data), error)
                return
            step = max(SECTOR_SIZE, len(data) // 32 // SECTOR_SIZE * SECTOR_SIZE)
            for start in range(0, len(data), step):
                await self._read(offset + start, data[start : start + step])

    async def _write(self, offset: int, data: memoryview) -> None:
        options = self._options
        write = options.compress or self._target.write
        if options.write_zeroes or not options.sparse:
            await write(offset, data)
            return
        shortest = options.sparse if options.compress is None else options.unit
        for is_hole, start, end in data_runs(data, offset, options.unit, shortest):
            if not is_hole:
                with data[start:end] as part:
                    await write(offset + start, part)
            elif not options.zeroed:
                await self._target.zero(offset + start, end - start, unmap=options.unmap)
