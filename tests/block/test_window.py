"""An image within an image: a window of a qcow2 disk, and a qcow2 in the window of a larger file."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.block.status import HOLE, READS_ZERO, Projection, allocation_flags, block_status, depth_values
from nbdserve.block.window import NodeStorage
from nbdserve.errors import ImageError, RequestError
from nbdserve.extents import DATA, ZERO, RunArray
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.block.layers import overlay, raw_node
from tests.support.images import check, compare, create, needs_qemu, qemu_io, run

BOTH: list[Projection] = [allocation_flags, depth_values]
ZEROES = HOLE | READS_ZERO
CLUSTER = 4 * KIB
SIZE = 16 * CLUSTER


def runs(array: RunArray) -> list[tuple[int, int, int, int]]:
    columns = (array.start, array.length, array.kind, array.host_offset)
    return list(zip(*(column.tolist() for column in columns), strict=True))


async def inner_node() -> Node:
    """Clusters: b and B of the base, B at 2 and 3, of the image 1, 3 (zeroed) and 4; the rest is in neither."""
    base = MemoryStorage(b"b" * 4 * CLUSTER, path="base.raw")
    node = await overlay(base, SIZE, unmap=True)
    await node.write(CLUSTER, b"t" * CLUSTER)
    await node.zero(3 * CLUSTER, CLUSTER)
    await node.write(4 * CLUSTER, b"u" * CLUSTER)
    return node


CONTENT = (b"b" * CLUSTER + b"t" * CLUSTER + b"b" * CLUSTER + bytes(CLUSTER) + b"u" * CLUSTER).ljust(SIZE, b"\0")


async def window(offset: int, size: int | None = None) -> Node:
    storage = NodeStorage(await inner_node())
    options = {"offset": offset, "size": size}
    return Node([await RawDriver.open(storage, options, read_only=False)], unmap=True)


async def test_bytes_with_and_without_waiting() -> None:
    storage = NodeStorage(await inner_node())
    assert await storage.read(0, SIZE) == CONTENT
    for offset, length in ((0, 10), (CLUSTER - 5, 10), (3 * CLUSTER + 1, 100), (2 * CLUSTER, 6 * CLUSTER), (0, SIZE)):
        buffer = memoryview(bytearray(b"?" * length))
        assert storage.try_read_into(offset, buffer)
        assert buffer == CONTENT[offset : offset + length]
    assert not storage.try_read_into(SIZE - 1, memoryview(bytearray(2)))
    assert not storage.try_write(CLUSTER, b"x")
    assert not storage.can_send(0, 1)
    assert await storage.read(SIZE - 3, 10) == bytes(10)
    assert await storage.read(SIZE + 3, 10) == bytes(10)


async def test_the_map_is_that_of_the_whole_chain_below() -> None:
    storage = NodeStorage(await inner_node())
    data, hole = 3 * CLUSTER, CLUSTER
    everything = [
        (0, data, DATA, 0),
        (data, hole, ZERO, -1),
        (4 * CLUSTER, CLUSTER, DATA, 4 * CLUSTER),
        (5 * CLUSTER, 11 * CLUSTER, ZERO, -1),
    ]
    assert runs(await storage.host_map(0, SIZE)) == everything
    assert runs(await storage.host_map(0, SIZE, 2)) == everything[:2]
    assert runs(await storage.host_map(10, data, 1)) == [(10, data - 10, DATA, 10)]
    assert runs(await storage.host_map(4 * CLUSTER, SIZE)) == [
        everything[2],
        (5 * CLUSTER, 15 * CLUSTER, ZERO, -1),
    ]
    assert runs(await storage.host_map(SIZE, 5)) == [(SIZE, 5, ZERO, -1)]


async def test_the_disk_does_not_grow() -> None:
    storage = NodeStorage(await inner_node())
    for request in (
        storage.write(SIZE - 1, b"xy"),
        storage.write_all([(SIZE - 2, b"x"), (SIZE, b"y")]),
        storage.zero(SIZE - 1, 2),
        storage.truncate(SIZE + 1),
    ):
        with pytest.raises(OSError, match="does not grow") as caught:
            await request
        assert caught.value.errno == errno.ENOSPC
    await storage.discard(SIZE - 1, 10)
    await storage.truncate(SIZE)
    assert await storage.read(SIZE - 2, 4) == b"x\0\0\0"


async def test_a_closed_or_read_only_disk_says_so() -> None:
    inner = await inner_node()
    storage = NodeStorage(inner)
    storage.read_only = True
    with pytest.raises(OSError, match="read-only") as caught:
        await storage.write(0, b"x")
    assert caught.value.errno == errno.EROFS
    await storage.close()
    await storage.close()
    with pytest.raises(OSError, match="closed"):
        await storage.read(0, 1)


async def test_a_failed_request_of_the_image_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = NodeStorage(await inner_node())

    def corrupt(offset: int, length: int) -> None:
        raise RequestError(errno.EIO, "corrupt")

    monkeypatch.setattr(storage.node.top, "lookup", corrupt)
    monkeypatch.setattr(storage.node, "_steps", [(corrupt, SIZE, storage.node.data)])
    assert not storage.try_read_into(0, memoryview(bytearray(1)))
    with pytest.raises(OSError, match="corrupt") as caught:
        await storage.read(0, 1)
    assert caught.value.errno == errno.EIO


async def test_every_write_of_a_batch_has_ended_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = NodeStorage(await raw_node(MemoryStorage(bytes(100)), writethrough=True))
    ended = []

    async def write(offset: int, data: memoryview) -> None:
        for _ in range(offset):
            await asyncio.sleep(0)
        ended.append(offset)
        if offset == 1:
            raise RequestError(errno.EIO, "one of them")

    monkeypatch.setattr(storage.node, "write", write)
    with pytest.raises(OSError, match="one of them"):
        await storage.write_all([(offset, b"x") for offset in (5, 1, 9)])
    assert ended == [1, 5, 9]


async def test_a_cancelled_write_has_ended() -> None:
    class Slow(MemoryStorage):
        def try_write(self, offset: int, data: ReadBuffer) -> bool:
            return False

        async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
            writing.set()
            await go_on.wait()
            for offset, data in pieces:
                assert super().try_write(offset, data)

    writing, go_on = asyncio.Event(), asyncio.Event()
    storage = NodeStorage(await raw_node(Slow(bytes(512))))
    write = asyncio.create_task(storage.write(0, b"x"))
    await writing.wait()
    write.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not write.done(), "what is written to the place next could be overwritten"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await write
    assert await storage.read(0, 1) == b"x"


async def test_a_window_is_written_as_a_disk() -> None:
    node = await window(CLUSTER // 2, 8 * CLUSTER)
    model = bytearray(CONTENT[CLUSTER // 2 :][: 8 * CLUSTER])
    chance = random.Random(7)
    for _ in range(300):
        offset = chance.randrange(node.size)
        length = min(chance.choice((1, 100, CLUSTER, 3 * CLUSTER)), node.size - offset)
        match chance.randrange(4):
            case 0:
                data = chance.randbytes(length)
                await asyncio.gather(node.write(offset, data), node.read(offset, length))
                model[offset : offset + length] = data
            case 1:
                await node.zero(offset, length, unmap=chance.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case 2:
                await node.flush()
            case 3:
                assert await node.read(offset, length) == model[offset : offset + length]
    assert await node.read(0, node.size) == model
    position = 0
    flags, _ = await block_status(node, 0, node.size, BOTH, 1000)
    for length, status in flags:
        assert not status or not any(model[position : position + length])
        position += length
    assert position == node.size
    inner = await node.data.read(0, SIZE)
    assert inner == CONTENT[: CLUSTER // 2] + model + CONTENT[CLUSTER // 2 + len(model) :]
    await node.close()


async def test_zeroes_and_discards_reach_the_image_as_such() -> None:
    node = await window(CLUSTER)
    await node.zero(0, CLUSTER, fast=True)
    await node.discard(3 * CLUSTER, CLUSTER)
    (flags,) = await block_status(node, 0, node.size, [allocation_flags], 100)
    assert flags == [(CLUSTER, ZEROES), (CLUSTER, 0), (13 * CLUSTER, ZEROES)]


async def test_a_flush_flushes_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    node = await window(CLUSTER)
    storage = node.data
    assert isinstance(storage, NodeStorage)
    await node.write(0, b"x", fua=True)
    assert storage.node.is_stable

    async def fail() -> None:
        raise OSError(errno.EIO, "no flush")

    await node.write(0, b"y")
    monkeypatch.setattr(storage.node.top, "flush", fail)
    with pytest.raises(OSError, match="no flush"):
        await node.flush()


async def test_depth_is_that_of_qemu() -> None:
    """1 for what the image's top layer has, 0 for the rest; the content is told as it is."""
    node = await window(CLUSTER // 2, 6 * CLUSTER)
    flags, depth = await block_status(node, 0, node.size, BOTH, 100)
    assert flags == [(5 * CLUSTER // 2, 0), (CLUSTER, ZEROES), (CLUSTER, 0), (3 * CLUSTER // 2, ZEROES)]
    assert depth == [(CLUSTER // 2, 0), (CLUSTER, 1), (CLUSTER, 0), (2 * CLUSTER, 1), (3 * CLUSTER // 2, 0)]
    nested = Node([await RawDriver.open(NodeStorage(node), {"offset": CLUSTER}, read_only=False)])
    _, depth = await block_status(nested, 0, nested.size, BOTH, 100)
    assert depth == [(CLUSTER // 2, 1), (CLUSTER, 0), (2 * CLUSTER, 1), (3 * CLUSTER // 2, 0)]


# --- opened as the user says it ----------------------------------------------------------------------------------


@needs_qemu
@pytest.mark.parametrize("fmt", [None, "qcow2"])
async def test_a_window_of_an_image_that_is_not_raw(tmp_path: Path, fmt: str | None) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    qemu_io(path, "qcow2", ["write -q -P 1 0 512k", "write -q -P 2 512k 64k"])
    node = await open_image(ImageSpec(str(path), fmt, offset=512 * KIB - 1, size=128 * KIB))
    assert (node.format, node.size, node.read_only) == ("raw", 128 * KIB, False)
    assert await node.read(0, 2) == b"\1\2"
    await node.write(1, b"w" * KIB)
    await node.close()
    qemu_io(path, "qcow2", ["read -q -P 1 0 512k", "read -q -P 0x77 512k 1k", "read -q -P 2 513k 63k"])
    check(path)
    before = path.read_bytes()
    node = await open_image(ImageSpec(str(path), fmt, offset=512 * KIB, overlay=True))
    await node.write(0, b"gone")
    assert await node.read(0, 5) == b"gonew"
    await node.close()
    for offset, size in ((2 * MIB, None), (512, MIB)):
        with pytest.raises(ImageError):
            await open_image(ImageSpec(str(path), fmt, offset=offset, size=size))
    assert path.read_bytes() == before


async def test_a_probed_raw_image_stays_guarded_in_its_window(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8 * KIB))
    node = await open_image(ImageSpec(str(path), offset=4 * KIB))
    assert isinstance(node.data, FileStorage)
    with pytest.raises(RequestError):
        await node.write(0, b"QFI\xfb\0\0\0\3")
    await node.close()


@needs_qemu
async def test_an_internal_snapshot_in_a_window(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    qemu_io(path, "qcow2", ["write -q -P 1 0 64k"])
    run("qemu-img", "snapshot", "-c", "first", path)
    qemu_io(path, "qcow2", ["write -q -P 2 0 64k"])
    node = await open_image(ImageSpec(str(path), snapshot="first", offset=512))
    assert node.read_only
    assert await node.read(0, 1) == b"\1"
    await node.close()


def embedded(tmp_path: Path, tail: int = 0) -> tuple[Path, ImageSpec, int]:
    """A qcow2 in a larger file as in a tar, ``tail`` bytes of room behind it within its window."""
    image, archive = tmp_path / "disk.qcow2", tmp_path / "archive.tar"
    create(image, MIB)
    qemu_io(image, "qcow2", ["write -q -P 1 0 256k"])
    data = image.read_bytes() + bytes(tail)
    archive.write_bytes(b"H" * 512 + data + b"T" * 1024)
    window = ImageSpec(str(archive), "raw", offset=512, size=len(data))
    return archive, ImageSpec(str(archive), "qcow2", file=window), len(data)


@needs_qemu
@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
async def test_an_image_embedded_in_a_file(tmp_path: Path, cache: str) -> None:
    archive, spec, size = embedded(tmp_path, tail=1 * MIB)
    before = archive.read_bytes()
    node = await open_image(ImageSpec(spec.path, "qcow2", read_only=True, file=spec.file))
    assert node.format == "qcow2"
    assert await node.read(256 * KIB - 1, 2) == b"\1\0"
    await node.close()
    assert archive.read_bytes() == before
    node = await open_image(ImageSpec(spec.path, "qcow2", cache=cache, file=spec.file))
    await node.write(100, b"\2" * 1000)
    await node.write(512 * KIB, b"\3" * 128 * KIB)
    await node.flush()
    await node.close()
    after = archive.read_bytes()
    assert len(after) == len(before)
    assert (after[:512], after[512 + size :]) == (b"H" * 512, b"T" * 1024)
    image = tmp_path / "out.qcow2"
    image.write_bytes(after[512 : 512 + size])
    check(image)
    qemu_io(image, "qcow2", ["read -q -P 1 0 100", "read -q -P 2 100 1000", "read -q -P 3 512k 128k"])


@needs_qemu
async def test_an_embedded_image_does_not_outgrow_its_window(tmp_path: Path) -> None:
    archive, spec, size = embedded(tmp_path, tail=128 * KIB)
    before = archive.read_bytes()
    node = await open_image(spec)
    with pytest.raises(OSError, match="does not grow") as caught:
        await node.write(256 * KIB, b"x" * 512 * KIB)
    assert caught.value.errno == errno.ENOSPC
    await node.write(0, b"still writable")
    await node.flush()
    await node.close()
    after = archive.read_bytes()
    assert len(after) == len(before)
    assert after[512 + size :] == b"T" * 1024
    image = tmp_path / "out.qcow2"
    image.write_bytes(after[512 : 512 + size])
    check(image, leaks_allowed=True)
    expected = tmp_path / "expected.raw"
    expected.write_bytes(b"still writable".ljust(256 * KIB, b"\1") + await _tail(image))
    compare(image, "qcow2", expected, "raw")


async def _tail(image: Path) -> bytes:
    """What the clusters written before the window was full hold: all of the write that failed, or nothing."""
    node = await open_image(ImageSpec(str(image), "qcow2", read_only=True))
    tail = bytes(await node.read(256 * KIB, MIB - 256 * KIB))
    await node.close()
    clusters = {tail[at : at + 64 * KIB] for at in range(0, len(tail), 64 * KIB)}
    assert clusters <= {b"x" * 64 * KIB, bytes(64 * KIB)}
    return tail


@needs_qemu
async def test_two_windows_of_one_file_are_a_chain(tmp_path: Path) -> None:
    archive, spec, _ = embedded(tmp_path)
    top = tmp_path / "top.qcow2"
    create(top, MIB)
    qemu_io(top, "qcow2", ["write -q -P 5 64k 64k"])
    offset = archive.stat().st_size
    with archive.open("ab") as file:
        file.write(top.read_bytes())
    window = ImageSpec(str(archive), "raw", offset=offset)
    chain = ImageSpec(str(archive), "qcow2", read_only=True, file=window, backing=spec)
    node = await open_image(chain)
    assert await node.read(64 * KIB - 1, 2) == b"\1\5"
    _, depth = await block_status(node, 0, 192 * KIB, BOTH, 10)
    assert depth == [(64 * KIB, 2), (64 * KIB, 1), (64 * KIB, 2)]
    await node.close()


@needs_qemu
async def test_the_external_data_file_is_not_the_file_around_the_image(tmp_path: Path) -> None:
    archive, image = tmp_path / "archive.tar", tmp_path / "disk.qcow2"
    create(image, MIB, options="data_file=archive.tar")
    archive.write_bytes(bytes(512) + image.read_bytes().ljust(MIB, b"\0"))
    spec = ImageSpec(str(archive), "qcow2", read_only=True, file=ImageSpec(str(archive), "raw", offset=512))
    with pytest.raises(ImageError, match="it is the image itself"):
        await open_image(spec)
