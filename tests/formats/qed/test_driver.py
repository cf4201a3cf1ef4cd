"""QED: need_check, clusters that read as zeroes, growing, and what QEMU says of the result."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_DONE, WRITE_WAIT
from nbdserve.errors import ConfigError, CorruptImageError, ImageError, RequestError
from nbdserve.extents import UNALLOCATED, ZERO
from nbdserve.formats.base import BackingReference
from nbdserve.formats.qed import layout
from nbdserve.formats.qed.driver import QedDriver, read_header
from nbdserve.formats.raw import RawDriver
from nbdserve.units import KIB, MIB
from tests.support import images
from tests.support.recording import ByteStorage, Change, Recorder

CLUSTER = 4 * KIB
SIZE = 4 * MIB
OPTIONS = {"cluster_size": "4k", "table_size": "2"}


async def made(size: int = SIZE, **options: str) -> ByteStorage:
    storage = ByteStorage(path="x.qed")
    await QedDriver.create(storage, size, OPTIONS | options)
    return storage


async def opened(storage: ByteStorage, *, base: bytes | None = None, read_only: bool = False) -> Node:
    layers = [await QedDriver.open(storage, {"has_backing": base is not None}, read_only=read_only)]
    if base is None:
        return Node(layers, unmap=True)
    raw = await RawDriver.open(ByteStorage(base, read_only=True), {}, read_only=True)
    return Node([*layers, raw], unmap=True)


def features(storage: ByteStorage) -> int:
    return int.from_bytes(storage.content[16:24], "little")


# --- need_check ------------------------------------------------------------------------------------------------------


async def test_need_check_is_set_before_the_first_allocation_and_cleared_at_close() -> None:
    storage = await made()
    node = await opened(storage)
    assert features(storage) == 0
    assert not node.top.info().dirty
    await node.write(0, b"x")
    assert features(storage) == layout.FEATURE_NEED_CHECK
    assert node.top.info().dirty
    await node.flush()
    assert features(storage) == layout.FEATURE_NEED_CHECK
    await node.close()
    assert features(storage) == 0


async def test_writing_in_place_does_not_need_a_check() -> None:
    storage = await made()
    node = await opened(storage)
    await node.write(0, b"x")
    await node.close()
    node = await opened(storage)
    await node.write(10, b"y")
    await node.flush()
    assert features(storage) == 0
    await node.close()


async def unclosed(*, leaks: int = 0, size: int = SIZE) -> ByteStorage:
    """An image whose writer vanished after a flush, with so many clusters that nothing refers to."""
    storage = await made(size)
    node = await opened(storage)
    await node.write(0, b"a" * CLUSTER)
    await node.write(1 << 20, b"b" * CLUSTER)
    await node.flush()
    driver = node.top
    for number in range(leaks):
        assert driver.allocate((2 << 20) + number * CLUSTER, CLUSTER) is not None
    await node.write(3 << 20, b"c" * CLUSTER)
    await node.flush()
    return ByteStorage(storage.content, path="x.qed")


async def test_leaks_of_an_image_that_was_not_closed_are_used_and_cut_off() -> None:
    storage = await unclosed(leaks=3)
    assert features(storage) == layout.FEATURE_NEED_CHECK
    before = bytes(storage.content)
    assert (await (await opened(storage, read_only=True)).top.check()).leaks > 3
    node = await opened(storage)
    assert storage.content == before
    result = await node.top.check()
    end = result.image_end_offset
    assert (result.leaks, result.corruptions) == (3, 0)
    await node.write(2 << 20, b"d" * 2 * CLUSTER)
    await node.flush()
    assert (await node.top.check()).image_end_offset == end
    assert features(storage) == layout.FEATURE_NEED_CHECK
    await node.close()
    assert features(storage) == 0
    node = await opened(ByteStorage(storage.content), read_only=True)
    result = await node.top.check()
    assert (result.leaks, result.corruptions) == (0, 0)
    assert await node.read(2 << 20, 3 * CLUSTER) == b"d" * 2 * CLUSTER + bytes(CLUSTER)
    for place, byte in ((0, b"a"), (1 << 20, b"b"), (3 << 20, b"c")):
        assert await node.read(place, CLUSTER) == byte * CLUSTER


async def test_an_image_that_was_not_closed_is_cleaned_even_if_nothing_is_written() -> None:
    storage = await unclosed(leaks=2)
    await (await opened(storage)).close()
    assert features(storage) == 0
    assert (await (await opened(storage, read_only=True)).top.check()).leaks == 0


async def test_errors_of_an_image_that_was_not_closed_are_repaired() -> None:
    storage = await unclosed()
    driver = (await opened(storage, read_only=True)).top
    await driver.load(0)
    l2_offset = driver.slice_offset(0)  # type: ignore[attr-defined]
    storage.content[l2_offset + 8 : l2_offset + 16] = (1 << 40).to_bytes(8, "little")
    node = await opened(storage)
    assert await node.read(0, 2 * CLUSTER) == b"a" * CLUSTER + bytes(CLUSTER)
    await node.write(CLUSTER, b"e" * CLUSTER)
    await node.close()
    result = await (await opened(storage, read_only=True)).top.check()
    assert (result.leaks, result.corruptions) == (0, 0)


async def test_reading_an_image_that_was_not_closed_changes_nothing() -> None:
    storage = await unclosed()
    before = bytes(storage.content)
    node = await opened(storage, read_only=True)
    assert node.top.info().dirty
    assert await node.read(0, CLUSTER) == b"a" * CLUSTER
    await node.close()
    assert storage.content == before


async def test_an_image_that_cannot_be_repaired_is_not_written() -> None:
    storage = await unclosed(size=2 * SIZE)
    header, _ = await read_header(storage)
    at = header.l1_table_offset
    storage.content[at + 8 : at + 16] = storage.content[at : at + 8]  # one L2 table twice
    before = bytes(storage.content)
    with pytest.raises(CorruptImageError, match="errors remain"):
        await opened(storage)
    assert storage.content == before
    assert await (await opened(storage, read_only=True)).read(0, 1) == b"a"


@images.needs_qemu
async def test_qemu_opens_what_was_not_closed(tmp_path: Path) -> None:
    path = tmp_path / "x.qed"
    path.write_bytes((await unclosed()).content)
    images.qemu_io(path, "qed", [f"read -P 0x61 0 {CLUSTER}", f"write -P 1 2M {CLUSTER}"])
    node = await opened(ByteStorage(path.read_bytes()))
    assert await node.read(2 << 20, CLUSTER) == b"\1" * CLUSTER
    assert await node.read(0, CLUSTER) == b"a" * CLUSTER


async def test_unknown_autoclear_features_are_cleared_before_the_first_write() -> None:
    for in_place in (False, True):
        storage = await made()
        node = await opened(storage)
        await node.write(0, b"x")
        await node.close()
        storage.content[32:40] = (1 << 40).to_bytes(8, "little")
        await (await opened(storage, read_only=True)).close()
        node = await opened(storage)
        assert await node.read(0, 1) == b"x"
        assert storage.content[32:40] != bytes(8)  # whatever else fails to open leaves the image as it is
        assert node.submit_write(0, memoryview(b"y"), lambda error: None) == WRITE_WAIT
        await node.write(0 if in_place else SIZE // 2, b"y")
        assert storage.content[32:40] == bytes(8)
        assert node.submit_write(0, memoryview(b"z"), lambda error: None) == WRITE_DONE
        await node.close()
        assert storage.content[32:40] == bytes(8)


# --- zeroes ----------------------------------------------------------------------------------------------------------


async def test_zeroing_over_a_backing_file_writes_nothing_but_the_table() -> None:
    base = b"\xbb" * SIZE
    recorder = Recorder(1)
    storage = recorder.storage((await made(backing_file="base", backing_fmt="raw")).content)
    layers = [
        await QedDriver.open(storage, {}, read_only=False),
        await RawDriver.open(ByteStorage(base, read_only=True), {}, read_only=True),
    ]
    node = Node(layers)
    await node.zero(CLUSTER, 300 * CLUSTER)
    assert await node.read(0, 302 * CLUSTER) == base[:CLUSTER] + bytes(300 * CLUSTER) + base[:CLUSTER]
    await node.close()
    written = sum(entry.length for entry in recorder.log if isinstance(entry, Change) and entry.kind == "write")
    assert written < 16 * KIB
    result = await (await opened(ByteStorage(storage.content), read_only=True)).top.check()
    assert (result.allocated_clusters, result.leaks, result.corruptions) == (300, 0, 0)


async def test_zeroing_data_leaks_nothing() -> None:
    base = b"\xbb" * SIZE
    storage = await made(backing_file="base", backing_fmt="raw")
    node = await opened(storage, base=base)
    await node.write(2 * CLUSTER, b"d" * 3 * CLUSTER)
    await node.zero(0, 8 * CLUSTER, unmap=True)
    assert await node.read(0, 9 * CLUSTER) == bytes(8 * CLUSTER) + base[:CLUSTER]
    assert node.top.zero(2 * CLUSTER, CLUSTER, unmap=True) == 0
    await node.discard(0, 8 * CLUSTER)
    await node.close()
    result = await (await opened(storage, read_only=True)).top.check()
    assert (result.leaks, result.corruptions) == (0, 0)


async def test_space_of_a_failed_write_is_not_taken_for_zeroes() -> None:
    base = b"\xbb" * SIZE
    storage = await made(backing_file="base", backing_fmt="raw")
    node = await opened(storage, base=base)
    await node.write(0, b"x")
    allocation = node.top.allocate(CLUSTER, CLUSTER)
    assert allocation is not None
    await storage.write(allocation.host_offset, b"junk" * 1024)
    node.top.abandon(allocation)
    await node.flush()
    await node.zero(CLUSTER, 3 * CLUSTER)
    assert await node.read(CLUSTER, 4 * CLUSTER) == bytes(3 * CLUSTER) + base[:CLUSTER]
    await node.close()
    assert (await (await opened(storage, read_only=True)).top.check()).leaks == 0


async def test_space_of_a_failed_write_in_the_middle_of_the_file_is_closed() -> None:
    storage = await made()
    node = await opened(storage)
    await node.write(0, b"a" * CLUSTER)
    allocation = node.top.allocate(CLUSTER, CLUSTER)
    assert allocation is not None
    await node.write(2 * CLUSTER, b"b" * CLUSTER)
    node.top.abandon(allocation)
    await node.flush()
    await node.close()
    assert features(storage) == 0
    node = await opened(ByteStorage(storage.content), read_only=True)
    assert (await node.top.check()).leaks == 0
    assert await node.read(0, 3 * CLUSTER) == b"a" * CLUSTER + bytes(CLUSTER) + b"b" * CLUSTER


@images.needs_qemu
async def test_qemu_writes_a_part_of_what_we_zeroed(tmp_path: Path) -> None:
    """QEMU would fill the rest of a zero cluster from the backing file."""
    (tmp_path / "base").write_bytes(b"\xbb" * SIZE)
    storage = await made(backing_file="base", backing_fmt="raw")
    node = await opened(storage, base=b"\xbb" * SIZE)
    await node.zero(0, 4 * CLUSTER)
    await node.close()
    path = tmp_path / "x.qed"
    path.write_bytes(storage.content)
    images.qemu_io(path, "qed", ["write -P 7 512 512", f"read -P 0 1024 {4 * CLUSTER - 1024}", "read -P 0 0 512"])


@images.needs_qemu
async def test_zero_clusters_of_qemu_are_read_and_written_in_part(tmp_path: Path) -> None:
    base = b"\xbb" * SIZE
    (tmp_path / "base").write_bytes(base)
    path = tmp_path / "x.qed"
    images.create(path, SIZE, fmt="qed", options="cluster_size=4k,table_size=2", backing=("base", "raw"))
    images.qemu_io(path, "qed", [f"write -z {CLUSTER} {4 * CLUSTER}"])
    storage = ByteStorage(path.read_bytes())
    node = await opened(storage, base=base)
    assert node.top.lookup(2 * CLUSTER, 9 * CLUSTER) is None
    assert await node.read(0, 6 * CLUSTER) == base[:CLUSTER] + bytes(4 * CLUSTER) + base[:CLUSTER]
    assert node.top.lookup(2 * CLUSTER, 9 * CLUSTER) == (ZERO, 3 * CLUSTER, -1)
    [runs] = [runs async for runs in node.top.iter_runs(0, SIZE)]
    assert runs.kind.tolist() == [UNALLOCATED, ZERO, UNALLOCATED]
    assert node.top.zero(CLUSTER, 4 * CLUSTER, unmap=False) is None  # the header is marked first
    await node.write(2 * CLUSTER + 10, b"part")
    assert node.top.zero(CLUSTER, 4 * CLUSTER, unmap=False) == CLUSTER
    assert await node.read(2 * CLUSTER, CLUSTER) == bytes(10) + b"part" + bytes(CLUSTER - 14)
    await node.close()


async def test_without_a_backing_file_zeroing_needs_nothing() -> None:
    storage = await made()
    before = bytes(storage.content)
    node = await opened(storage)
    await node.zero(0, SIZE)
    assert node.top.lookup(0, SIZE) == (UNALLOCATED, min(SIZE, 1024 * CLUSTER), -1)
    await node.close()
    assert storage.content == before


async def test_zeroing_what_is_corrupt_is_an_error() -> None:
    for base in (None, b"\xbb" * SIZE):
        storage = await made(**({} if base is None else {"backing_file": "base", "backing_fmt": "raw"}))
        node = await opened(storage, base=base)
        await node.write(0, b"x" * CLUSTER)
        l2_offset = node.top.slice_offset(0)  # type: ignore[attr-defined]
        await node.close()
        storage.content[l2_offset + 8 : l2_offset + 16] = (12345).to_bytes(8, "little")
        node = await opened(storage, base=base)
        with pytest.raises(RequestError, match="corrupt"):
            await node.zero(0, 4 * CLUSTER)


# --- size ------------------------------------------------------------------------------------------------------------


@images.needs_qemu
async def test_growing(tmp_path: Path) -> None:
    storage = await made(MIB + 512)
    node = await opened(storage)
    await node.write(MIB, b"x" * 512)
    driver = node.top
    await driver.resize(SIZE)
    assert driver.size == SIZE
    node = Node([driver])
    assert await node.read(MIB, 8192) == b"x" * 512 + bytes(7680)
    await node.write(SIZE - 512, b"y" * 512)
    await node.close()
    path = tmp_path / "x.qed"
    path.write_bytes(storage.content)
    images.check(path, "qed")
    expected = bytearray(SIZE)
    expected[MIB : MIB + 512], expected[-512:] = b"x" * 512, b"y" * 512
    assert images.raw_content(path, "qed", tmp_path) == expected


async def test_sizes_it_cannot_have() -> None:
    driver = (await opened(await made(MIB))).top
    for size in (MIB - 512, MIB + 1, (1 << 63) - 512):
        with pytest.raises(ConfigError, match="multiple of 512 from"):
            await driver.resize(size)


@images.needs_qemu
async def test_a_longer_backing_file_does_not_show_where_the_disk_grew(tmp_path: Path) -> None:
    base = b"\xbb" * SIZE
    storage = await made(MIB, backing_file="base", backing_fmt="raw")
    driver = (await opened(storage, base=base)).top
    await driver.resize(MIB + 512)
    await driver.resize(2 * MIB)
    await driver.close()
    expected = base[:MIB] + bytes(MIB)
    assert await (await opened(storage, base=base)).read(0, 2 * MIB) == expected
    (tmp_path / "base").write_bytes(base)
    path = tmp_path / "x.qed"
    path.write_bytes(storage.content)
    images.check(path, "qed")
    assert images.raw_content(path, "qed", tmp_path) == expected


async def test_growing_with_junk_where_the_file_ends() -> None:
    base = b"\xbb" * SIZE
    storage = await made(MIB, backing_file="base", backing_fmt="raw")
    node = await opened(storage, base=base)
    await node.write(0, b"x")
    allocation = node.top.allocate(CLUSTER, 3 * CLUSTER)
    assert allocation is not None
    await storage.write(allocation.host_offset, b"junk" * 3072)
    node.top.abandon(allocation)
    await node.top.resize(MIB + 8 * CLUSTER)
    node = Node(node.layers)
    assert await node.read(MIB, 8 * CLUSTER) == bytes(8 * CLUSTER)
    await node.close()
    assert (await (await opened(storage, read_only=True)).top.check()).leaks == 0


async def test_a_cluster_that_the_backing_file_shows_in_part_is_written_before_the_disk_grows() -> None:
    base = b"\xbb" * SIZE
    node = await opened(await made(MIB + 512, backing_file="base", backing_fmt="raw"), base=base)
    with pytest.raises(ConfigError, match="last 512 bytes are those of the backing file"):
        await node.top.resize(2 * MIB)
    assert node.top.size == MIB + 512
    await node.write(MIB, base[:512])
    await node.top.resize(2 * MIB)
    assert await Node(node.layers).read(MIB - 512, 2048) == base[:1024] + bytes(1024)
    await node.close()


async def test_what_is_past_the_end_of_the_disk_does_not_show_where_it_grows() -> None:
    storage = await made(SIZE)
    node = await opened(storage)
    await node.write(SIZE - 2 * CLUSTER, b"x" * 2 * CLUSTER)
    await node.close()
    smaller = SIZE - 2 * CLUSTER + 512
    storage.content[layout.IMAGE_SIZE_AT : layout.IMAGE_SIZE_AT + 8] = smaller.to_bytes(8, "little")
    driver = (await opened(storage)).top
    await driver.resize(SIZE)
    assert await Node([driver]).read(smaller - 512, 2 * CLUSTER) == b"x" * 512 + bytes(2 * CLUSTER - 512)
    await driver.close()


# --- facts, and QEMU -------------------------------------------------------------------------------------------------


async def test_the_backing_file_is_declared_raw_or_not_at_all() -> None:
    raw = (await opened(await made(backing_file="b", backing_fmt="raw"), read_only=True)).top
    assert raw.backing == BackingReference("b", "raw")
    other = (await opened(await made(backing_file="b", backing_fmt="qcow2"), read_only=True)).top
    assert other.backing == BackingReference("b", None)
    assert not other.declares_backing_format


async def test_a_file_that_is_open_read_only() -> None:
    storage = await unclosed()
    storage.read_only = True
    with pytest.raises(ImageError, match="open read-only"):
        await opened(storage)


@images.needs_qemu
@pytest.mark.parametrize("options", ["cluster_size=4k,table_size=2", "table_size=16", "cluster_size=2M,table_size=2"])
async def test_in_turns_with_qemu_io(tmp_path: Path, options: str) -> None:
    path = tmp_path / "x.qed"
    size = 20 * MIB + 512
    images.create(path, size, fmt="qed", options=options)
    rng = random.Random(options)
    content = bytearray(size)
    for _ in range(3):
        images.qemu_io(path, "qed", images.random_qemu_io(rng, size, 15, content))
        storage = ByteStorage(path.read_bytes())
        node = await opened(storage)
        assert await node.read(0, size) == content
        for _ in range(30):
            offset = rng.randrange(size)
            data = rng.randbytes(min(size - offset, rng.choice((1, 4096, 100_000))))
            await node.write(offset, data)
            content[offset : offset + len(data)] = data
        await node.close()
        path.write_bytes(storage.content)
        images.check(path, "qed")
        assert images.raw_content(path, "qed", tmp_path) == content


async def test_the_header_s_sector_is_all_that_patches_touch() -> None:
    storage = await made()
    storage.content[100:512] = b"\x5a" * 412
    header, sector = await read_header(storage)
    assert dataclasses.replace(header) == header
    assert len(sector) == 512
    node = await opened(storage)
    await node.write(0, b"x")
    await node.close()
    assert storage.content[100:512] == b"\x5a" * 412
