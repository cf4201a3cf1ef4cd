from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdserve.block.create import create_files
from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.block.watchers import Watcher
from nbdserve.errors import RequestError
from nbdserve.formats.registry import driver_for
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.file import FileStorage

SIZE = (1 << 20) + 1536


async def opened(path: Path, form: str = "qcow2", base: Path | None = None) -> Node:
    options = {} if base is None else {"backing_file": str(base), "backing_fmt": "raw"}
    await create_files(driver_for(form), [str(path)], SIZE, options)
    return await open_image(ImageSpec(str(path), form, discard="unmap"))


def ranges_of(choose: random.Random, content: bytearray) -> list[tuple[int, memoryview]]:
    """Disjoint ranges in any order, which often share a cluster, and are written to ``content``."""
    bounds = sorted({0, SIZE, *(choose.randrange(0, SIZE, 512) for _ in range(20))})
    ranges = []
    for start, end in zip(bounds[::2], bounds[1::2], strict=False):
        content[start:end] = choose.randbytes(end - start)
        ranges.append((start, memoryview(bytes(content[start:end]))))
    choose.shuffle(ranges)
    return ranges


@pytest.mark.parametrize(
    ("form", "based"), [("qcow2", False), ("qcow2", True), ("qed", True), ("vdi", False), ("raw", False)]
)
async def test_what_was_written_is_read(tmp_path: Path, form: str, based: bool) -> None:
    choose = random.Random(form)
    content = bytearray(SIZE)
    base = None
    if based:
        base = tmp_path / "base"
        content = bytearray(choose.randbytes(SIZE))
        base.write_bytes(content)
    node = await opened(tmp_path / "image", form, base)
    for _ in range(3):
        await node.write_all(ranges_of(choose, content))
        bounds = sorted({0, SIZE, *(choose.randrange(SIZE) for _ in range(9))})
        wanted = [(start, memoryview(bytearray(b"x" * (end - start)))) for start, end in itertools.pairwise(bounds)]
        await node.read_all(wanted)
        assert b"".join(buffer for _, buffer in wanted) == content
    await node.close()


async def test_one_trip_for_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await opened(tmp_path / "image")
    trips: list[int] = []
    write = FileStorage.write_all

    async def counted(self: FileStorage, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        trips.append(len(pieces))
        await write(self, pieces)

    monkeypatch.setattr(FileStorage, "write_all", counted)
    await node.write_all([(start << 16, memoryview(b"d" * 65536)) for start in range(0, 16, 2)])
    assert trips == [8]
    monkeypatch.undo()
    await node.close()


async def test_a_range_in_use_is_waited_for(tmp_path: Path) -> None:
    node = await opened(tmp_path / "image")
    async with node.locks.exclusive(65536, 131072):
        writing = asyncio.create_task(node.write_all([(0, memoryview(b"a" * 512)), (65536, memoryview(b"b" * 512))]))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not writing.done()
    await writing
    async with node.locks.exclusive(65536, 131072):
        reading = asyncio.create_task(node.read_all([(0, memoryview(bytearray(1))), (65536, memoryview(bytearray(1)))]))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not reading.done()
    await reading
    assert await node.read(65535, 2) == b"\0b"
    await node.close()


async def test_who_watches_from_the_middle_on_is_told_of_the_rest(tmp_path: Path) -> None:
    class Told(Watcher):
        def __init__(self) -> None:
            self.ranges: list[tuple[int, int]] = []

        def changed(self, offset: int, length: int) -> None:
            self.ranges.append((offset, length))

    node, told = await opened(tmp_path / "image"), Told()
    async with node.locks.exclusive(65536, 131072):
        data = memoryview(b"x" * 512)
        writing = asyncio.create_task(node.write_all([(0, data), (65536, data), (131072, data)]))
        while await node.read(0, 1) != b"x":
            await asyncio.sleep(0)
        node.watch(told)
    await writing
    assert told.ranges == [(65536, 512), (131072, 512)]
    await node.close()


async def test_a_failed_write_shows_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await opened(tmp_path / "image")

    async def full(self: FileStorage, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileStorage, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        await node.write_all([(0, memoryview(b"a" * 65536)), (131072, memoryview(b"a" * 65536))])
    monkeypatch.undo()
    assert await node.read(0, SIZE) == bytes(SIZE)
    await node.write_all([(0, memoryview(b"n" * 512))])  # nothing is held any more
    assert (await node.top.check()).corruptions == 0
    await node.close()


async def test_outside_the_disk(tmp_path: Path) -> None:
    node = await opened(tmp_path / "image")
    for request in (node.read_all, node.write_all):
        with pytest.raises(RequestError, match="not inside"):
            await request([(SIZE - 1, memoryview(bytearray(2)))])
    await node.close()
