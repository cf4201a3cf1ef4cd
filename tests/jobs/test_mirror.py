"""Mirror: equal when ready, and either the target takes the place of the source or it is a copy of one moment."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import JobError
from nbdserve.formats.raw import RawDriver
from nbdserve.jobs.mirror import Mirror
from nbdserve.jobs.status import JobStatus
from nbdserve.storage.memory import MemoryStorage
from tests.jobs.chains import SIZE, UNIT, begin, chain, letters, make, opened, until


class Full(MemoryStorage):
    """Has no room, or has."""

    error: OSError | None = None

    def __init__(self, content: bytes = b"", *, size: int | None = None) -> None:
        super().__init__(content, size=size)
        self.refused = asyncio.Event()

    def try_write(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        return False

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self.error is not None:
            self.refused.set()
            raise self.error
        super().try_write(offset, data)


async def _target(folder: Path, fmt: str = "qcow2", *, backing: Path | None = None) -> Node:
    path = await make(folder / f"target.{fmt}", fmt, backing=backing)
    return await open_image(ImageSpec(str(path), fmt))


@pytest.mark.parametrize("fmt", ["qcow2", "raw", "qed"])
async def test_the_target_takes_the_place_of_the_source(tmp_path: Path, fmt: str) -> None:
    node = await chain(tmp_path, "qcow2 0a 1a", "qcow2 1b 2z")
    job = begin(Mirror("job", node, await _target(tmp_path, fmt), target_is_zero=True))
    await until(job, JobStatus.READY)
    await node.write(3 * UNIT, b"c" * UNIT)
    job.complete()
    await job.wait()
    assert job.error is None
    assert node.format == fmt
    await node.write(4 * UNIT, b"d" * UNIT)
    assert await letters(node) == "ab.cd"
    await node.close()
    assert await opened(tmp_path / f"target.{fmt}") == "ab.cd"
    assert await opened(tmp_path / "1.qcow2") == "ab.c"


async def test_cancelled_when_ready_the_target_is_a_copy_of_that_moment(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a")
    job = begin(Mirror("job", node, await _target(tmp_path)))
    await until(job, JobStatus.READY)
    await node.write(UNIT, b"b" * UNIT)
    job.cancel()
    await job.wait()
    assert not job.cancelled
    assert node.format == "raw"
    await node.write(UNIT, b"c" * UNIT)
    assert await opened(tmp_path / "target.qcow2") == "ab"
    await node.close()


async def test_cancelled_by_force_the_source_goes_on(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a")
    job = begin(Mirror("job", node, await _target(tmp_path)))
    await until(job, JobStatus.READY)
    job.cancel(force=True)
    await job.wait()
    assert job.cancelled
    assert node.format == "raw"
    assert not node.busy_with
    await node.write(UNIT, b"c" * UNIT)
    await node.close()


async def test_the_top_layer_alone_over_a_common_base(tmp_path: Path) -> None:
    node = await chain(tmp_path, "qcow2 0a 1a 2a", "qcow2 1b 2z")
    target = await _target(tmp_path, backing=tmp_path / "0.qcow2")
    job = begin(Mirror("job", node, target, sync="top"))
    await until(job, JobStatus.READY)
    assert job.current_progress == 2 * UNIT
    job.complete()
    await job.wait()
    assert await letters(node) == "ab"
    assert len(node.layers) == 2
    await node.close()


async def test_nothing_but_what_changes(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a")
    job = begin(Mirror("job", node, await _target(tmp_path), sync="none"))
    await until(job, JobStatus.READY)
    await node.write(UNIT, b"b" * UNIT)
    job.cancel()
    await job.wait()
    assert await opened(tmp_path / "target.qcow2") == ".b"
    await node.close()


@pytest.mark.parametrize("policy", ["report", "stop", "enospc", "ignore"])
async def test_a_full_target_leaves_the_source_alive(tmp_path: Path, policy: str) -> None:
    node = await chain(tmp_path, "raw 0a 5b")
    storage = Full(bytes(SIZE))
    storage.error = OSError(errno.ENOSPC, "No space left on device")
    target = Node([await RawDriver.open(storage, {}, read_only=False)])
    job = begin(Mirror("job", node, target, on_target_error=policy))
    if policy == "report":
        await job.wait()
        assert job.error is storage.error
        assert await letters(node) == "a....b"
        await node.close()
        return
    if policy == "ignore":
        await storage.refused.wait()
    else:
        await until(job, JobStatus.PAUSED)
        assert job.io_status == "nospace"
    await node.write(UNIT, b"c" * UNIT)
    storage.error = None
    if policy != "ignore":
        job.resume()
    await until(job, JobStatus.READY)
    job.complete()
    await job.wait()
    assert job.error is None
    assert await letters(node) == "ac...b"
    await node.close()


async def test_an_error_of_the_last_flush_leaves_the_source_in_place(tmp_path: Path) -> None:
    class Unstable(MemoryStorage):
        async def flush(self) -> None:
            raise OSError(errno.EIO, "lost")

    node = await chain(tmp_path, "raw 0a")
    target = Node([await RawDriver.open(Unstable(bytes(SIZE)), {}, read_only=False)])
    job = begin(Mirror("job", node, target, auto_complete=True, owns_target=False))
    await job.wait()
    assert job.error_text == "lost"
    assert node.format == "raw"
    assert node.top is not target.top
    await node.write(UNIT, b"b" * UNIT)
    await node.close()


async def test_a_job_that_waits_to_be_finalized_copies_what_changes(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a")
    job = begin(Mirror("job", node, await _target(tmp_path), auto_finalize=False))
    await until(job, JobStatus.READY)
    job.complete()
    await until(job, JobStatus.PENDING)
    await node.write(UNIT, b"b" * UNIT)
    job.finalize()
    await job.wait()
    assert node.format == "qcow2"
    assert await letters(node) == "ab"
    await node.close()


async def test_sizes_have_to_be_equal(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a")
    target = Node([await RawDriver.open(MemoryStorage(bytes(2 * SIZE)), {}, read_only=False)])
    with pytest.raises(JobError, match="different sizes"):
        Mirror("job", node, target)
    assert not node.busy_with
    await node.close()
