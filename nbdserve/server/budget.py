"""The memory that the requests and replies of all clients may take together.

Counted is what is kept outside of the buffers that an event loop shares: payloads on their way in, replies being made,
and replies that the socket has not taken. Small requests always find room, so that a client which has nothing else in
flight goes on whatever the others do; a large one waits for room, behind those that came before. A client that holds
memory and moves nothing while others wait for it is dropped by the server (``on_scarce``), so the wait ends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from nbdserve.units import KIB, MIB

DEFAULT_LIMIT: Final = 256 * MIB
SMALL: Final = 128 * KIB
"""Requests up to this length do not wait."""
PATIENCE: Final = 10.0
"""Seconds between two looks at who holds the memory that others wait for."""


class Ticket:
    """A place in the queue for ``length`` bytes. Once ``granted`` they count, until they are given back."""

    __slots__ = ("call_back", "granted", "length")

    def __init__(self, length: int, call_back: Callable[[], None]) -> None:
        self.length = length
        self.call_back = call_back
        self.granted = False


class Budget:
    """Bytes ``used`` of ``limit``. What is taken without asking (``used += n``) is given back all the same.

    ``on_scarce(first)`` is called when somebody begins to wait, and then, with False, every PATIENCE seconds.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT, on_scarce: Callable[[bool], None] = lambda first: None) -> None:
        self.limit = limit
        self.used = 0
        self.waiting: deque[Ticket] = deque()
        self._on_scarce = on_scarce
        self._timer: asyncio.TimerHandle | None = None

    def take(self, length: int) -> bool:
        """Count ``length`` bytes if there is room for them now."""
        if length > SMALL and (self.waiting or not self._has_room(length)):
            return False
        self.used += length
        return True

    def _has_room(self, length: int) -> bool:
        # What is larger than the limit has to be alone.
        return self.used + length <= self.limit or not self.used

    def queue(self, length: int, call_back: Callable[[], None]) -> Ticket:
        """Wait for room: ``call_back`` is called, from the event loop, once it is granted."""
        ticket = Ticket(length, call_back)
        self.waiting.append(ticket)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(PATIENCE, self._scarce)
            loop.call_soon(self._on_scarce, True)
        return ticket

    async def wait(self, length: int) -> None:
        """Count ``length`` bytes as soon as there is room for them."""
        granted = asyncio.Event()
        ticket = self.queue(length, granted.set)
        try:
            await granted.wait()
        except asyncio.CancelledError:
            self.withdraw(ticket)
            raise

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits with it any more; what was granted is given back."""
        if ticket.granted:
            self.give(ticket.length)
        else:
            self.waiting.remove(ticket)
            self.grant()

    def give(self, length: int) -> None:
        """``length`` bytes are free again."""
        self.used -= length
        if self.waiting:
            self.grant()

    def grant(self) -> None:
        """Let in who waits, as far as there is room."""
        while self.waiting and self._has_room(self.waiting[0].length):
            ticket = self.waiting.popleft()
            self.used += ticket.length
            ticket.granted = True
            # Not at once: the caller may be in the middle of another client's work.
            asyncio.get_running_loop().call_soon(ticket.call_back)

    def _scarce(self) -> None:
        self._timer = None
        if self.waiting:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._scarce)
            self._on_scarce(False)
