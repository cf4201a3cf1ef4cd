"""Backup: the target is the disk of the moment at which the job was started."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import JobError
from nbdserve.formats.raw import RawDriver
from nbdserve.jobs.backup import Backup
from nbdserve.jobs.status import JobStatus
from nbdserve.storage.memory import MemoryStorage
from tests.block.layers import raw_node
from tests.jobs.chains import SIZE, UNIT, begin, chain, letters, make, opened, until
from tests.jobs.examples import settle
from tests.jobs.test_mirror import Full


async def _target(folder: Path, *, backing: Path | None = None) -> Node:
    path = await make(folder / "target.qcow2", backing=backing)
    return await open_image(ImageSpec(str(path), "qcow2"))


async def test_what_clients_change_meanwhile_is_kept_first(tmp_path: Path) -> None:
    node = await chain(tmp_path, "qcow2 0a 1a 2a 3a 4a")
    ended: list[bool] = []
    job = Backup(
        "job",
        node,
        await _target(tmp_path),
        target_is_zero=True,
        finished=lambda done, left: ended.append(done),
    )
    job.hold()
    begin(job)
    await node.write(3 * UNIT + 512, b"b" * 512)
    await node.write(3 * UNIT, b"b" * UNIT)
    await node.zero(4 * UNIT, UNIT)
    await node.write(9 * UNIT, b"b" * UNIT)
    job.release()
    await job.wait()
    assert job.error is None
    assert ended == [True]
    assert await letters(node) == "aaab.....b"
    assert not node.busy_with
    assert await opened(tmp_path / "target.qcow2") == "aaaaa"
    await node.close()


async def test_it_waits_for_the_copy_that_a_client_waits_for() -> None:
    class Slow(MemoryStorage):
        async def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset == 0:
                reading.set()
                await go_on.wait()
            await super().read_into(offset, buffer)

    reading, go_on = asyncio.Event(), asyncio.Event()
    kept = MemoryStorage(bytes(SIZE))
    node, target = await raw_node(Slow(b"a" * SIZE)), await raw_node(kept)
    at_the_end: list[bytes] = []

    def finished(done: bool, left: DirtyBitmap | None) -> None:
        assert done
        buffer = bytearray(SIZE)
        assert kept.try_read_into(0, memoryview(buffer))
        at_the_end.append(bytes(buffer))

    job = Backup("job", node, target, finished=finished)
    job.hold()
    begin(job)
    client = asyncio.create_task(node.write(0, b"b" * 512))
    await reading.wait()
    job.release()
    while await target.read(SIZE - UNIT, UNIT) != b"a" * UNIT:
        await settle(1)
    await settle()
    go_on.set()
    await client
    await job.wait()
    assert job.error is None
    assert at_the_end == [b"a" * SIZE]
    assert await node.read(0, 513) == b"b" * 512 + b"a"


async def test_what_a_client_waits_for_when_it_is_cancelled_counts_as_copied_only_if_it_is() -> None:
    class Slow(MemoryStorage):
        async def read_into(self, offset: int, buffer: memoryview) -> None:
            reading.set()
            await go_on.wait()
            raise OSError(errno.EIO, "failed")

    reading, go_on = asyncio.Event(), asyncio.Event()
    node, target = await raw_node(Slow(b"a" * SIZE)), await raw_node(MemoryStorage(bytes(SIZE)))
    left: list[bool] = []

    def finished(done: bool, not_copied: DirtyBitmap | None) -> None:
        assert not done
        assert not_copied is not None
        left.append(not_copied.is_dirty(0))

    job = Backup("job", node, target, finished=finished)
    job.hold()
    begin(job)
    client = asyncio.create_task(node.write(0, b"b" * 512))
    await reading.wait()
    job.force_cancel()
    await settle()
    go_on.set()
    await client
    await job.wait()
    assert left == [True]


async def test_the_top_layer_alone(tmp_path: Path) -> None:
    node = await chain(tmp_path, "qcow2 0a 1a 2a", "qcow2 1b 2z")
    await Backup("job", node, await _target(tmp_path, backing=tmp_path / "0.qcow2"), sync="top").result()
    assert await opened(tmp_path / "target.qcow2") == "ab"
    await node.close()


async def test_what_a_bitmap_says(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a")
    work = DirtyBitmap(None, SIZE, 512)
    work.set(UNIT + 512, 512)
    ended: list[bool] = []
    job = Backup(
        "job",
        node,
        await _target(tmp_path),
        sync="incremental",
        work=work,
        finished=lambda done, left: ended.append(done),
    )
    await job.result()
    assert await opened(tmp_path / "target.qcow2") == ".a"
    assert ended == [True]
    with pytest.raises(JobError, match="bitmap"):
        Backup("job", node, node, sync="bitmap")
    await node.close()


async def test_nothing_but_what_is_about_to_change(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a")
    job = begin(Backup("job", node, await _target(tmp_path), sync="none"))
    await until(job, JobStatus.RUNNING)
    await node.write(UNIT, b"b" * UNIT)
    job.cancel()
    await job.wait()
    assert await opened(tmp_path / "target.qcow2") == ".a"
    assert await letters(node) == "aba"
    await node.close()


@pytest.mark.parametrize("who", ["job", "client"])
async def test_a_full_target_fails_the_job_and_not_the_client(tmp_path: Path, who: str) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a")
    storage = Full(bytes(SIZE))
    storage.error = OSError(errno.ENOSPC, "No space left on device")
    target = Node([await RawDriver.open(storage, {}, read_only=False)])
    ended: list[bool] = []
    speed = 1 if who == "client" else 0
    job = begin(
        Backup("job", node, target, target_is_zero=True, speed=speed, finished=lambda done, left: ended.append(done))
    )
    if who == "client":
        await until(job, JobStatus.RUNNING)
        await node.write(2 * UNIT, b"c" * UNIT)
    async with asyncio.timeout(60):
        await job.wait()
    assert job.error is storage.error
    assert ended == [False]
    assert await letters(node) == ("aac" if who == "client" else "aaa")
    assert not node.busy_with
    await node.close()


@pytest.mark.parametrize("held", ["by its speed", "by a pause"])
async def test_a_lost_moment_ends_a_job_that_sleeps(tmp_path: Path, held: str) -> None:
    node = await chain(tmp_path, "raw 0a 2a 4a")
    storage = Full(bytes(SIZE))
    target = Node([await RawDriver.open(storage, {}, read_only=False)])
    job = begin(Backup("job", node, target, target_is_zero=True, speed=1, owns_target=False))
    while job.busy or not job.current_progress:  # for 18 hours, after the first of three
        await settle(1)
    if held == "by a pause":
        job.pause()
        await until(job, JobStatus.PAUSED)
    storage.error = OSError(errno.ENOSPC, "No space left on device")
    await node.write(4 * UNIT, b"c" * UNIT)
    async with asyncio.timeout(60):
        await job.wait()
    assert job.error is storage.error
    assert not job.cancelled
    assert await letters(target) == "a"
    assert await letters(node) == "a.a.c"
    await node.close()


@pytest.mark.parametrize("policy", ["stop", "ignore"])
async def test_it_goes_on_when_there_is_room(tmp_path: Path, policy: str) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a")
    storage = Full(bytes(SIZE))
    storage.error = OSError(errno.ENOSPC, "No space left on device")
    target = Node([await RawDriver.open(storage, {}, read_only=False)])
    job = begin(Backup("job", node, target, on_target_error=policy, owns_target=False))
    if policy == "stop":
        await until(job, JobStatus.PAUSED)
    else:
        await storage.refused.wait()
    storage.error = None
    if policy == "stop":
        job.resume()
    await job.wait()
    assert job.error is None
    assert await letters(target) == "aaa"
    await node.close()


async def test_several_disks_at_one_moment(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    nodes = [await chain(tmp_path / name, "raw 0a 1a") for name in "xy"]
    jobs = [Backup(f"job{number}", node, await _target(tmp_path / "xy"[number])) for number, node in enumerate(nodes)]
    async with nodes[0].drained(), nodes[1].drained():
        writes = [asyncio.create_task(node.write(0, b"b" * UNIT)) for node in nodes]
        for job in jobs:
            begin(job)
    await asyncio.gather(*writes, *(job.wait() for job in jobs))
    for name, node in zip("xy", nodes, strict=True):
        assert await opened(tmp_path / name / "target.qcow2") in ("aa", "ba")
        assert await letters(node) == "ba"
        await node.close()


async def test_sizes_have_to_be_equal(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a")
    target = Node([await RawDriver.open(MemoryStorage(bytes(512)), {}, read_only=False)])
    with pytest.raises(JobError, match="different sizes"):
        Backup("job", node, target)
    await node.close()
