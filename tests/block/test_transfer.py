from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdserve.block.create import create_files
from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.block.transfer import STEP, transfer
from nbdserve.errors import RequestError
from nbdserve.formats.registry import driver_for
from nbdserve.storage.base import BlockingWrite
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.support.images import needs_qemu, run

SIZE = 4 * MIB + 512


def wanted(offset: int, data: memoryview) -> bool:
    return True


class Disks:
    """A source with random content, and a new target."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.content = random.Random(7).randbytes(SIZE)
        self.steps = 0

    async def source(self, form: str = "raw", content: bytes | None = None) -> Node:
        path = self.directory / f"source.{form}"
        await create_files(driver_for(form), [str(path)], SIZE, {})
        node = await open_image(ImageSpec(str(path), form))
        await node.write(0, self.content if content is None else content)
        return node

    async def target(self, form: str = "qcow2", size: int = SIZE, **options: str) -> Node:
        path = self.directory / f"target.{form}"
        await create_files(driver_for(form), [str(path)], size, options)
        return await open_image(ImageSpec(str(path), form, discard="unmap"))

    def see(self, offset: int, data: memoryview) -> bool:
        assert bytes(data) == self.content[offset : offset + len(data)]
        assert len(data) <= STEP
        self.steps += 1
        return True


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


async def moved(source: Node, target: Node, ranges: Sequence[tuple[int, int]], shift: int = 0) -> bool:
    return await transfer(source, target, ranges, shift, memoryview(bytearray(STEP)), wanted, lambda: None)


@needs_qemu
@pytest.mark.parametrize("source_format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("raw", {}),
        ("qcow2", {}),
        ("qcow2", {"cluster_size": "4k"}),
        ("qcow2", {"extended_l2": "on"}),
        ("qcow2", {"cluster_size": "2M"}),
    ],
)
async def test_what_is_copied(disks: Disks, source_format: str, form: str, options: dict[str, str]) -> None:
    source, target = await disks.source(source_format), await disks.target(form, **options)
    begun: list[int] = []
    ranges = [(0, 3 * 512), (65536, STEP + 512), (2 * MIB, SIZE - 2 * MIB)]
    expected = bytearray(SIZE)
    if options.get("cluster_size") == "2M":
        ranges = ranges[2:]  # two ranges of one cluster are refused
    for offset, length in ranges:
        expected[offset : offset + length] = disks.content[offset : offset + length]
    buffer = memoryview(bytearray(STEP))
    assert await transfer(source, target, ranges, 0, buffer, disks.see, lambda: begun.append(disks.steps))
    assert begun == [0]
    assert await target.read(0, SIZE) == expected
    await source.close()
    await target.close()
    if form == "qcow2":
        run("qemu-img", "check", "-q", "-f", form, target.path)
    run("qemu-img", "convert", "-f", form, "-O", "raw", target.path, str(disks.directory / "out"))
    assert (disks.directory / "out").read_bytes() == expected


async def test_clusters_in_part_over_a_backing_file(disks: Disks) -> None:
    base = disks.directory / "base"
    below = bytearray(random.Random(8).randbytes(SIZE + MIB))
    base.write_bytes(below)
    target = await disks.target(size=SIZE + MIB, backing_file=str(base), backing_fmt="raw")
    source = await disks.source()
    assert await moved(source, target, [(512, 1024), (MIB + 4096, 300 * KIB)], 100 * KIB)
    for start, length in ((512, 1024), (MIB + 4096, 300 * KIB)):
        below[start + 100 * KIB : start + 100 * KIB + length] = disks.content[start : start + length]
    assert await target.read(0, target.size) == below
    await source.close()
    await target.close()


@needs_qemu
@pytest.mark.parametrize("which", [0, 1, 4])
async def test_what_is_not_wanted_leaves_nothing(disks: Disks, which: int) -> None:
    source, target = await disks.source(), await disks.target()
    seen: list[int] = []

    def some(offset: int, data: memoryview) -> bool:
        seen.append(offset)
        return len(seen) <= which

    buffer = memoryview(bytearray(STEP))
    assert not await transfer(source, target, [(0, 3 * MIB)], 0, buffer, some, lambda: None)
    assert len(seen) == which + 1
    assert await target.read(0, SIZE) == bytes(SIZE)
    await target.write(0, disks.content)  # in the space that was given back, and nothing is held
    assert await target.read(0, SIZE) == disks.content
    await source.close()
    await target.close()
    run("qemu-img", "check", "-q", "-f", "qcow2", target.path)


@pytest.mark.parametrize(
    ("ranges", "shift"), [([(100, 512)], 0), ([(0, 100)], 0), ([(0, 512)], 100), ([(0, 512), (512, 512)], 0)]
)
async def test_parts_of_sectors_and_ranges_that_share_a_cluster_are_refused(
    disks: Disks, ranges: list[tuple[int, int]], shift: int
) -> None:
    source, target = await disks.source(), await disks.target()
    assert not await moved(source, target, ranges, shift)
    assert await target.read(0, 4096) == bytes(4096)
    await target.write(0, disks.content)
    await source.close()
    await target.close()


async def test_where_it_cannot_be_done(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = await disks.source(), await disks.target()
    async with target.locks.exclusive(MIB, MIB + 512):
        assert not await moved(source, target, [(0, 2 * MIB)])
    async with source.locks.exclusive(MIB, MIB + 512):
        assert not await moved(source, target, [(0, 2 * MIB)])
    await target.gate.close()
    assert not await moved(source, target, [(0, 2 * MIB)])
    target.gate.open()
    qed = await disks.target("qed")
    assert not await moved(source, qed, [(0, 2 * MIB)])
    with pytest.raises(RequestError, match="not inside"):
        await moved(source, target, [(0, 512), (MIB, 512)], SIZE - MIB)
    assert await moved(source, target, [(0, SIZE)])
    assert await target.read(0, SIZE) == disks.content
    for node in (source, target, qed):
        await node.close()


@needs_qemu
async def test_errors_name_the_file_and_leave_nothing(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = await disks.source(), await disks.target()
    assert isinstance(target.data, FileStorage)

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(target.data, "_write_fully", fail)
        with pytest.raises(OSError, match=r"No space left.*target\.qcow2"):
            await moved(source, target, [(0, MIB)])
    with monkeypatch.context() as patch:
        patch.setattr(source.top.data, "blocking_read", fail)
        with pytest.raises(OSError, match=r"No space left.*source\.raw"):
            await moved(source, target, [(0, MIB)])
    assert await target.read(0, MIB) == bytes(MIB)
    await source.close()
    await target.close()
    run("qemu-img", "check", "-q", "-f", "qcow2", target.path)


@needs_qemu
async def test_a_cancelled_transfer_ends_before_it_says_so(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = await disks.source(), await disks.target()
    assert isinstance(target.data, FileStorage)
    loop, begun, ended = asyncio.get_running_loop(), asyncio.Event(), []
    work = target.data.work

    async def watched(fn: object) -> bool:
        def slowly(write: BlockingWrite) -> bool:
            loop.call_soon_threadsafe(begun.set)
            done = fn(write)  # type: ignore[operator]
            ended.append(done)
            return bool(done)

        return await work(slowly)

    monkeypatch.setattr(target.data, "work", watched)
    task = asyncio.create_task(moved(source, target, [(0, 4 * MIB)]))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]
    assert await target.read(0, SIZE) == bytes(SIZE)
    await source.close()
    await target.close()
    run("qemu-img", "check", "-q", "-f", "qcow2", target.path)
