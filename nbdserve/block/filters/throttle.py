"""Holding requests back: so many bytes and operations a second, with bursts (QEMU's throttle groups).

Each limit is a bucket that leaks at its rate (QEMU's docs/throttle.txt): a request goes on when what others have poured
into the buckets it counts for does not stand too high, and then pours in its own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from nbdserve.block.node import Node
from nbdserve.block.window import NodeStorage
from nbdserve.errors import ConfigError
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.base import ReadBuffer

MOST: Final = 10**15
"""The highest rate, and the most a burst may amount to."""
_LONGEST: Final = (1 << 32) - 1
_NO_BURST_SECONDS: Final = 0.1
"""What may be used up at once, in seconds' worth, where no burst is allowed."""


@dataclass(frozen=True, slots=True)
class Limit:
    """``rate`` a second, 0: any; for ``burst_seconds`` at a time ``burst`` a second, where that is not 0."""

    rate: int = 0
    burst: int = 0
    burst_seconds: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Of bytes and operations; ``total`` counts reads and writes, and zeroing and discarding count as writing."""

    bps_total: Limit = Limit()
    bps_read: Limit = Limit()
    bps_write: Limit = Limit()
    iops_total: Limit = Limit()
    iops_read: Limit = Limit()
    iops_write: Limit = Limit()
    iops_size: int = 0
    """A longer request counts as several operations of so many bytes; 0: always as one."""

    def check(self) -> None:
        """ConfigError, in QEMU's words, for limits that contradict each other."""
        bps = (self.bps_total, self.bps_read, self.bps_write)
        iops = (self.iops_total, self.iops_read, self.iops_write)
        for total, *others in (bps, iops):
            if any((total.rate and each.rate) or (total.burst and each.burst) for each in others):
                raise ConfigError("bps/iops/max total values and read/write values cannot be used at the same time")
        if self.iops_size and not any(each.rate for each in iops):
            raise ConfigError("iops size requires an iops value to be set")
        for each in bps + iops:
            if not (0 <= each.rate <= MOST and 0 <= each.burst <= MOST):
                raise ConfigError(f"bps/iops/max values must be within [0, {MOST}]")
            if not each.burst_seconds:
                raise ConfigError("the burst length cannot be 0")
            if each.burst_seconds != 1 and not each.burst:
                raise ConfigError("burst length set without burst rate")
            if not 0 < each.burst_seconds <= _LONGEST or each.burst * each.burst_seconds > MOST:
                raise ConfigError("burst length too high for this burst rate")
            if each.burst and not each.rate:
                raise ConfigError("bps_max/iops_max require corresponding bps/iops values")
            if each.burst and each.burst < each.rate:
                raise ConfigError("bps_max/iops_max cannot be lower than bps/iops")


class Bucket:
    """Leaks ``rate`` a second, and is full at a tenth of that, or at the whole of a burst.

    With bursts of more than a second, a second bucket leaks ``burst`` a second, which bursts do not exceed.
    """

    __slots__ = ("_burst_level", "_burst_room", "_level", "_limit", "_room", "_then")

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        burst = limit.burst * limit.burst_seconds
        self._room = float(burst) if burst else limit.rate * _NO_BURST_SECONDS
        self._burst_room = limit.burst * _NO_BURST_SECONDS if limit.burst_seconds > 1 else math.inf
        self._level = self._burst_level = 0.0
        self._then = 0.0

    def delay(self, now: float) -> float:
        """Seconds until the next request may go on."""
        limit, passed = self._limit, now - self._then
        self._then = now
        if not limit.rate:
            return 0.0
        self._level = max(0.0, self._level - passed * limit.rate)
        self._burst_level = max(0.0, self._burst_level - passed * limit.burst)
        if self._level > self._room:
            return (self._level - self._room) / limit.rate
        if self._burst_level > self._burst_room:
            return (self._burst_level - self._burst_room) / limit.burst
        return 0.0

    def add(self, amount: float) -> None:
        self._level += amount
        self._burst_level += amount


class ThrottleGroup:
    """Limits that several disks share, as QEMU's object of this name."""

    def __init__(self, limits: Limits) -> None:
        """ConfigError as ``set_limits``."""
        self._woken = asyncio.Event()
        self._queues = {False: asyncio.Lock(), True: asyncio.Lock()}
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Other limits from now on, also for the requests that wait. ConfigError as ``Limits.check``."""
        limits.check()
        self.limits = limits
        bytes_, operations = Bucket(limits.bps_total), Bucket(limits.iops_total)
        self._buckets = {
            False: ((bytes_, Bucket(limits.bps_read)), (operations, Bucket(limits.iops_read))),
            True: ((bytes_, Bucket(limits.bps_write)), (operations, Bucket(limits.iops_write))),
        }
        self.wake()

    def wake(self) -> None:
        """Let the requests that wait look again whether they have to."""
        self._woken.set()
        self._woken = asyncio.Event()
        self._queues = {False: asyncio.Lock(), True: asyncio.Lock()}

    async def wait(self, length: int, *, is_write: bool, exempt: Callable[[], bool] = lambda: False) -> None:
        """Until a request of so many bytes may go on; those of one direction go in the order they came.

        One that is ``exempt`` does not wait, and counts for nothing; ``wake`` after that has changed.
        """
        while not (exempt() or await self._take(length, is_write, self._woken)):
            pass

    async def _take(self, length: int, is_write: bool, woken: asyncio.Event) -> bool:
        """Whether the request may go on; otherwise it was woken."""
        clock = asyncio.get_running_loop().time
        bytes_, operations = self._buckets[is_write]
        async with self._queues[is_write]:
            while not woken.is_set():
                now = clock()
                delay = max(bucket.delay(now) for bucket in (*bytes_, *operations))
                if not delay:
                    for bucket in bytes_:
                        bucket.add(length)
                    for bucket in operations:
                        bucket.add(max(1.0, length / self.limits.iops_size) if self.limits.iops_size else 1.0)
                    return True
                with suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), delay)
        return False


class ThrottledNode(Node):
    """A disk with the content of ``node``, for clients whom the limits of ``group`` hold back.

    Requests that wait for their turn go on at once when this node is drained, as QEMU's do: a transaction, or the end
    of the server, does not wait for them.
    """

    def __init__(self, node: Node, group: ThrottleGroup, *, owned: bool = False) -> None:
        """``owned``: ``node`` is closed with this one."""
        self.group = group
        storage = _ThrottledStorage(node, self._wait, owned=owned)
        super().__init__([RawDriver(storage, 0, storage.size, read_only=node.read_only)], unmap=node.unmap)

    async def _wait(self, length: int, is_write: bool) -> None:
        await self.group.wait(length, is_write=is_write, exempt=lambda: self.gate.closed)

    def choose_forms(self) -> None:
        """As of a node; and who waits looks again whether the gate is closed."""
        super().choose_forms()
        if self.gate.closed:
            self.group.wake()


class _ThrottledStorage(NodeStorage):
    """The disk of a node; ``wait(length, is_write)`` returns when a request may go on."""

    def __init__(self, node: Node, wait: Callable[[int, bool], Awaitable[None]], *, owned: bool) -> None:
        super().__init__(node)
        self._wait = wait
        self._owned = owned

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._wait(len(buffer), False)
        await super().read_into(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await self._wait(len(data), True)
        await super().write(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        await self._wait(length, True)
        await super().zero(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        await self._wait(length, True)
        await super().discard(offset, length)

    async def truncate(self, size: int) -> None:
        """The disk gets that size."""
        await self.node.resize(size)
        self.size = self.node.size

    async def close(self) -> None:
        """Make what was written stable."""
        if self._owned:
            await super().close()
        elif not self.read_only:
            await self.node.flush()
