"""Backups one after another of a disk that is being written: each brings the same target to its own moment."""

from __future__ import annotations

import asyncio
import random

import pytest

from nbdserve.block.node import Node
from nbdserve.jobs.backup import Backup
from nbdserve.jobs.bitmap_sync import BitmapSync, check_modes
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import raw_node
from tests.jobs.chains import begin
from tests.jobs.test_mirror import Full

SIZE = 2 * MIB
ROUNDS = 12


async def change(node: Node, source: random.Random, count: int) -> None:
    for _ in range(count):
        offset = source.randrange(SIZE)
        length = min(SIZE - offset, source.choice([1, 4096, 70_000]))
        if source.random() < 0.3:
            await node.zero(offset, length)
        else:
            await node.write(offset, source.randbytes(length))
        await asyncio.sleep(0)


async def back_up(node: Node, target: Node, sync: str, mode: str | None) -> tuple[Backup, bytes]:
    """A backup that uses the bitmap, and what the disk held when it began."""
    async with node.drained():
        moment = bytes(await node.read(0, SIZE))
        used = check_modes(sync, "b", mode)
        assert used is not None
        marks = BitmapSync(node.bitmaps, node.bitmaps.get("b"), used)
        job = Backup(
            "job",
            node,
            target,
            sync=sync,
            work=None if sync == "full" else marks.bitmap,
            owns_target=False,
            finished=marks.finish,
        )
        begin(job)
    return job, moment


@pytest.mark.parametrize("failing_mode", ["on-success", "always"])
async def test_each_brings_the_target_to_its_moment(failing_mode: str) -> None:
    """Every third one fails half way; the next is as good as if it had not been tried."""
    source = random.Random(failing_mode)
    node = await raw_node(MemoryStorage(source.randbytes(SIZE)))
    storage = Full(size=SIZE)
    target = await raw_node(storage)
    node.bitmaps.add("b", 16 * KIB)
    for number in range(ROUNDS):
        fails = number % 3 == 1
        sync, mode = (
            ("full", "on-success") if not number else ("bitmap", failing_mode) if fails else ("incremental", None)
        )
        before = node.bitmaps.get("b").count()
        job, moment = await back_up(node, target, sync, mode)
        if number == 3:
            await change(node, source, 3)
            job.force_cancel()
            await job.wait()
            assert node.bitmaps.get("b").count() >= before
            continue
        if fails:
            await asyncio.sleep(0)
            storage.error = OSError(28, "no room")
        await change(node, source, 8)
        await job.wait()
        storage.error = None
        assert (job.error is not None) is fails
        if not fails:
            assert await target.read(0, SIZE) == moment
        await change(node, source, 8)
        assert [bitmap.name for bitmap in node.bitmaps] == ["b"]
        assert not node.bitmaps.get("b").busy
    assert await target.read(0, SIZE) == moment
    await node.close()
    await target.close()


async def test_never_leaves_the_bitmap_as_it_was() -> None:
    node, target = await raw_node(MemoryStorage(size=SIZE)), await raw_node(MemoryStorage(size=SIZE))
    node.bitmaps.add("b")
    await node.write(0, b"x")
    for _ in range(2):
        job, moment = await back_up(node, target, "bitmap", "never")
        await job.wait()
        assert await target.read(0, SIZE) == moment
        assert node.bitmaps.get("b").count() == 64 * KIB
    await node.close()
    await target.close()
