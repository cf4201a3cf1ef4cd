"""Who works where: range locks that keep the mapping still under those who use it.

Readers and in-place writers hold a range *shared*; whoever changes the mapping (allocating write, zero, discard)
holds it *exclusive*, widened to whole clusters. Only work that awaits takes a lock: what runs to its end on the event
loop cannot be interrupted. Waiters are served in order of arrival among those that overlap, so nobody starves.
"""

from __future__ import annotations

import asyncio
from itertools import chain
from types import TracebackType


class RangeLock:
    """A held or awaited range of guest bytes; an async context manager."""

    __slots__ = ("_locks", "end", "exclusive", "start", "waiter")

    def __init__(self, locks: RangeLocks, start: int, end: int, exclusive: bool) -> None:
        self._locks = locks
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.waiter: asyncio.Future[None] | None = None

    def conflicts(self, other: RangeLock) -> bool:
        """Whether both cannot be held at once."""
        return (self.exclusive or other.exclusive) and self.start < other.end and other.start < self.end

    async def __aenter__(self) -> RangeLock:
        await self._locks.acquire(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._locks.release(self)


class RangeLocks:
    """The ranges of one node in use. Few at a time (the requests in flight), so a list is the fastest structure."""

    def __init__(self) -> None:
        self._held: dict[RangeLock, None] = {}
        self._waiting: list[RangeLock] = []
        self._exclusive_held = 0

    def shared(self, start: int, end: int) -> RangeLock:
        """A lock on ``[start, end)`` that tolerates other shared ones."""
        return RangeLock(self, start, end, False)

    def exclusive(self, start: int, end: int) -> RangeLock:
        """A lock on ``[start, end)`` that tolerates no other."""
        return RangeLock(self, start, end, True)

    def blocked(self, start: int, end: int, *, exclusive: bool) -> bool:
        """Whether somebody holds or awaits what conflicts with a lock on ``[start, end)``."""
        if exclusive or self._exclusive_held or self._waiting:
            for other in chain(self._held, self._waiting) if self._waiting else self._held:
                if other.start < end and start < other.end and (exclusive or other.exclusive):
                    return True
        return False

    def try_acquire(self, lock: RangeLock) -> bool:
        """Take ``lock`` now if nobody who holds or awaits a range conflicts."""
        if self.blocked(lock.start, lock.end, exclusive=lock.exclusive):
            return False
        self._hold(lock)
        return True

    def _hold(self, lock: RangeLock) -> None:
        self._held[lock] = None
        self._exclusive_held += lock.exclusive

    async def acquire(self, lock: RangeLock) -> None:
        """Wait until ``lock`` conflicts with no holder and no earlier waiter, then hold it."""
        if self.try_acquire(lock):
            return
        lock.waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(lock)
        try:
            await lock.waiter
        except BaseException:
            if lock in self._held:
                self.release(lock)
            else:
                self._waiting.remove(lock)
                self._wake()
            raise

    def release(self, lock: RangeLock) -> None:
        """Give ``lock`` back; waiters that may run now hold their ranges on return."""
        del self._held[lock]
        self._exclusive_held -= lock.exclusive
        if self._waiting:
            self._wake()

    def _wake(self) -> None:
        still: list[RangeLock] = []
        for lock in self._waiting:
            assert lock.waiter is not None
            blocked = any(lock.conflicts(held) for held in self._held) or any(lock.conflicts(other) for other in still)
            if blocked or lock.waiter.done():
                still.append(lock)
            else:
                self._hold(lock)
                lock.waiter.set_result(None)
        self._waiting = still
