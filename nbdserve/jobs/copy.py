"""Copying the content of a disk to another, with several requests in flight.

What reads as zeroes stays zeroes, what belongs to a common base stays there; the rest is read, searched for zeroes,
and written, or compressed. Each request is for as many stretches of the disk as fill a buffer. It is one trip to the
worker threads where images hold their data in files and there was nothing but data lately; else one to read and one to
write, and while one request is written, the next is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from nbdserve.block.bulk import Ranges
from nbdserve.block.node import Node
from nbdserve.block.transfer import STEP, transfer
from nbdserve.buffers import fill_zeroes
from nbdserve.errors import RequestError, naming
from nbdserve.jobs.stretches import Stretch, What
from nbdserve.jobs.zeroes import data_runs
from nbdserve.units import GIB, KIB, MIB, SECTOR_SIZE

CHUNK: Final = 4 * MIB
"""What is read and written at a time; also the longest single read and write, which ends at a multiple of it."""
_TRIP: Final = 4 * CHUNK
"""The most that is copied in one trip."""
_MOST_PIECES: Final = 128
_WRITERS: Final = 3
"""Writes under way at a time: a file takes one, and the next one is there when that has ended."""
_TRUSTED: Final = 4
"""After so many requests without zeroes the next ones are made in one trip; after each that finds some, it takes twice
as many."""
_MOST_NEEDED: Final = 1024
_ZERO_STEP: Final = GIB
_LARGEST_UNIT: Final = 64 * KIB


_Piece: TypeAlias = tuple[int, int, bool]
"""Offset and length of what is copied, and whether it is zeroes to be written."""


class Source(Protocol):
    """What can be copied from: a node, or a filter on one."""

    path: str

    async def read_all(self, ranges: Ranges) -> None:
        """As ``Node.read_all``."""


class Target(Protocol):
    """What can be copied to."""

    path: str

    async def write_all(self, ranges: Ranges) -> None:
        """As ``Node.write_all``."""

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
    """Writes one or more whole units compressed, instead of ``Target.write_all``; ``unit`` is their size then."""
    in_order: bool = False
    """Changes of the target begin in the order of their offsets, and so space is allocated in that order."""
    sequential: bool = False
    """With ``in_order``: each begins when the one before it has ended."""
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
        self._writers = asyncio.Semaphore(options.requests if options.compress is not None else _WRITERS)
        self._spare: list[memoryview] = []
        self._steps: list[memoryview] = []
        """Spare buffers for requests in one trip."""
        plain = options.compress is None and options.skip_errors is None and not options.sequential
        self._nodes = (source, target) if plain and isinstance(source, Node) and isinstance(target, Node) else None
        """Between which requests may be made in one trip."""
        self._needed = _TRUSTED
        self._without_zeroes = 0
        """Requests in succession that were nothing but data."""
        self._batch: list[_Piece] = []
        """What is copied with the next request."""
        self._batched = 0
        self._before: asyncio.Event | None = None

    async def run(self, what: AsyncIterable[Stretch]) -> None:
        """Copy all of it. The first error ends the copy, after what is in flight has ended.

        RequestError or OSError, whose message names source or target by its path.
        """
        try:
            async for stretch in what:
                await self._copy(stretch)
            await self._send()
            await self._drain()
        except BaseException:
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running)
            raise

    async def _copy(self, stretch: Stretch) -> None:
        offset, length, what = stretch
        end = offset + length
        # "Fully allocated" means zeroes as well.
        fills = what == What.ZERO and (self._options.write_zeroes or not self._options.sparse)
        if what == What.SKIP or (what == What.ZERO and self._options.zeroed and not fills):
            await self._pace.throttle(0)
            self._done(length)
            return
        zeroes = what == What.ZERO and not fills
        step = _ZERO_STEP if zeroes else CHUNK
        while offset < end:
            part = min(end, offset - offset % step + step) - offset
            if self._pace.pause_requested:
                await self._send()
                await self._drain()
            await self._pace.throttle(part)
            if zeroes:
                if self._options.in_order:
                    await self._send()
                await self._start(self._zero(offset, part, *self._turn()))
            else:
                if self._batched + part > (_TRIP if self._trusts() else CHUNK) or len(self._batch) == _MOST_PIECES:
                    await self._send()
                self._batch.append((offset, part, fills))
                self._batched += part
            offset += part

    async def _send(self) -> None:
        """Begin to copy what has gathered."""
        if self._batch:
            batch, self._batch, self._batched = self._batch, [], 0
            await self._start(self._data(batch, *self._turn()))

    def _turn(self) -> tuple[asyncio.Event | None, asyncio.Event]:
        """What a request waits for before it changes the target, if there is an order, and what it sets then."""
        before = self._before if self._options.in_order else None
        self._before = begun = asyncio.Event()
        return before, begun

    async def _start(self, work: Coroutine[None, None, None]) -> None:
        try:
            await self._free.acquire()
            if self._failure is not None:
                self._free.release()
                raise self._failure
        except BaseException:
            work.close()
            raise
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)

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

    async def _zero(self, offset: int, length: int, before: asyncio.Event | None, begun: asyncio.Event) -> None:
        try:
            if before is not None:
                await before.wait()
            if not self._options.sequential:
                begun.set()
            with naming(self._target.path):
                await self._target.zero(offset + self._shift, length, unmap=self._options.unmap)
        finally:
            begun.set()
        self._done(length)

    async def _data(self, batch: list[_Piece], before: asyncio.Event | None, begun: asyncio.Event) -> None:
        try:
            if not await self._in_one_trip(batch, before, begun):
                for part in _parts(batch):
                    await self._in_two_trips(part, before, begun)
        finally:
            begun.set()
        self._done(sum(length for _, length, _ in batch))

    def _trusts(self) -> bool:
        """Whether requests are made in one trip: there was nothing but data lately."""
        return self._nodes is not None and self._without_zeroes >= self._needed

    async def _in_one_trip(self, batch: list[_Piece], before: asyncio.Event | None, begun: asyncio.Event) -> bool:
        """Copy it, unless something in it is zero; False: it is still to be done."""
        if self._nodes is None or not self._trusts() or any(fills for _, _, fills in batch):
            return False
        buffer = self._steps.pop() if self._steps else memoryview(bytearray(STEP))
        try:
            if before is not None:
                await before.wait()
            ranges = [(offset, length) for offset, length, _ in batch]
            async with self._writers:
                if await transfer(*self._nodes, ranges, self._shift, buffer, self._is_data, begun.set):
                    return True
        finally:
            self._steps.append(buffer)
        self._without_zeroes = 0
        self._needed = min(2 * self._needed, _MOST_NEEDED)
        return False

    def _is_data(self, offset: int, data: memoryview) -> bool:
        """Nothing in it becomes a hole of the target."""
        options = self._options
        if options.write_zeroes or not options.sparse:
            return True
        if offset % options.unit == 0 and all(data.cast("Q")[:: options.unit >> 3].tolist()):
            return True  # the first words tell: 2 us instead of 60
        return data_runs(data, offset, options.unit, options.sparse) == [(False, 0, len(data))]

    async def _in_two_trips(self, batch: list[_Piece], before: asyncio.Event | None, begun: asyncio.Event) -> None:
        buffer = self._spare.pop() if self._spare else memoryview(bytearray(CHUNK))
        ranges: list[tuple[int, memoryview]] = []
        wanted: list[tuple[int, memoryview]] = []
        position = 0
        for offset, length, fills in batch:
            data = buffer[position : position + length]
            position += length
            ranges.append((offset, data))
            if fills:
                fill_zeroes(data)
            else:
                wanted.append((offset, data))
        try:
            await self._read(wanted)
            if before is not None:
                await before.wait()
            async with self._writers:
                if not self._options.sequential:
                    begun.set()
                with naming(self._target.path):
                    await self._write(ranges)
        finally:
            self._spare.append(buffer)

    async def _read(self, ranges: list[tuple[int, memoryview]]) -> None:
        try:
            with naming(self._source.path):
                await self._source.read_all(ranges)
        except (OSError, RequestError) as error:
            if self._options.skip_errors is None:
                raise
            if len(ranges) > 1:
                for piece in ranges:
                    await self._read([piece])
                return
            [(offset, data)] = ranges
            if len(data) <= SECTOR_SIZE:
                fill_zeroes(data)
                self._options.skip_errors(offset, len(data), error)
                return
            step = max(SECTOR_SIZE, len(data) // 32 // SECTOR_SIZE * SECTOR_SIZE)
            for start in range(0, len(data), step):
                await self._read([(offset + start, data[start : start + step])])

    async def _write(self, ranges: list[tuple[int, memoryview]]) -> None:
        options = self._options
        self._without_zeroes += 1
        if options.compress is not None:
            for offset, data in ranges:
                await self._write_compressed(options.compress, offset + self._shift, data)
            return
        if options.write_zeroes or not options.sparse:
            await self._target.write_all([(offset + self._shift, data) for offset, data in ranges])
            return
        found: list[tuple[int, memoryview]] = []
        for guest_offset, data in ranges:
            offset = guest_offset + self._shift
            for is_hole, start, end in data_runs(data, offset, options.unit, options.sparse):
                if is_hole:
                    self._without_zeroes = 0
                if not is_hole:
                    found.append((offset + start, data[start:end]))
                elif not options.zeroed:
                    await self._target.write_all(found)
                    found = []
                    await self._target.zero(offset + start, end - start, unmap=options.unmap)
        await self._target.write_all(found)

    async def _write_compressed(
        self, compress: Callable[[int, memoryview], Awaitable[None]], offset: int, data: memoryview
    ) -> None:
        """Whole units of data, and of zeroes."""
        options = self._options
        if options.write_zeroes or not options.sparse:
            await compress(offset, data)
            return
        for is_hole, start, end in data_runs(data, offset, options.unit, options.unit):
            if not is_hole:
                await compress(offset + start, data[start:end])
            elif not options.zeroed:
                await self._target.zero(offset + start, end - start, unmap=options.unmap)


def _parts(batch: list[_Piece]) -> Iterator[list[_Piece]]:
    """The batch in parts that fit into a buffer."""
    part: list[_Piece] = []
    total = 0
    for piece in batch:
        if total + piece[1] > CHUNK:
            yield part
            part, total = [], 0
        part.append(piece)
        total += piece[1]
    yield part
