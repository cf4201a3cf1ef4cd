"""A node: an open image chain as one disk.

Two forms of each request. The ``try_`` methods run on the event loop without waiting and answer "not now" when tables,
pages or space are missing. The ``async`` methods do the same work for every case, awaiting what is missing.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from nbdserve.block import bulk, counting, cow, forms
from nbdserve.block.chain import NEEDS_TABLE, resolve
from nbdserve.block.drain import Gate, uninterrupted
from nbdserve.block.forms import READ_DATA, READ_SPLIT, READ_WAIT, READ_ZERO
from nbdserve.block.pieces import Piece, add_piece, zero_pieces
from nbdserve.block.places import Places
from nbdserve.block.requests import RangeLocks
from nbdserve.block.tracking import NodeBitmaps
from nbdserve.block.watchers import Watcher
from nbdserve.block.writeback import Writeback
from nbdserve.block.writer import WRITE_DONE, BatchWriter, Done
from nbdserve.errors import ConfigError, RequestError
from nbdserve.extents import COMPRESSED, DATA, ZERO
from nbdserve.formats.base import Allocation, FormatDriver, RoomNeededError
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.units import MIB, align_down, align_up

MAX_SYNC_PIECES: Final = 64
"""Runs that one read may be made of on the event loop, 2 to 3 us each; a read of more is handed to a task."""


class Node:
    """The layers of a chain, top first, and the policy of the one who opened it."""

    def __init__(
        self,
        layers: Sequence[FormatDriver],
        *,
        unmap: bool = False,
        detect_zeroes: str = "off",
        writethrough: bool = False,
        guard_probed_raw: bool = False,
        locks: RangeLocks | None = None,
    ) -> None:
        self.unmap = unmap
        self.detect_zeroes = detect_zeroes
        self.writethrough = writethrough
        self.guard_probed_raw = guard_probed_raw
        self.locks = locks or RangeLocks()
        self.gate = Gate(self.choose_forms)
        self.changes = 1
        """Changes completed, so that a flush can tell whether another has covered them."""
        self._stable_changes = 0
        self._flush: asyncio.Task[None] | None = None
        self._flush_covers = 0
        self.busy_with = ""
        """The type of the job that works on the layers, which nobody else may exchange or resize meanwhile."""
        self.tell_reopened: Callable[[FormatDriver, FormatDriver], None] | None = None
        """Is told of a layer that was opened again, and of what has taken its place."""
        self._watchers: tuple[Watcher, ...] = ()
        self._guards: tuple[Watcher, ...] = ()
        self.counters: counting.Counters | None = None
        """Of its requests, where ``counting.begin`` was called."""
        self._widest = 0
        """The largest size the disk has had, which clients may still take it to have."""
        self._adopt(layers)
        self.bitmaps = NodeBitmaps(self)

    def _adopt(self, layers: Sequence[FormatDriver]) -> None:
        """Take ``layers`` for the chain, and renew what depends on them."""
        self.layers = list(layers)
        self.top = self.layers[0]
        self.path = self.top.path
        self.format = self.top.name
        self.size = self.top.size
        self.read_only = self.top.read_only
        self._widest = max(self._widest, self.size)
        self._steps = [(layer.lookup, layer.size, layer.data) for layer in self.layers]
        self._plain_writes = not (
            self.read_only or self.writethrough or self.guard_probed_raw or self.detect_zeroes != "off"
        )
        self.places = Places(self.layers)
        self._writer = BatchWriter(self)
        self._writeback = Writeback(self.top.data)
        self.choose_forms()

    def choose_forms(self) -> None:
        """Decide again which forms the requests that do not wait have: what is not in use costs nothing that way."""
        for name in ("try_read_into", "try_read_pieces", "locate_read", "try_write", "submit_write"):
            self.__dict__.pop(name, None)
        if self.gate.closed:
            forms.refuse_all(self)
            return
        forms.choose_fast(self)
        if self._guards or not self._plain_writes:
            forms.refuse_writes(self)
        elif self._watchers:
            self.try_write = forms.refuse_overwrite  # type: ignore[method-assign]
            self.submit_write = self._submit_watched  # type: ignore[method-assign]
        if self._widest > self.size:
            forms.refuse_outside(self)
        if self.counters is not None:
            counting.count_forms(self, self.counters)

    @property
    def data(self) -> Storage:
        """The storage of the top layer's data."""
        return self.top.data

    # --- reads -----------------------------------------------------------------------------------------------------

    def try_read_into(self, offset: int, buffer: memoryview) -> int:
        """Read without waiting, when the range is one run: READ_DATA, READ_ZERO, READ_SPLIT or READ_WAIT."""
        length = len(buffer)
        for lookup, size, data in self._steps:
            if offset + length > size:
                return READ_SPLIT
            run = lookup(offset, length)
            if run is None:
                return READ_WAIT
            kind, run_length, host_offset = run
            if run_length < length:
                return READ_SPLIT
            if kind == DATA:
                return READ_DATA if data.try_read_into(host_offset, buffer) else READ_WAIT
            if kind == ZERO:
                return READ_ZERO
            if kind == COMPRESSED:
                return READ_WAIT
        return READ_ZERO

    def locate_read(self, offset: int, length: int) -> tuple[Storage, int] | None:
        """The storage and host offset of a range that is one run of data and may be sent straight from there.

        Only where the place keeps its meaning: a cluster that is freed and used again while the client has not read
        the reply yet would show it another block's data.
        """
        kind, run_length, index, host_offset = resolve(self.layers, offset, length)
        layer = self.layers[index]
        if kind != DATA or run_length < length or not (layer.keeps_places or layer.read_only):
            return None
        return layer.data, host_offset

    def try_read_pieces(self, offset: int, buffer: memoryview) -> list[Piece] | None:
        """Read without waiting a range of several runs; None when a part of it has to wait."""
        pieces: list[Piece] = []
        position, total = 0, len(buffer)
        while position < total:
            if len(pieces) >= MAX_SYNC_PIECES:
                return None
            kind, length, index, host_offset = resolve(self.layers, offset + position, total - position)
            if kind == DATA:
                part = buffer[position : position + length]
                if not self.layers[index].data.try_read_into(host_offset, part):
                    return None
            elif kind != ZERO:
                return None
            add_piece(pieces, kind == ZERO, length)
            position += length
        return pieces

    async def read_pieces(self, offset: int, buffer: memoryview) -> list[Piece]:
        """Read the range; the bytes of zero pieces are left as they are in ``buffer``."""
        async with self.gate, self.locks.shared(offset, offset + len(buffer)):
            self.check_inside(offset, len(buffer))
            return await self.read_pieces_locked(offset, buffer)

    async def read_pieces_locked(self, offset: int, buffer: memoryview) -> list[Piece]:
        """``read_pieces`` for a caller that holds the range."""
        pieces: list[Piece] = []
        position, total = 0, len(buffer)
        while position < total:
            at = offset + position
            kind, length, index, host_offset = resolve(self.layers, at, total - position)
            layer = self.layers[index]
            if kind == NEEDS_TABLE:
                await layer.load(at)
                continue
            if kind == DATA:
                await layer.data.read_into(host_offset, buffer[position : position + length])
            elif kind == COMPRESSED:
                start, unit = await layer.read_compressed(at)
                skip = at - start
                length = min(length, len(unit) - skip)
                assert skip >= 0
                assert length > 0
                buffer[position : position + length] = memoryview(unit)[skip : skip + length]
            add_piece(pieces, kind == ZERO, length)
            position += length
        return pieces

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the guest bytes at ``offset``."""
        zero_pieces(buffer, await self.read_pieces(offset, buffer))

    async def read_all(self, ranges: bulk.Ranges) -> None:
        """Fill every buffer with the guest bytes at its offset, with one trip to the worker threads for many."""
        await bulk.read_all(self, ranges)

    async def read(self, offset: int, length: int) -> bytearray:
        """``length`` guest bytes from ``offset``."""
        buffer = bytearray(length)
        await self.read_pieces(offset, memoryview(buffer))
        return buffer

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into the page cache."""
        buffer = memoryview(bytearray(min(length, MIB)))
        end = offset + length
        while offset < end:
            part = min(end - offset, MIB)
            await self.read_pieces(offset, buffer[:part])
            offset += part

    # --- writes ----------------------------------------------------------------------------------------------------

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Overwrite without waiting, where the place is known at one look; False: nothing is done, ``submit_write``."""
        return False

    def submit_write(self, offset: int, data: memoryview, done: Done) -> int:
        """Write without waiting, or together with others: WRITE_DONE, WRITE_TAKEN or WRITE_WAIT.

        ``done`` is called for a write that was taken, with what ``write`` would have raised or None. ``data`` is free
        for reuse on return.
        """
        outcome = self._writer.try_write(offset, data, done)
        if outcome == WRITE_DONE:
            self.changes += 1
        return outcome

    def _submit_watched(self, offset: int, data: memoryview, done: Done) -> int:
        """``submit_write`` of a node with watchers."""
        length = len(data)

        def ended(error: Exception | None) -> None:
            self._tell_changed(offset, length)
            done(error)

        outcome = Node.submit_write(self, offset, data, ended)
        if outcome == WRITE_DONE:
            self._tell_changed(offset, length)
        return outcome

    async def write(self, offset: int, data: ReadBuffer, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is stable on return, with the metadata that finds it."""
        await self._change(offset, len(data), lambda: cow.write(self, offset, memoryview(data)), fua)

    async def write_all(self, ranges: bulk.Ranges) -> None:
        """Write every range, with one trip to the worker threads for many. When this fails any may be written."""
        await bulk.write_all(self, ranges)

    @property
    def writes_at_once(self) -> bool:
        """``bulk.write_all`` may do what ``write`` does: nobody is told of a change, nor looks at what is written."""
        return self._plain_writes and not self._watchers

    async def zero(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        """Make the range read as zeroes; ``unmap`` lets space be given back if the image was opened with discard=unmap.

        ``fast``: OSError(ENOTSUP) unless this is quicker than a write; the content is then untouched.
        """
        unmap = unmap and self.unmap
        await self._change(offset, length, lambda: cow.zero(self, offset, length, unmap=unmap, fast=fast), fua)

    async def write_compressed(self, offset: int, data: ReadBuffer) -> None:
        """Write whole clusters (less at the end of the disk) as ``FormatDriver.write_compressed`` stores them."""
        end = offset + len(data)
        cluster = self.top.cluster_size
        lock = self.locks.exclusive(align_down(offset, cluster), align_up(end, cluster))
        async with self._changing(offset, len(data)), lock:
            try:
                await self.top.write_compressed(offset, data)
            finally:
                self.places.forget(offset, len(data))
        await self._settle(False)

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """The content of the range is not needed any more. Nothing happens unless opened with discard=unmap."""
        if self.unmap:
            async with self._changing(offset, length):
                await cow.discard(self, offset, length)
        await self._settle(fua)

    async def _change(self, offset: int, length: int, work: Callable[[], Awaitable[None]], fua: bool) -> None:
        """Await ``work()``, which changes the range; once more when room had to be made before."""
        while True:
            try:
                async with self._changing(offset, length):
                    await work()
                return await self._settle(fua)
            except RoomNeededError:
                await self.make_room()

    @asynccontextmanager
    async def _changing(self, offset: int, length: int) -> AsyncIterator[None]:
        """Around a change of the range: its place among the requests, and what the watchers are told of it."""
        async with self.gate:
            self.check_inside(offset, length)
            try:
                if self._guards:
                    async with self.gate.passing():
                        for guard in self._guards:
                            await guard.before(offset, length)
                yield
            finally:
                self.changes += 1
                self._tell_changed(offset, length)

    def check_inside(self, offset: int, length: int) -> None:
        """RequestError(EIO) for a range that is not inside the disk: it has become smaller since the client came."""
        if length and offset + length > self.size:
            problem = f"{length} bytes at {offset} are not inside the {self.size} bytes of its disk"
            raise RequestError(errno.EIO, f"{self.path}: {problem}")

    def _tell_changed(self, offset: int, length: int) -> None:
        for watcher in self._watchers:
            watcher.changed(offset, length)

    def publish(self, allocation: Allocation) -> None:
        """The data of a new allocation is written: show it."""
        try:
            self.top.publish(allocation)
        finally:
            self.places.forget(allocation.offset, allocation.length)
        self._writeback.allocated(allocation.length)

    def zero_mapping(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """``FormatDriver.zero`` of the top layer."""
        try:
            return self.top.zero(offset, length, unmap=unmap)
        finally:
            self.changes += 1
            self.places.forget(offset, length)

    def discard_mapping(self, offset: int, length: int) -> int | None:
        """``FormatDriver.discard`` of the top layer."""
        try:
            return self.top.discard(offset, length)
        finally:
            self.changes += 1
            self.places.forget(offset, length)

    @property
    def is_stable(self) -> bool:
        """Nothing has changed since the last flush, so that another has nothing to do."""
        return self._stable_changes == self.changes

    async def flush(self) -> None:
        """Every write completed before this call is stable on return.

        Callers between whom nothing has changed share one flush, and what is being written is waited for, lest those
        after it need another: clients send many flushes at once (fio: as many as its depth).
        """
        if not (self.read_only or self.is_stable):
            async with self.gate:
                await self._writer.catch_up()
                await self._stabilise()

    async def _stabilise(self) -> None:
        changes = self.changes
        if self.read_only or self._stable_changes == changes:
            return
        if self._flush is None or self._flush_covers != changes:
            self._flush = asyncio.get_running_loop().create_task(self._flush_changes(changes))
            self._flush_covers = changes
        await asyncio.shield(self._flush)

    async def _flush_changes(self, changes: int) -> None:
        try:
            await self.top.flush()
            self._stable_changes = max(self._stable_changes, changes)
        finally:
            if self._flush_covers == changes:
                self._flush = None

    async def _settle(self, fua: bool) -> None:
        if fua or self.writethrough:
            await self.flush()

    # --- changing the node itself ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Requests in flight have finished, and new ones wait until this is left, those of the fast lane included.

        The task inside may itself use the node, and so may the tasks it starts meanwhile. One inside another is the
        same as one. Several nodes: ``block.drain.drained``.
        """
        if self.gate.may_pass():
            yield
            return
        await self.gate.close()
        try:
            async with self.gate.passing():
                async with self.locks.exclusive(0, 1 << 63):
                    pass  # what the writer has queued is written
                if self._flush is not None:
                    await asyncio.wait([self._flush])
                yield
        finally:
            self.gate.open()

    async def reshape(self, layers: Sequence[FormatDriver]) -> None:
        """Make ``layers`` the chain, top first. Call it inside ``drained``; clients see one disk, then the other.

        A top layer that stops being it is flushed first, and if that fails (OSError, RequestError) nothing has changed.
        The new one has to be open for writing if clients write. Layers that are no longer there are the caller's to
        close, after ``drained``.
        """
        if layers[0] is not self.top:
            await self.flush()
        self.replace_layers(layers)

    def replace_layers(self, layers: Sequence[FormatDriver]) -> None:
        """``reshape`` for one who has flushed, or closed, the layer that was on top."""
        assert self.gate.closed
        assert self.gate.may_pass()
        old_size = self.size
        self._adopt(layers)
        if self.size != old_size:
            self._tell_resized(old_size)

    async def make_room(self) -> None:
        """``FormatDriver.make_room`` of the top layer, between the requests; no place is remembered from before."""
        async with self.drained():
            try:
                await uninterrupted(self.top.make_room())
            finally:
                self.replace_layers(self.layers)

    async def resize(self, size: int) -> None:
        """Give the disk ``size`` bytes; what is new reads as zeroes. Clients see it when they connect again.

        ConfigError when the format of the top layer cannot have that size, or cannot shrink; and while a job works on
        the node.
        """
        if self.busy_with:
            raise ConfigError(f"{self.path}: is busy: block device is in use by block job: {self.busy_with}")
        async with self.drained():
            old_size = self.size
            inside = old_size % self.top.granularity
            if size > old_size and inside and any(layer.size > old_size for layer in self.layers[1:]):
                # What the layers below have behind the end must not appear, not even if the power fails: the unit the
                # disk ends in gets a place of its own, where zeroes follow it.
                await self.write(old_size - inside, await self.read(old_size - inside, inside))
            try:
                await uninterrupted(self._resize_top(size))
            finally:
                self.replace_layers(self.layers)

    async def _resize_top(self, size: int) -> None:
        old_size = self.size
        await self.top.resize(size)
        shown = min(size, max((layer.size for layer in self.layers[1:]), default=0))
        if shown > old_size:  # what a longer layer below has there must not appear
            try:
                self.replace_layers(self.layers)
                await self.zero(old_size, shown - old_size, fua=True)
            except Exception:
                await self.top.resize(old_size)
                raise

    def _tell_resized(self, old_size: int) -> None:
        for watcher in self._watchers:
            watcher.resized(old_size, self.size)

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of the changes that begin from now on; inside ``drained`` those are all that follow."""
        self._watchers = (*self._watchers, watcher)
        self._renew_watchers()

    def unwatch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` nothing more, as far as a change is not under way."""
        self._watchers = tuple(other for other in self._watchers if other is not watcher)
        self._renew_watchers()

    def _renew_watchers(self) -> None:
        self._guards = tuple(watcher for watcher in self._watchers if watcher.goes_before)
        self.choose_forms()

    async def close(self) -> None:
        """Let requests in flight finish, flush and close all layers, release their files; raises the first error."""
        errors: list[Exception] = []
        async with self.locks.exclusive(0, 1 << 63):
            for layer in self.layers:
                try:
                    await layer.close()
                except Exception as error:
                    errors.append(error)
        if errors:
            raise errors[0]
