"""An export of another NBD server as storage.

Many requests are in flight at a time. When the connection is lost, and the target has a ``reconnect_delay``, what was
not answered is sent again over the next one, as QEMU's client does: reads, and writes too, which have the same result
the second time. What the server had acknowledged is its own to keep: a server that loses unflushed writes when it goes
down is not noticed here, nor by QEMU.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any, Final, Self

import numpy as np

from nbdserve.buffers import fill_zeroes
from nbdserve.errors import ImageError, OptionError, ProtocolError
from nbdserve.extents import DATA, ZERO, RunArray
from nbdserve.protocol.client import RemoteExport
from nbdserve.protocol.client_transmission import Reply
from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    COMMAND_NAMES,
    EXPORT_READ_ONLY,
    EXPORT_SEND_FAST_ZERO,
    EXPORT_SEND_FLUSH,
    EXPORT_SEND_FUA,
    EXPORT_SEND_TRIM,
    EXPORT_SEND_WRITE_ZEROES,
    NBD_ESHUTDOWN,
    STATE_ZERO,
)
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.storage.nbd_connection import LostError, NbdConnection
from nbdserve.storage.nbd_target import NbdTarget
from nbdserve.units import GIB, MIB, align_down, align_up

MAX_IN_FLIGHT: Final = 64
"""Requests sent and not answered at a time."""
_LONGEST_TRANSFER: Final = 8 * MIB
"""Bytes of one READ or WRITE; a server may allow less."""
_LONGEST_CHANGE: Final = GIB
"""Bytes of one TRIM, WRITE_ZEROES or BLOCK_STATUS, whose lengths have 32 bits."""
_ZERO_WRITE: Final = MIB
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
"""Seconds between attempts to connect again, doubled after each."""

_Failure = (OSError, OptionError, ProtocolError)


class NbdStorage(Storage):
    """``size`` is fixed: to write past the end is ENOSPC. Errors name the URI (``path``)."""

    grows_zeroed = False

    def __init__(self, target: NbdTarget, connection: NbdConnection, *, read_only: bool) -> None:
        """Callers use ``open``."""
        export = connection.export
        self.target = target
        self.path = target.uri
        self.read_only = read_only
        self.size = export.size
        self.alignment = export.minimum_block
        self._connection = connection
        self._reconnecting: asyncio.Task[None] | None = None
        self._lost_at: float | None = None
        self._not_before = 0.0
        """No attempt to connect is made before this time of the loop's clock."""
        self._problem = ""
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._gate = _Gate()
        self._changes = 1
        self._stable_changes = 0
        self._failure: str | None = None
        self._closed = False

    @classmethod
    async def open(cls, target: NbdTarget, *, read_only: bool) -> Self:
        """Connect to the server, for as long as ``open_timeout`` says. ImageError names the URI."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + target.open_timeout
        pause = _FIRST_PAUSE
        connection: NbdConnection | None = None
        while connection is None:
            try:
                connection = await NbdConnection.open(target)
            except _Failure as error:
                if loop.time() + pause > deadline:
                    raise ImageError(target.uri, f"Failed to connect to '{target.place}': {_reason(error)}") from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        if connection.export.flags & EXPORT_READ_ONLY and not read_only:
            connection.close()
            raise ImageError(target.uri, "the server exports it read-only", hint="open it read-only")
        if connection.export.size % connection.export.minimum_block:
            connection.close()
            raise ImageError(target.uri, "its size is no multiple of its block size", field="size")
        return cls(target, connection, read_only=read_only)

    @property
    def export(self) -> RemoteExport:
        """What the server says of the export."""
        return self._connection.export

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _request(
        self,
        command: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        data: ReadBuffer | None = None,
        into: memoryview | None = None,
    ) -> Reply:
        """The successful reply, over this connection or a later one. OSError else."""
        loop = asyncio.get_running_loop()
        give_up: float | None = None
        async with self._slots:
            while True:
                connection = await self._connected()
                try:
                    reply = await connection.request(command, offset, length, flags=flags, data=data, into=into)
                except LostError as error:
                    problem = str(error)
                else:
                    if not reply.error:
                        return reply
                    what = f"{COMMAND_NAMES[command]} of {length} bytes at {offset}"
                    problem = f"{what}: {reply.message or 'refused by the server'}"
                    if reply.error != NBD_ESHUTDOWN or not self.target.reconnect_delay:
                        raise OSError(reply.error, f"{self.path}: {problem}")
                    connection.close("the server shuts down")
                self._note_loss(connection)
                give_up = give_up or loop.time() + self.target.reconnect_delay
                if loop.time() >= give_up:
                    raise OSError(errno.EIO, f"{self.path}: the connection is lost: {problem}")

    def _note_loss(self, connection: NbdConnection) -> None:
        if connection is self._connection and self._lost_at is None:
            now = asyncio.get_running_loop().time()
            self._lost_at = now
            # one that takes connections and drops them unanswered is not called without a pause
            self._not_before = now if connection.answered else now + _FIRST_PAUSE

    async def _connected(self) -> NbdConnection:
        """A connection that lives; OSError(EIO) when there is none within the reconnect delay."""
        while True:
            if self._closed:
                raise OSError(errno.EBADF, f"{self.path} is closed")
            if self._connection.lost is None:
                return self._connection
            self._note_loss(self._connection)
            if self._reconnecting is None:
                self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())
                self._reconnecting.add_done_callback(lambda task: task.cancelled() or task.exception())
            try:
                await asyncio.shield(self._reconnecting)
            except asyncio.CancelledError:
                if not self._closed:
                    raise

    async def _reconnect(self) -> None:
        """Connect again until the reconnect delay, counted from the loss, is over; at least one attempt is made."""
        loop = asyncio.get_running_loop()
        assert self._lost_at is not None
        deadline = self._lost_at + self.target.reconnect_delay
        pause = _FIRST_PAUSE
        try:
            while True:
                now = loop.time()
                if now < self._not_before:
                    if self._problem and now >= deadline:
                        raise OSError(errno.EIO, f"{self.path}: the connection is lost: {self._problem}")
                    await asyncio.sleep(self._not_before - now)
                try:
                    connection = await NbdConnection.open(self.target)
                    self._check_same(connection)
                except _Failure as error:
                    self._problem = _reason(error)
                else:
                    self._connection, self._lost_at, self._problem = connection, None, ""
                    return
                self._not_before = loop.time() + pause
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._reconnecting = None

    def _check_same(self, connection: NbdConnection) -> None:
        """ProtocolError when the export is no longer what it was."""
        export, before = connection.export, self._connection.export
        problem = ""
        if export.size != self.size:
            problem = f"the export has {export.size} bytes now, and had {self.size}"
        elif export.flags & EXPORT_READ_ONLY and not self.read_only:
            problem = "the export is read-only now"
        elif export.minimum_block > self.alignment:
            problem = f"the export has blocks of {export.minimum_block} bytes now, and had {before.minimum_block}"
        if problem:
            connection.close()
            raise ProtocolError(problem)

    # --- reading -----------------------------------------------------------------------------------------------------

    def _longest_transfer(self) -> int:
        return max(self.alignment, align_down(min(self.export.maximum_block, _LONGEST_TRANSFER), self.alignment))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        end = max(offset, min(offset + len(buffer), self.size))
        start, stop = align_down(offset, self.alignment), align_up(end, self.alignment)
        longest = self._longest_transfer()
        if stop - start <= longest:
            await self._read_part(start, stop, offset, buffer[: end - offset])
        else:
            parts = [(at, min(at + longest, stop)) for at in range(start, stop, longest)]
            await _all(
                self._read_part(at, to, max(at, offset), buffer[max(at, offset) - offset : min(to, end) - offset])
                for at, to in parts
            )
        fill_zeroes(buffer[end - offset :])

    async def _read_part(self, start: int, end: int, offset: int, buffer: memoryview) -> None:
        """Read ``[start, end)``, whole blocks, and keep what ``buffer`` is for."""
        if end - start == len(buffer) > 0:
            await self._request(CMD_READ, start, end - start, into=buffer)
        elif start < end:
            reply = await self._request(CMD_READ, start, end - start)
            skip = offset - start
            buffer[:] = memoryview(reply.data)[skip : skip + len(buffer)]
        else:
            await self._connected()

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        """What ``base:allocation`` calls zeroes is ZERO; without that context everything is DATA."""
        end = offset + length
        inside = max(offset, min(end, self.size))
        starts: list[int] = []
        kinds: list[int] = []
        position = offset
        while position < inside and len(starts) <= max_runs:
            for found, status in await self._extents(position, inside):
                starts.append(position)
                kinds.append(ZERO if status & STATE_ZERO else DATA)
                position += found
        if position >= inside < end:
            starts.append(inside)
            kinds.append(ZERO)
            position = end
        if not starts:
            return RunArray.empty()
        start, kind = np.array(starts, np.int64), np.array(kinds, np.uint8)
        runs = RunArray(start, np.diff(np.append(start, position)), kind, np.where(kind == DATA, start, -1)).coalesced()
        cut = slice(max_runs)
        return RunArray(runs.start[cut], runs.length[cut], runs.kind[cut], runs.host_offset[cut])

    async def _extents(self, offset: int, end: int) -> list[tuple[int, int]]:
        """``(length, status)`` from ``offset``, at least one, none behind ``end``."""
        contexts = self.export.contexts
        if not contexts:
            await self._connected()
            return [(end - offset, 0)]
        start = align_down(offset, self.alignment)
        length = min(align_up(end, self.alignment) - start, _LONGEST_CHANGE)
        reply = await self._request(CMD_BLOCK_STATUS, start, length)
        # after a reconnection it may have another id
        found = next(iter(reply.extents.values()), [(length, 0)])
        position, extents = start, []
        for size, status in found:
            first, stop = max(position, offset), min(position + size, end)
            if first < stop:
                extents.append((stop - first, status))
            position += size
        # less than a block says nothing, for the next question begins with a block
        return extents or [(min(align_up(offset + 1, self.alignment), end) - offset, 0)]

    # --- writing -----------------------------------------------------------------------------------------------------

    def _check_writable(self, end: int = 0) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, f"{self.path} is open read-only")
        if self._failure is not None:
            raise OSError(errno.EIO, self._failure)
        if end > self.size:
            raise OSError(errno.ENOSPC, f"{self.path}: the export of {self.size} bytes does not grow")

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await self._write(offset, data, 0)

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        """All at once; an error is raised when none of them is under way any more."""
        await _all(self._write(offset, data, 0) for offset, data in pieces)

    async def write_stable(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        """With FUA, when nothing else has to be stable too."""
        if self.export.flags & EXPORT_SEND_FUA and self._stable_changes == self._changes:
            await _all(self._write(offset, data, CMD_FLAG_FUA) for offset, data in pieces)
            if self._changes == self._stable_changes + len(pieces):
                self._stable_changes = self._changes
        else:
            await self.write_all(pieces)
        await self.flush()

    async def _write(self, offset: int, data: ReadBuffer, flags: int) -> None:
        view = memoryview(data)
        end = offset + len(view)
        self._check_writable(end)
        try:
            if not view:
                await self._connected()
            elif (offset | end) % self.alignment == 0:
                async with self._gate.shared() if self.alignment > 1 else nullcontext():
                    await self._write_blocks(offset, view, flags)
            else:
                start, stop = align_down(offset, self.alignment), align_up(end, self.alignment)
                async with self._gate.alone():
                    blocks = await self.read(start, stop - start)
                    blocks[offset - start : end - start] = view
                    await self._write_blocks(start, memoryview(blocks), flags)
        finally:
            self._changes += 1

    async def _write_blocks(self, offset: int, view: memoryview, flags: int) -> None:
        longest = self._longest_transfer()
        if len(view) <= longest:
            await self._request(CMD_WRITE, offset, len(view), flags=flags, data=view)
            return
        await _all(
            self._request(CMD_WRITE, offset + at, len(part), flags=flags, data=part)
            for at in range(0, len(view), longest)
            for part in [view[at : at + longest]]
        )

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        end = offset + length
        self._check_writable(end)
        capable = self.export.flags & EXPORT_SEND_WRITE_ZEROES
        start = min(align_up(offset, self.alignment), end)
        stop = max(align_down(end, self.alignment), start)
        if fast and not (capable and self.export.flags & EXPORT_SEND_FAST_ZERO and (start, stop) == (offset, end)):
            raise OSError(errno.ENOTSUP, f"{self.path}: the server has no fast zeroing of this range")
        if not capable:
            start = stop = end
        await self._write_zeroes(offset, start)
        flags = (0 if unmap else CMD_FLAG_NO_HOLE) | (CMD_FLAG_FAST_ZERO if fast else 0)
        try:
            async with self._gate.shared():
                for at in range(start, stop, _LONGEST_CHANGE):
                    await self._request(CMD_WRITE_ZEROES, at, min(_LONGEST_CHANGE, stop - at), flags=flags)
        finally:
            self._changes += 1
        await self._write_zeroes(stop, end)

    async def _write_zeroes(self, start: int, end: int) -> None:
        zeroes = bytes(min(_ZERO_WRITE, end - start))
        for at in range(start, end, _ZERO_WRITE):
            await self._write(at, memoryview(zeroes)[: end - at], 0)

    async def discard(self, offset: int, length: int) -> None:
        """TRIM where the server has it; nothing else."""
        self._check_writable()
        start = align_up(offset, self.alignment)
        stop = align_down(min(offset + length, self.size), self.alignment)
        if not self.export.flags & EXPORT_SEND_TRIM:
            return
        try:
            async with self._gate.shared():
                for at in range(start, stop, _LONGEST_CHANGE):
                    await self._request(CMD_TRIM, at, min(_LONGEST_CHANGE, stop - at))
        finally:
            self._changes += 1

    async def flush(self) -> None:
        """FLUSH where the server has it. That the server fails it is final; that the server is not there is not."""
        if self.read_only:
            return
        self._check_writable()
        changes = self._changes
        if self._stable_changes == changes:
            return
        if self.export.flags & EXPORT_SEND_FLUSH:
            try:
                await self._request(CMD_FLUSH, 0, 0)
            except OSError as error:
                if self._connection.lost is None and error.errno != NBD_ESHUTDOWN:
                    self._failure = f"a flush failed ({error}), data may be lost: reopen the image"
                raise
        self._stable_changes = max(self._stable_changes, changes)

    async def truncate(self, size: int) -> None:
        """The size of an export is fixed: nothing happens, but OSError(EINVAL) to grow it."""
        self._check_writable()
        if size > self.size:
            raise OSError(errno.EINVAL, f"{self.path}: Cannot grow NBD nodes")

    def allocated_size(self) -> int | None:
        """The protocol does not say."""
        return None

    async def close(self) -> None:
        """End the session; nothing is flushed, and what is in flight fails."""
        if self._closed:
            return
        self._closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await self._reconnecting
        self._connection.close()


class _Gate:
    """Writes of whole blocks go side by side; one that puts back parts of blocks it read before goes alone."""

    def __init__(self) -> None:
        self._sharing = 0
        self._alone = False
        self._waiters: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        while self._alone:
            await self._wait()
        self._sharing += 1
        try:
            yield
        finally:
            self._sharing -= 1
            self._wake()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        while self._alone:
            await self._wait()
        self._alone = True
        try:
            while self._sharing:
                await self._wait()
            yield
        finally:
            self._alone = False
            self._wake()

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


async def _all(work: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Do all at once; the first error is raised when none is under way any more."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _reason(error: Exception) -> str:
    """Why a server could not be used, for people."""
    if isinstance(error, OptionError):
        return f"the server says: {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
