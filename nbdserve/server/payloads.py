"""The memory of requests: what all sessions of an event loop share, and the payloads that are kept outside of it."""

from __future__ import annotations

from collections.abc import Callable

from nbdserve.buffers import BufferPool, ReusedBuffer
from nbdserve.protocol.transmission import RECEIVE_SIZE
from nbdserve.server.budget import Budget, Ticket
from nbdserve.server.replies import SCRATCH_SIZE
from nbdserve.units import MIB


class Buffers:
    """The memory all sessions of an event loop share, and what they may take besides."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.receive = ReusedBuffer(RECEIVE_SIZE)
        self.scratch = ReusedBuffer(SCRATCH_SIZE)
        self.pool = BufferPool(16 * MIB)
        self.budget = budget or Budget()


class Payloads:
    """Of one session. ``resume`` is called when there is room for a payload that was waited for."""

    __slots__ = ("_buffers", "_resume", "_waiting")

    def __init__(self, buffers: Buffers, resume: Callable[[], None]) -> None:
        self._buffers = buffers
        self._resume = resume
        self._waiting: Ticket | None = None

    @property
    def waiting(self) -> bool:
        """There was no room for the payload that comes next."""
        return self._waiting is not None

    def take(self, length: int) -> memoryview | None:
        """Memory for a payload that does not fit into the shared buffer; None: it is waited for."""
        if self._waiting is not None:
            if not self._waiting.granted:
                return None
            self._waiting = None
        elif not self._buffers.budget.take(length):
            self._waiting = self._buffers.budget.queue(length, self._resume)
            return None
        return memoryview(self._buffers.pool.take(length))[:length]

    def keep(self, payload: memoryview) -> memoryview:
        """``payload`` in memory of its own: other connections are about to use the shared buffer."""
        if payload.obj is not self._buffers.receive.data:
            return payload
        self._buffers.budget.used += len(payload)
        return memoryview(bytes(payload))

    def give(self, payload: memoryview) -> None:
        """It is not needed any more."""
        owner = payload.obj
        if owner is not self._buffers.receive.data:
            self._buffers.budget.give(len(payload))
            if isinstance(owner, bytearray):
                self._buffers.pool.give(owner)

    def withdraw(self) -> None:
        """Nothing is waited for any more."""
        if self._waiting is not None:
            self._buffers.budget.withdraw(self._waiting)
            self._waiting = None
