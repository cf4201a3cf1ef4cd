"""A random guest: several operations in flight, and a model that knows what each promised."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from nbdserve.block.forms import READ_DATA, READ_ZERO
from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN, WRITE_WAIT, Done
from nbdserve.units import KIB, MIB, SECTOR_SIZE
from tests.support.model import ModelDisk, Operation


class Disk(Protocol):
    """What a workload drives: a Node, or an NBD client."""

    def submit_write(self, offset: int, data: memoryview, done: Done) -> int: ...
    async def read(self, offset: int, length: int) -> bytes | bytearray: ...
    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None: ...
    async def zero(self, offset: int, length: int, *, unmap: bool = True, fua: bool = False) -> None: ...
    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None: ...
    async def flush(self) -> None: ...


@dataclass(frozen=True)
class Mix:
    """What the guest does, in relative weights, and how."""

    write: float = 10
    zero: float = 2
    discard: float = 2
    read: float = 2
    flush: float = 1.5
    fua: float = 0.05
    """The share of changes with FUA."""
    unaligned: float = 0.15
    """The share of changes that begin and end at any byte."""
    overlap: float = 0.3
    """How often an operation that hits one in flight is sent all the same."""
    in_flight: int = 4
    largest: int = MIB
    hot: float = 0.5
    """The share of operations that go to the hot eighth of the disk, so that clusters are freed and used again."""


@dataclass(eq=False)
class _Active:
    start: int
    end: int
    whole: bool
    """A write or zeroing of whole sectors: the only kind that may be overtaken by another of its kind."""


class Workload:
    """Drives ``disk`` and tells ``model``; ``note`` (of a recorder) is told what the guest saw, and when."""

    def __init__(
        self,
        disk: Disk,
        model: ModelDisk,
        rng: random.Random,
        *,
        mix: Mix | None = None,
        note: Callable[..., None] = lambda apply, acknowledges=False: None,
        on_error: Callable[[BaseException], bool] = lambda error: False,
    ) -> None:
        """``on_error`` says whether a failed operation is expected; the model then knows old or new for its range."""
        self.disk = disk
        self.model = model
        self.rng = rng
        self.mix = mix or Mix()
        self.note = note
        self.on_error = on_error
        self.active: set[_Active] = set()
        self.errors = 0
        self.outcomes: Counter[int] = Counter()
        """How often ``submit_write`` answered what."""
        self.stopped = False

    async def run(self, operations: int) -> int:
        """Do so many operations (fewer after ``stop``), ``in_flight`` at a time; how many it were.

        The first unexpected error is raised when all that are in flight have ended.
        """
        done = 0
        self.stopped = False

        async def guest() -> None:
            nonlocal done
            while done < operations and not self.stopped:
                done += 1
                try:
                    await self.step()
                except BaseException:
                    self.stop()
                    raise

        results = await asyncio.gather(*(guest() for _ in range(self.mix.in_flight)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return done

    def stop(self) -> None:
        """End ``run`` early."""
        self.stopped = True

    async def step(self) -> None:
        """One operation."""
        mix = self.mix
        kind = self.rng.choices(
            ("write", "zero", "discard", "read", "flush"), (mix.write, mix.zero, mix.discard, mix.read, mix.flush)
        )[0]
        if kind == "flush":
            await self.flush()
            return
        for _ in range(20):
            offset, length = self._range(kind)
            whole = kind in ("write", "zero") and not offset % SECTOR_SIZE and not length % SECTOR_SIZE
            mine = _Active(offset // SECTOR_SIZE, -(-(offset + length) // SECTOR_SIZE), whole)
            met = [other for other in self.active if other.start < mine.end and mine.start < other.end]
            if not met or (whole and all(other.whole for other in met) and self.rng.random() < mix.overlap):
                break
        else:
            await asyncio.sleep(0)
            return
        self.active.add(mine)
        try:
            if kind == "read":
                await self._read(offset, length)
            else:
                await self._change(kind, offset, length)
        finally:
            self.active.discard(mine)

    async def flush(self) -> None:
        """One flush, and the promise that comes with it."""
        begun = self.model.begin_flush()
        try:
            await self.disk.flush()
        except Exception as error:
            self._failed(error)
            return
        self.note(lambda model: model.flushed(begun), acknowledges=True)
        self.model.flushed(begun)

    async def verify(self) -> bytes:
        """Read the whole disk with nothing in flight and settle what was uncertain; its content."""
        content = await read_all(self.disk, self.model.size)
        self.model.check_read(content)
        return content

    async def _read(self, offset: int, length: int) -> None:
        try:
            content = await read_as_served(self.disk, offset, length)
        except Exception as error:
            self._failed(error)
            return
        self.model.check_read(content, offset)

    async def _change(self, kind: Any, offset: int, length: int) -> None:
        fua = self.rng.random() < self.mix.fua
        operation = self.model.issue(kind, offset, length)
        self.note(lambda model: model.add(operation))
        try:
            await self._perform(operation, fua)
        except Exception as error:
            self.model.complete(operation, failed=True)
            self._failed(error)
            return
        self.model.complete(operation)
        if fua:
            self.note(lambda model: model.stable(operation), acknowledges=True)
            self.model.stable(operation)

    async def _perform(self, operation: Operation, fua: bool) -> None:
        offset, length = operation.offset, operation.length
        if operation.kind == "write":
            data = operation.data
            if fua or not await self._submit(offset, data):
                await self.disk.write(offset, data, fua=fua)
        elif operation.kind == "zero":
            await self.disk.zero(offset, length, unmap=self.rng.random() < 0.6, fua=fua)
        else:
            await self.disk.discard(offset, length, fua=fua)

    async def _submit(self, offset: int, data: bytes) -> bool:
        """Write as a connection does; False if that has to wait and nothing was done."""
        outcome = await submit(self.disk, offset, data, lent=self.rng.random() < 0.5)
        self.outcomes[outcome] += 1
        return outcome != WRITE_WAIT

    def _failed(self, error: BaseException) -> None:
        self.errors += 1
        if not self.on_error(error):
            raise error

    def _range(self, kind: str) -> tuple[int, int]:
        """Sizes spread over the magnitudes; some ranges are whole clusters of a likely size, some have ragged ends."""
        rng, size = self.rng, self.model.size
        most = min(size, self.mix.largest)
        length = int(SECTOR_SIZE * 2 ** (rng.random() * (most // SECTOR_SIZE).bit_length()))
        length = max(SECTOR_SIZE, min(most, length))
        area = size // 8 if rng.random() < self.mix.hot else size
        length = min(length, area)
        offset = rng.randrange(area - length + 1)
        if kind != "read" and rng.random() < self.mix.unaligned:
            return offset, max(1, min(size - offset, length + rng.randrange(-SECTOR_SIZE, SECTOR_SIZE)))
        unit = rng.choice((SECTOR_SIZE, SECTOR_SIZE, 4 * KIB, 4 * KIB, 64 * KIB))
        offset -= offset % unit
        length = max(unit, length - length % unit)
        if offset + length > size:
            length = size - offset
        return offset, length - length % SECTOR_SIZE or SECTOR_SIZE


async def read_as_served(disk: Disk, offset: int, length: int) -> bytes | bytearray:
    """Read as a connection does: at once if that is possible."""
    if isinstance(disk, Node):
        buffer = bytearray(b"\xdb" * length)
        outcome = disk.try_read_into(offset, memoryview(buffer))
        if outcome in (READ_DATA, READ_ZERO):
            return buffer if outcome == READ_DATA else bytes(length)
    return await disk.read(offset, length)


async def submit(disk: Disk, offset: int, data: bytes, *, lent: bool = True) -> int:
    """``submit_write``, awaited where it is taken; its outcome. A ``lent`` buffer is used again at once."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: Exception | None) -> None:
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    buffer = bytearray(data) if lent else data
    outcome = disk.submit_write(offset, memoryview(buffer), done)
    assert outcome in (WRITE_WAIT, WRITE_DONE, WRITE_TAKEN)
    assert not ended.done(), "done is called before submit_write returned"
    if isinstance(buffer, bytearray):
        buffer[:] = b"\xdb" * len(buffer)
    if outcome == WRITE_TAKEN:
        await ended
    return outcome


async def read_all(disk: Disk, size: int, step: int = 16 * MIB) -> bytes:
    """The whole disk."""
    return b"".join([bytes(await disk.read(offset, min(step, size - offset))) for offset in range(0, size, step)])
