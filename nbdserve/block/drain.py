"""Holding a node's requests back: those in flight finish, new ones wait at the gate, and what is done then is atomic.

A snapshot that puts a layer on top, a job that takes layers away, and a bitmap that has to begin at one moment on
several disks all need an instant at which no request is half done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from nbdserve.block.node import Node

T = TypeVar("T")


class Pass:
    """Leave to go through a closed gate, of one task and of those it starts, as long as it is ``valid``."""

    __slots__ = ("gate", "valid")

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.valid = True


_passes: ContextVar[tuple[Pass, ...]] = ContextVar("passes", default=())
_numbers = count()


class Gate:
    """The requests of one node that await something; an async context manager around each of them.

    Requests that run to their end on the event loop do not pass here: they are in nobody's way.
    """

    __slots__ = ("_draining", "_idle", "_on_change", "_open", "closed", "inside", "number")

    def __init__(self, on_change: Callable[[], None]) -> None:
        """``on_change`` is called when the gate has been closed or opened."""
        self._on_change = on_change
        self.number = next(_numbers)
        """Several gates are closed in this order, so that two who close the same ones cannot wait for each other."""
        self.closed = False
        self.inside = 0
        """Requests under way."""
        self._open = asyncio.Event()
        self._idle: asyncio.Event | None = None
        self._draining = asyncio.Lock()

    async def __aenter__(self) -> None:
        while self.closed and not self.may_pass():
            await self._open.wait()
        self.inside += 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside -= 1
        if not self.inside and self._idle is not None:
            self._idle.set()

    def may_pass(self) -> bool:
        """Whether the running task is one of those for whom the gate is not closed."""
        return any(held.gate is self and held.valid for held in _passes.get())

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """What is done here goes through the gate also when it is closed: it is part of a request inside, or of what
        the gate was closed for."""
        held = Pass(self)
        _passes.set((*(other for other in _passes.get() if other.valid), held))
        try:
            yield
        finally:
            held.valid = False

    async def close(self) -> None:
        """Let nobody in, and wait until nobody is inside; one at a time may have the gate closed."""
        await self._draining.acquire()
        self.closed = True
        self._open.clear()
        self._on_change()
        try:
            while self.inside:
                self._idle = asyncio.Event()
                await self._idle.wait()
        except BaseException:
            self.open()
            raise
        finally:
            self._idle = None

    def open(self) -> None:
        """Let those in who wait."""
        self.closed = False
        self._open.set()
        self._on_change()
        self._draining.release()


@asynccontextmanager
async def drained(*nodes: Node) -> AsyncIterator[None]:
    """``Node.drained`` of several nodes at once, whose requests are all held back by the time it is entered."""
    async with AsyncExitStack() as stack:
        for node in sorted(set(nodes), key=lambda node: node.gate.number):
            await stack.enter_async_context(node.drained())
        yield


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, which is not cut short when the caller is cancelled: that is raised at its end.

    For what would leave a chain in pieces, half closed.
    """
    task = asyncio.get_running_loop().create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()
        raise cancelled
    return task.result()
