"""Limits hold requests back, and change nothing else."""

from __future__ import annotations

import asyncio
import time

import pytest

from nbdserve.block.filters.throttle import Bucket, Limit, Limits, ThrottledNode, ThrottleGroup
from nbdserve.block.status import allocation_flags, block_status, depth_values
from nbdserve.errors import ConfigError
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.block.layers import overlay


async def test_the_content_is_that_of_the_node() -> None:
    node = await overlay(MemoryStorage(b"b" * 64 * KIB, path="base"), 64 * KIB)
    front = ThrottledNode(node, ThrottleGroup(Limits()))
    await front.write(4 * KIB, b"x" * 512, fua=True)
    await front.zero(8 * KIB, 4 * KIB)
    assert await front.read(0, 64 * KIB) == await node.read(0, 64 * KIB)
    assert await node.read(4 * KIB, 512) == b"x" * 512
    for projection in (allocation_flags, depth_values):
        assert await block_status(front, 0, front.size, [projection], 100)
    await front.close()
    assert node.is_stable
    assert await node.read(4 * KIB, 512) == b"x" * 512, "the node below goes on"


def test_a_bucket_leaks_at_its_rate() -> None:
    bucket = Bucket(Limit(100))
    assert bucket.delay(1.0) == 0.0
    bucket.add(10)
    assert bucket.delay(1.0) == 0.0, "a tenth of a second's worth may be used up at once"
    bucket.add(50)
    assert bucket.delay(1.0) == pytest.approx(0.5)
    assert bucket.delay(1.3) == pytest.approx(0.2)
    assert bucket.delay(1.6) == 0.0
    assert Bucket(Limit()).delay(1.0) == 0.0


def test_bursts() -> None:
    bucket = Bucket(Limit(100, 1000))
    bucket.add(1000)
    assert bucket.delay(0.0) == 0.0
    bucket.add(100)
    assert bucket.delay(0.0) == pytest.approx(1.0), "the burst is used up: at the rate again"
    longer = Bucket(Limit(100, 1000, 10))
    longer.add(150)
    assert longer.delay(0.0) == pytest.approx(0.05), "no faster than the burst, however long it may be"
    assert longer.delay(0.1) == 0.0


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (Limits(bps_total=Limit(1), bps_read=Limit(1)), "cannot be used at the same time"),
        (Limits(iops_size=1), "requires an iops value"),
        (Limits(bps_read=Limit(-1)), "must be within"),
        (Limits(bps_read=Limit(10**15 + 1)), "must be within"),
        (Limits(bps_read=Limit(1, 2, 0)), "cannot be 0"),
        (Limits(bps_read=Limit(1, 0, 2)), "without burst rate"),
        (Limits(bps_read=Limit(1, 10**14, 11)), "too high"),
        (Limits(iops_write=Limit(0, 1)), "require corresponding"),
        (Limits(iops_write=Limit(2, 1)), "cannot be lower"),
    ],
)
def test_limits_that_contradict_each_other(limits: Limits, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ThrottleGroup(limits)


@pytest.mark.parametrize(
    ("limits", "reads", "writes", "least"),
    [
        (Limits(bps_total=Limit(100 * KIB)), 4, 1, 0.04),
        (Limits(bps_read=Limit(100 * KIB)), 5, 0, 0.04),
        (Limits(iops_write=Limit(20)), 9, 4, 0.05),
        (Limits(iops_total=Limit(20)), 3, 1, 0.05),
        (Limits(iops_total=Limit(20), iops_size=KIB), 2, 0, 0.05),
    ],
)
async def test_requests_wait(limits: Limits, reads: int, writes: int, least: float) -> None:
    node = await overlay(None, 64 * KIB)
    front = ThrottledNode(node, ThrottleGroup(limits))
    begun = time.monotonic()
    for _ in range(reads):
        await front.read(0, 4 * KIB)
    for _ in range(writes):
        await front.write(0, b"w" * 4 * KIB)
    assert time.monotonic() - begun >= least * 0.9


async def test_disks_of_a_group_share_its_limits_and_limits_can_change() -> None:
    group = ThrottleGroup(Limits(iops_total=Limit(1)))
    fronts = [ThrottledNode(await overlay(None, 64 * KIB), group) for _ in range(3)]
    reads = [asyncio.create_task(front.read(0, 512)) for front in fronts]
    done, waiting = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    group.set_limits(Limits(iops_read=Limit(10**6)))
    await asyncio.wait_for(asyncio.gather(*waiting), 60)


async def test_who_waits_for_a_turn_goes_on_when_the_disk_is_drained() -> None:
    """At one request an hour, only that lets them end in time."""
    front = ThrottledNode(await overlay(None, 64 * KIB), ThrottleGroup(Limits(bps_total=Limit(1, 4096))))
    await front.write(0, b"1" * 8 * KIB)
    late = [asyncio.create_task(front.write(0, b"2" * 8 * KIB)), asyncio.create_task(front.read(0, 512))]
    while not front.gate.inside:
        await asyncio.sleep(0)
    async with front.drained():
        assert await front.read(0, 1) in (b"1", b"2")
    await asyncio.wait_for(asyncio.gather(*late), 60)
    await front.close()


async def test_a_resize_goes_through() -> None:
    node = await overlay(None, 64 * KIB)
    front = ThrottledNode(node, ThrottleGroup(Limits()))
    await front.resize(128 * KIB)
    assert (front.size, node.size) == (128 * KIB, 128 * KIB)
    await front.write(127 * KIB, b"e" * KIB)
    assert await node.read(127 * KIB, KIB) == b"e" * KIB
