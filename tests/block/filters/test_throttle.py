"""Limits hold requests back, and change nothing else."""

from __future__ import annotations

import asyncio
import time

import pytest

from nbdserve.block.filters.throttle import Limits, ThrottleGroup, throttled
from nbdserve.block.status import allocation_flags, block_status, depth_values
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.block.layers import overlay


async def test_the_content_is_that_of_the_node() -> None:
    node = await overlay(MemoryStorage(b"b" * 64 * KIB, path="base"), 64 * KIB)
    front = throttled(node, ThrottleGroup(Limits()))
    await front.write(4 * KIB, b"x" * 512, fua=True)
    await front.zero(8 * KIB, 4 * KIB)
    assert await front.read(0, 64 * KIB) == await node.read(0, 64 * KIB)
    assert await node.read(4 * KIB, 512) == b"x" * 512
    for projection in (allocation_flags, depth_values):
        assert await block_status(front, 0, front.size, [projection], 100)
    await front.close()
    assert node.is_stable
    assert await node.read(4 * KIB, 512) == b"x" * 512, "the node below goes on"


@pytest.mark.parametrize(
    ("limits", "reads", "writes", "least"),
    [
        (Limits(bps_total=100 * KIB, burst_seconds=0), 1, 1, 0.04),
        (Limits(bps_read=100 * KIB, burst_seconds=0), 2, 0, 0.04),
        (Limits(bps_read=100 * KIB, burst_seconds=0), 1, 9, 0.0),
        (Limits(iops_write=20, burst_seconds=0), 9, 2, 0.05),
        (Limits(iops_total=20, burst_seconds=0), 1, 1, 0.05),
        (Limits(iops_total=20, burst_seconds=1), 1, 1, 0.0),
    ],
)
async def test_how_long_requests_wait(limits: Limits, reads: int, writes: int, least: float) -> None:
    node = await overlay(None, 64 * KIB)
    front = throttled(node, ThrottleGroup(limits))
    begun = time.monotonic()
    for _ in range(reads):
        await front.read(0, 4 * KIB)
    for _ in range(writes):
        await front.write(0, b"w" * 4 * KIB)
    took = time.monotonic() - begun
    assert took >= least * 0.9
    assert least > 0 or took < 1


async def test_disks_of_a_group_share_its_limits_and_limits_can_change() -> None:
    group = ThrottleGroup(Limits(iops_total=20, burst_seconds=0))
    fronts = [throttled(await overlay(None, 64 * KIB), group) for _ in range(3)]
    begun = time.monotonic()
    await asyncio.gather(*(front.read(0, 512) for front in fronts))
    assert time.monotonic() - begun >= 0.09
    group.set_limits(Limits())
    begun = time.monotonic()
    await asyncio.gather(*(front.read(0, 512) for front in fronts))
    assert time.monotonic() - begun < 0.09
