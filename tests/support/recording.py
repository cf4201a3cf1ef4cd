"""A storage in memory that is nastier than a disk, and that records what a power failure could have left of it.

The content changes some time between the call and its return, operations overtake each other, a non-blocking
attempt may fail after half its work, and space past the end is only as durable as the last flush made it.
"""

from __future__ import annotations

import asyncio
import errno
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from nbdserve.extents import DATA, ZERO, RunArray
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.units import SECTOR_SIZE, align_down, align_up

MEMORY_LIMIT = 1 << 28
"""Bytes one of these storages may grow to: a driver gone wild fails with EFBIG instead of eating the machine."""


class ByteStorage(Storage):
    """Plain bytes, no surprises: what a crash left, given to a driver to open."""

    def __init__(self, content: bytes | bytearray = b"", path: str = "memory", *, read_only: bool = False) -> None:
        self.content = content if isinstance(content, bytearray) else bytearray(content)
        self.path = path
        self.read_only = read_only
        self.closed = False

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.content)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        self._fill(offset, buffer)
        return True

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        self._store(offset, data)
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._fill(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self._store(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        self._store(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        pass

    async def flush(self) -> None:
        pass

    async def truncate(self, size: int) -> None:
        self._resize(size)

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        """Everything inside the content is data: a store that knows of no holes."""
        inside = max(0, min(length, len(self.content) - offset))
        pieces = [(offset, inside, DATA), (offset + inside, length - inside, ZERO)]
        runs = [RunArray.of(start, size, kind, start if kind == DATA else -1) for start, size, kind in pieces if size]
        return runs[0] if runs else RunArray.empty()

    def allocated_size(self) -> int:
        return len(self.content)

    async def close(self) -> None:
        self.closed = True

    def _fill(self, offset: int, buffer: memoryview) -> None:
        piece = self.content[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        if len(piece) < len(buffer):
            buffer[len(piece) :] = bytes(len(buffer) - len(piece))

    def _store(self, offset: int, data: ReadBuffer) -> None:
        apply_bytes(self.content, offset, data)

    def _resize(self, size: int) -> None:
        resize(self.content, size)


def resize(content: bytearray, size: int) -> None:
    """Cut ``content`` or extend it with zeroes."""
    if size > MEMORY_LIMIT:
        raise OSError(errno.EFBIG, f"a storage in memory is kept below {MEMORY_LIMIT} bytes")
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def apply_bytes(content: bytearray, offset: int, data: ReadBuffer) -> None:
    """Write ``data`` into ``content``, extending it with zeroes where needed."""
    end = offset + len(data)
    if end > len(content):
        resize(content, end)
    content[offset:end] = data


# --- the log ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Change:
    """One change of one storage, at its place in the log: when the content changed."""

    store: int
    kind: str
    """``write``, ``zero``, ``discard``, ``truncate`` or ``extend``."""
    offset: int
    length: int
    """Bytes; of ``truncate`` and ``extend`` the new size is ``offset``, and this is 0."""
    data: bytes = b""
    completed: int | None = None
    """The log position at which the caller knew it was done; only from then on does a flush cover it."""
    masked: list[tuple[int, int]] = field(default_factory=list)
    """Ranges that a later, stable change has overwritten."""

    def __str__(self) -> str:
        return f"{self.kind}@{self.store}:{self.offset:#x}+{self.length:#x}"


@dataclass(slots=True, eq=False)
class Barrier:
    """A flush that returned: what had completed before ``begun`` is stable on ``store``."""

    store: int
    begun: int
    site: str


@dataclass(slots=True, eq=False)
class Note:
    """What the guest saw happen (an operation issued, acknowledged, a flush acknowledged)."""

    apply: Callable[[Any], None]
    """Carries the event over to a model that follows the log."""
    acknowledges: bool = False
    """A promise was made here: a crash right after it is the hardest one."""


LogEntry: TypeAlias = Change | Barrier | Note


class Recorder:
    """The common log of all storages of an image (image file, external data file)."""

    def __init__(self, seed: int = 0, *, ignored_site: str | None = None, jitter: int = 3) -> None:
        self.rng = random.Random(seed)
        self.log: list[LogEntry] = []
        self.stores: list[RecordingStorage] = []
        self.initial: list[bytes] = []
        self.sites: dict[str, int] = {}
        self.ignored_site = ignored_site
        self.jitter = jitter

    def storage(self, content: bytes | bytearray, path: str = "recorded") -> RecordingStorage:
        """A recorded storage that starts with ``content``, all of it stable."""
        store = RecordingStorage(self, len(self.stores), content, path)
        self.stores.append(store)
        self.initial.append(bytes(content))
        return store

    def note(self, apply: Callable[[Any], None], *, acknowledges: bool = False) -> None:
        """Put a guest-visible event into the log."""
        self.log.append(Note(apply, acknowledges))

    async def pause(self) -> None:
        """Let others overtake."""
        for _ in range(self.rng.randrange(self.jitter + 1) if self.jitter else 0):
            await asyncio.sleep(0)


class RecordingStorage(ByteStorage):
    """A ByteStorage whose every change goes into a Recorder's log.

    A flush from the recorder's ``ignored_site`` pretends to work: the control that shows that the barrier is needed.
    """

    def __init__(self, recorder: Recorder, index: int, content: bytes | bytearray, path: str) -> None:
        super().__init__(bytearray(content), path)
        self.recorder = recorder
        self.index = index

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if self.recorder.rng.random() < 0.2:
            buffer[:] = b"\xdb" * len(buffer)
            return False
        return super().try_read_into(offset, buffer)

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        rng = self.recorder.rng
        if rng.random() < 0.3:
            stop = offset + rng.randrange(len(data) + 1)
            done = stop - stop % SECTOR_SIZE - offset
            if done > 0:
                self._change("write", offset, bytes(data[:done]), done)
            return False
        self._complete(self._change("write", offset, bytes(data), len(data)))
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = b"\xdb" * len(buffer)
        await self.recorder.pause()
        super()._fill(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        if not len(data):
            return
        await self._run("write", offset, data, len(data))

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        """In any order, side by side: the contract promises none."""
        order = list(pieces)
        self.recorder.rng.shuffle(order)
        results = await asyncio.gather(*(self.write(*piece) for piece in order), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        if fast and self.recorder.rng.random() < 0.5:
            raise OSError(errno.ENOTSUP, "not faster this time")
        await self._run("zero", offset, b"", length)

    async def discard(self, offset: int, length: int) -> None:
        await self._run("discard", offset, b"", length)

    async def truncate(self, size: int) -> None:
        await self._run("truncate", size, b"", 0)

    async def extend(self, size: int) -> None:
        await self._run("extend", size, b"", 0)

    async def flush(self) -> None:
        site = caller_site()
        self.recorder.sites[site] = self.recorder.sites.get(site, 0) + 1
        begun = len(self.recorder.log)
        await self.recorder.pause()
        if self.recorder.ignored_site == site:
            return
        self.recorder.log.append(Barrier(self.index, begun, site))

    async def _run(self, kind: str, offset: int, data: ReadBuffer, length: int) -> None:
        kept = memoryview(data)
        await self.recorder.pause()
        change = self._change(kind, offset, bytes(kept), length)
        await self.recorder.pause()
        self._complete(change)

    def _change(self, kind: str, offset: int, data: bytes, length: int) -> Change:
        if kind == "discard" and self.recorder.rng.random() < 0.5:
            change = Change(self.index, "discard", offset, 0)
        else:
            change = Change(self.index, kind, offset, length, data)
        apply_change(self.content, change)
        self._widen(change)
        self.recorder.log.append(change)
        return change

    def _widen(self, change: Change) -> None:
        """A sector changed in part reaches the disk whole, with what the page cache has around it."""
        end = change.offset + change.length
        start, stop = align_down(change.offset, SECTOR_SIZE), min(align_up(end, SECTOR_SIZE), len(self.content))
        if change.kind != "truncate" and change.length and (start < change.offset or stop > end):
            change.kind = "write"
            change.offset, change.length = start, max(stop, end) - start
            change.data = bytes(self.content[start : start + change.length]).ljust(change.length, b"\0")

    def _complete(self, change: Change) -> None:
        change.completed = len(self.recorder.log)


def apply_change(content: bytearray, change: Change) -> None:
    """Carry a whole ``change`` over to ``content``; a discard zeroes what exists, a zero extends like a write."""
    if change.kind in ("truncate", "extend"):
        if change.kind == "truncate" or change.offset > len(content):
            resize(content, change.offset)
        return
    data = change.data if change.kind == "write" else None
    apply_range(content, change, data, change.offset, change.offset + change.length)


def apply_range(content: bytearray, change: Change, data: bytes | None, start: int, end: int) -> None:
    """Carry ``[start, end)`` of a change over; None is zeroes. What a stable later change overwrote stays."""
    if change.kind == "discard":
        end = min(end, len(content))
    pieces = [(start, end)]
    for mask_start, mask_end in change.masked:
        pieces = [
            piece
            for a, b in pieces
            for piece in ((a, min(b, mask_start)), (max(a, mask_end), b))
            if piece[0] < piece[1]
        ]
    for a, b in pieces:
        if a < b:
            apply_bytes(content, a, bytes(b - a) if data is None else data[a - change.offset : b - change.offset])


def caller_site() -> str:
    """``module:function`` (with its line) of the product code that asked for a flush: the name of that barrier."""
    frame = sys._getframe(1)
    site: Any = frame
    while site is not None:
        module = site.f_globals.get("__name__", "")
        if not module.startswith(("tests.support", "nbdserve.storage", "asyncio", "contextlib")):
            return f"{module}:{site.f_code.co_name}:{site.f_lineno}"
        site = site.f_back
    return "unknown"
