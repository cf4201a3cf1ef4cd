"""Holding requests back: so many bytes and requests a second, with bursts (QEMU's throttle groups)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from nbdserve.block.node import Node
from nbdserve.block.window import NodeStorage
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.base import ReadBuffer


@dataclass(frozen=True, slots=True)
class Limits:
    """A second's worth; 0: no limit. ``total`` counts reads and writes."""

    bps_total: int = 0
    bps_read: int = 0
    bps_write: int = 0
    iops_total: int = 0
    iops_read: int = 0
    iops_write: int = 0
    burst_seconds: float = 0.1
    """How much may be used up at once after a pause."""


class _Bucket:
    """Fills at ``rate`` a second; a request may overdraw it, and the next one waits until that is made up for."""

    __slots__ = ("_free_at", "burst", "rate")

    def __init__(self, rate: int, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self._free_at = 0.0

    def delay(self, amount: int, now: float) -> float:
        """Take ``amount``; the seconds to wait first."""
        if not self.rate:
            return 0.0
        start = max(self._free_at, now - self.burst)
        self._free_at = start + amount / self.rate
        return max(0.0, start - now)


class ThrottleGroup:
    """Limits that several disks share, as QEMU's object of this name."""

    def __init__(self, limits: Limits) -> None:
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Other limits from now on."""
        self.limits = limits

        burst = limits.burst_seconds
        bytes_, requests = _Bucket(limits.bps_total, burst), _Bucket(limits.iops_total, burst)
        self._buckets = {
            False: (bytes_, _Bucket(limits.bps_read, burst), requests, _Bucket(limits.iops_read, burst)),
            True: (bytes_, _Bucket(limits.bps_write, burst), requests, _Bucket(limits.iops_write, burst)),
        }

    async def wait(self, length: int, *, is_write: bool) -> None:
        """Until a request of so many bytes may go on."""
        now = asyncio.get_running_loop().time()
        all_bytes, bytes_, all_requests, requests = self._buckets[is_write]
        delay = max(
            all_bytes.delay(length, now), bytes_.delay(length, now), all_requests.delay(1, now), requests.delay(1, now)
        )
        if delay > 0:
            await asyncio.sleep(delay)


class ThrottledStorage(NodeStorage):
    """The disk of a node behind a group. The node is not this one's to close."""

    def __init__(self, node: Node, group: ThrottleGroup) -> None:
        super().__init__(node)
        self.group = group

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.group.wait(len(buffer), is_write=False)
        await super().read_into(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await self.group.wait(len(data), is_write=True)
        await super().write(offset, data)

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        for offset, data in pieces:
            await self.write(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        await self.group.wait(length, is_write=True)
        await super().zero(offset, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        await self.group.wait(length, is_write=True)
        await super().discard(offset, length)

    async def close(self) -> None:
        """Make what was written stable."""
        if not self.read_only:
            await self.node.flush()


def throttled(node: Node, group: ThrottleGroup) -> Node:
    """A disk with the content of ``node``, for clients whom the limits of ``group`` hold back."""
    storage = ThrottledStorage(node, group)
    return Node([RawDriver(storage, 0, storage.size, read_only=node.read_only)], unmap=node.unmap)
