"""The storage contract: bytes on something, knowing no image format.

*Reads fill the whole buffer or raise; writes write everything or raise.* Bytes past the end of the storage read as
zeroes (a sparse tail); a write past the end grows it. Errors are OSError, whose errno travels to the client.

The ``try_`` methods are the hot path: they run on the event loop, never block, and answer False when the work
would have to wait (page not cached, file system without RWF_NOWAIT); the caller then awaits the other form, which
does all of the work again.

A method that is cancelled raises CancelledError only when nothing of it is under way any more: its buffers are free,
and the range it was for may be given to something else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from nbdserve.extents import RunArray

ReadBuffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes to be written; never modified by a storage, and free for reuse when the call returns."""

BlockingRead: TypeAlias = Callable[[int, memoryview], None]
"""``read_into`` for worker threads."""
BlockingWrite: TypeAlias = Callable[[int, ReadBuffer], None]
"""``write`` for worker threads."""

T = TypeVar("T")


class Storage(ABC):
    """A byte-addressed store. ``path`` names it in messages."""

    path: str
    read_only: bool
    size: int
    """Bytes. Kept current through writes and ``truncate`` of this object."""
    alignment: int = 1
    """Offsets and lengths that are multiples of this are served without a bounce buffer."""
    grows_zeroed: bool = True
    """Space past ``size`` reads as zeroes when first written around (regular files: yes; block devices: no)."""
    blocking_read: BlockingRead | None = None
    """For work on a worker thread that ends before the storage is closed; None where bytes come from elsewhere."""
    has_workers: bool = False
    """There is ``work``."""

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` from ``offset`` without blocking; False (buffer undefined) if that is not possible."""
        return False

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        """Write ``data`` at ``offset`` without blocking; False (range content undefined) if that is not possible.

        ``data`` is free for reuse on return.
        """
        return False

    def can_send(self, offset: int, length: int) -> bool:
        """Whether ``send`` of the range needs no disk: it is in the page cache. False: read it, and send that."""
        return False

    def send(self, socket_fd: int, offset: int, length: int) -> int:
        """Send the start of the range to a non-blocking socket without copying it; the bytes sent, 0 if it is full.

        The socket refers to the cached pages until the peer has read them: a later write to the range may show there.
        OSError: the range cannot be read, or the socket is broken.
        """
        raise NotImplementedError

    def hold(self) -> None:
        """``send`` will be called later: a storage that is closed before ``let_go`` stays readable until then."""

    def let_go(self) -> None:
        """The counterpart of one ``hold``."""

    @abstractmethod
    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``; past the end, zeroes."""

    async def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from ``offset``. The caller has bounded ``length``."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return buffer

    async def read_all(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill every buffer from its offset, in any order; one trip to the worker threads where there are such."""
        for offset, buffer in pieces:
            await self.read_into(offset, buffer)

    @abstractmethod
    async def write(self, offset: int, data: ReadBuffer) -> None:
        """Write all of ``data`` at ``offset``."""

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        """Write every ``(offset, data)``, in any order; one trip to the worker threads where there are such."""
        for offset, data in pieces:
            await self.write(offset, data)

    async def work(self, fn: Callable[[BlockingWrite], T]) -> T:
        """``fn(write)`` on a worker thread; ``write`` is good for large pieces, and until ``fn`` returns."""
        raise NotImplementedError

    async def write_stable(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        """``write_all``, then ``flush``; one trip for both where there are worker threads."""
        await self.write_all(pieces)
        await self.flush()

    @abstractmethod
    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        """Make the range read as zeroes; with ``unmap`` space may be given back, without it stays reserved.

        ``fast``: OSError(ENOTSUP) unless this is quicker than writing zeroes; the content is then untouched.
        """

    @abstractmethod
    async def discard(self, offset: int, length: int) -> None:
        """The content of the range is no longer needed; it reads as anything until written. A hint."""

    @abstractmethod
    async def flush(self) -> None:
        """Everything written before this call is on stable storage when it returns.

        A failure is final: the kernel may have dropped the dirty pages, so that a retry would succeed falsely.
        Every later write and flush of this storage raises the same error.
        """

    def begin_writeback(self) -> None:
        """A hint that a flush will come: what was written may start on its way to the disk now. Does not wait."""

    @abstractmethod
    async def truncate(self, size: int) -> None:
        """Set the size; new space reads as zeroes."""

    async def extend(self, size: int) -> None:
        """Make it at least ``size`` bytes long, which the next flush makes stable; new space reads as zeroes.

        Unlike ``truncate`` it never cuts off what is written past the end meanwhile. That a write under way has moved
        the end further up already makes no difference: such growth is not yet stable with the next flush.
        """
        if size > self.size:
            await self.truncate(size)

    @abstractmethod
    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        """What is a hole: DATA and ZERO runs from ``offset``, at most ``max_runs``, none past ``offset + length``.

        Anything but a hole the storage knows of is DATA; the space past the end is ZERO.
        """

    @abstractmethod
    def allocated_size(self) -> int | None:
        """Bytes of disk space used (``st_blocks * 512``); None where nobody can tell."""

    @abstractmethod
    async def close(self) -> None:
        """Release everything held, without flushing. Idempotent."""
