"""A node: an open image chain as one disk.

Two forms of each request. The ``try_`` methods run on the event loop without waiting and answer "not now" when tables,
pages or space are missing. The ``async`` methods do the same work for every case, awaiting what is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from nbdserve.block import cow
from nbdserve.block.chain import NEEDS_TABLE, resolve
from nbdserve.block.pieces import Piece, add_piece, zero_pieces
from nbdserve.block.places import LAYER_MASK, Places
from nbdserve.block.requests import RangeLocks
from nbdserve.block.writer import WRITE_DONE, WRITE_WAIT, BatchWriter, Done
from nbdserve.extents import COMPRESSED, DATA, ZERO
from nbdserve.formats.base import Allocation, FormatDriver
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.units import MIB

READ_WAIT: Final = 0
"""Nothing is known without waiting: use ``read_pieces``."""
READ_DATA: Final = 1
"""The buffer is filled."""
READ_ZERO: Final = 2
"""The whole range reads as zeroes; the buffer is not touched."""
READ_SPLIT: Final = 3
"""The range is made of several runs: use ``try_read_pieces``."""

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
    ) -> None:
        self.layers = list(layers)
        self.top = self.layers[0]
        self.path = self.top.path
        self.format = self.top.name
        self.size = self.top.size
        self.read_only = self.top.read_only
        self.unmap = unmap
        self.detect_zeroes = detect_zeroes
        self.writethrough = writethrough
        self.guard_probed_raw = guard_probed_raw
        self.locks = RangeLocks()
        self.changes = 1
        """Changes completed, so that a flush can tell whether another has covered them."""
        self._stable_changes = 0
        self._flush: asyncio.Task[None] | None = None
        self._flush_covers = 0
        self._steps = [(layer.lookup, layer.size, layer.data) for layer in self.layers]
        self._plain_writes = not (self.read_only or writethrough or guard_probed_raw or detect_zeroes != "off")
        self.places = Places(self.layers)
        self._writer = BatchWriter(self)
        if Places.worthwhile(self.layers):
            self.try_read_into = self._try_read_placed  # type: ignore[method-assign]

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

    def _try_read_placed(self, offset: int, buffer: memoryview) -> int:
        """``try_read_into`` with the places of whole clusters remembered."""
        places = self.places
        inside = offset & places.mask
        if inside + len(buffer) > places.cluster_size:
            return Node.try_read_into(self, offset, buffer)
        place = places.readable.get(offset >> places.bits)
        if place is None:
            outcome = Node.try_read_into(self, offset, buffer)
            if outcome == READ_DATA:
                places.learn_readable(offset)
            return outcome
        data = self.layers[place & LAYER_MASK].data
        return READ_DATA if data.try_read_into((place >> 8) + inside, buffer) else READ_WAIT

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
        async with self.locks.shared(offset, offset + len(buffer)):
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

    def submit_write(self, offset: int, data: memoryview, done: Done) -> int:
        """Write without waiting, or together with others: WRITE_DONE, WRITE_TAKEN or WRITE_WAIT.

        ``done`` is called for a write that was taken, with what ``write`` would have raised or None. ``data`` is free
        for reuse on return.
        """
        if not self._plain_writes:
            return WRITE_WAIT
        places = self.places
        inside = offset & places.mask
        host_offset = places.writable.get(offset >> places.bits)
        if (
            host_offset is not None
            and inside + len(data) <= places.cluster_size
            and self.top.data.try_write(host_offset + inside, data)
        ):
            self.changes += 1
            return WRITE_DONE
        outcome = self._writer.try_write(offset, data, done)
        if outcome == WRITE_DONE:
            self.changes += 1
        return outcome

    async def write(self, offset: int, data: ReadBuffer, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is stable on return, with the metadata that finds it."""
        try:
            await cow.write(self, offset, memoryview(data))
        finally:
            self.changes += 1
        await self._settle(fua)

    async def zero(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        """Make the range read as zeroes; ``unmap`` lets space be given back if the image was opened with discard=unmap.

        ``fast``: OSError(ENOTSUP) unless this is quicker than a write; the content is then untouched.
        """
        try:
            await cow.zero(self, offset, length, unmap=unmap and self.unmap, fast=fast)
        finally:
            self.changes += 1
        await self._settle(fua)

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """The content of the range is not needed any more. Nothing happens unless opened with discard=unmap."""
        if self.unmap:
            try:
                await cow.discard(self, offset, length)
            finally:
                self.changes += 1
        await self._settle(fua)

    def publish(self, allocation: Allocation) -> None:
        """The data of a new allocation is written: show it."""
        try:
            self.top.publish(allocation)
        finally:
            self.places.forget(allocation.offset, allocation.length)

    def zero_mapping(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """``FormatDriver.zero`` of the top layer."""
        try:
            return self.top.zero(offset, length, unmap=unmap)
        finally:
            self.places.forget(offset, length)

    def discard_mapping(self, offset: int, length: int) -> int | None:
        """``FormatDriver.discard`` of the top layer."""
        try:
            return self.top.discard(offset, length)
        finally:
            self.places.forget(offset, length)

    @property
    def is_stable(self) -> bool:
        """Nothing has changed since the last flush, so that another has nothing to do."""
        return self._stable_changes == self.changes

    async def flush(self) -> None:
        """Every write completed before this call is stable on return.

        Callers between whom nothing has changed share one flush: clients send many at once (fio: as many as its depth).
        """
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

    async def close(self) -> None:
        """Let requests in flight finish, flush, close all layers, and release their files.

        The first error is raised after all of them are closed.
        """
        errors: list[Exception] = []
        async with self.locks.exclusive(0, 1 << 63):
            for layer in self.layers:
                try:
                    await layer.close()
                except Exception as error:
                    errors.append(error)
        if errors:
            raise errors[0]
