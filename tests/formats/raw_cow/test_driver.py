from __future__ import annotations

import random

import pytest

from nbdserve.block.node import Node
from nbdserve.errors import CorruptImageError, ImageError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.raw import RawDriver
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.formats.raw_cow.header import read_header
from nbdserve.formats.raw_cow.layout import with_checksum
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.formats.raw_cow.engine import Files, KeptStorage
from tests.support.model import ModelDisk
from tests.support.workload import Mix, Workload, read_all

BASE = random.Random(5).randbytes(MIB)


async def rows(driver: RawCowDriver, start: int, end: int) -> list[tuple[int, int, int, int]]:
    return [
        row
        async for runs in driver.iter_runs(start, end)
        for row in zip(
            runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), runs.host_offset.tolist(), strict=True
        )
    ]


async def test_a_write_goes_to_the_raw_file_at_its_own_offset() -> None:
    files = Files(BASE)
    await files.raw.write(0, b"\xee" * MIB)
    await files.create(MIB)
    node = await files.node()
    await node.write(100_000, b"new")
    expected = bytearray(BASE)
    expected[100_000:100_003] = b"new"
    assert await node.read(0, MIB) == expected
    assert await files.raw.read(65536, 65536) == expected[65536:131072], "the cluster was not completed"
    assert await files.raw.read(0, 65536) == b"\xee" * 65536, "a cluster nobody wrote to has changed"
    await node.close()
    reopened = await files.node(read_only=True)
    assert await reopened.read(0, MIB) == expected
    assert await rows(await files.driver(read_only=True), 0, MIB) == [
        (0, 65536, UNALLOCATED, -1),
        (65536, 65536, DATA, 65536),
        (131072, MIB - 131072, UNALLOCATED, -1),
    ]


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("base_size", [None, 300 * KIB, MIB + 512, 2 * MIB])
@pytest.mark.parametrize("raw_size", [0, 500 * KIB, 3 * MIB])
async def test_a_random_guest(cluster_size: int, base_size: int | None, raw_size: int) -> None:
    """Backing and raw files that are shorter and longer than a disk that ends inside a cluster."""
    size = MIB + 7 * 512
    files = Files(None if base_size is None else (BASE * 2)[:base_size])
    await files.raw.write(0, b"\xee" * raw_size)
    await files.create(size, cluster_size=str(cluster_size))
    model = ModelDisk(size, ((files.base or b"") + bytes(size))[:size])
    for seed in range(3):
        node = await files.node()
        workload = Workload(node, model, random.Random(seed), mix=Mix(largest=100 << 10))
        await workload.run(40)
        await workload.verify()
        await node.close()
        model.resolve(bytes(await read_all(await files.node(read_only=True), size)))
    node = await files.node()
    runs = await rows(await files.driver(), 0, size)
    assert sum(length for _, length, _, _ in runs) == size
    for start, length, kind, host_offset in runs:
        assert node.top.lookup(start, length) == (kind, length, host_offset)
        assert node.top.lookup(start, size - start) == (kind, length, host_offset)
    assert files.raw.size == max(size, raw_size), "nothing is written past the end of the disk"
    assert await files.raw.read(size, 3 * MIB) == (b"\xee" * max(0, raw_size - size)).ljust(3 * MIB, b"\0")
    result = await node.top.check()
    assert (result.leaks, result.corruptions) == (0, 0)


@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_when_every_bit_is_set_the_raw_file_stands_alone(cluster_size: int) -> None:
    files = Files(BASE)
    await files.create(MIB, cluster_size=str(cluster_size))
    node = await files.node()
    specific = node.top.info().specific
    assert (specific["raw-file"], specific["raw-file-stands-alone"]) == ("vm.img", False)
    assert "advice" not in specific
    for offset in range(0, MIB, cluster_size):
        await node.write(offset, b"x")
    content = await node.read(0, MIB)
    await node.close()
    driver = await files.driver(read_only=True)
    specific = driver.info().specific
    assert specific["raw-file-stands-alone"] is True
    assert "vm.img is the whole disk" in specific["advice"]
    assert driver.lookup(100, MIB - 100) == (DATA, MIB - 100, 100)
    assert await files.raw.read(0, files.raw.size) == content


async def test_bits_follow_the_data_they_show() -> None:
    """Data, flush, bits, flush; and nothing of it before the guest flushes."""
    calls: list[str] = []

    class Watched(KeptStorage):
        def __init__(self, name: str) -> None:
            super().__init__(path=name)

        async def write(self, offset: int, data: ReadBuffer) -> None:
            calls.append(f"{self.path} {offset:#x}")
            await super().write(offset, data)

        async def flush(self) -> None:
            calls.append(f"{self.path} flush")

    files = Files(BASE, Watched("bits"), Watched("raw"))
    await files.create(MIB)
    node = await files.node()
    calls.clear()
    await node.write(0, b"x" * 65536)
    await node.write(0, b"y" * 512)
    assert calls == ["raw 0x0", "raw 0x0"]
    calls.clear()
    await node.flush()
    assert calls == ["raw flush", "bits 0x1000", "bits flush"]
    calls.clear()
    await node.write(512, b"y" * 512)
    await node.flush()
    assert calls == ["raw 0x200", "raw flush"]


async def test_bits_that_could_not_be_written_are_written_by_the_next_flush() -> None:
    class Failing(KeptStorage):
        failures = 0

        async def write(self, offset: int, data: ReadBuffer) -> None:
            if self.failures:
                self.failures -= 1
                raise OSError(28, "no space")
            await super().write(offset, data)

    image = Failing()
    files = Files(BASE, image)
    await files.create(MIB)
    node = await files.node()
    await node.write(0, b"x" * 65536)
    image.failures = 1
    with pytest.raises(OSError, match="no space"):
        await node.flush()
    assert await image.read(4096, 1) == b"\0"
    await node.flush()
    assert await image.read(4096, 1) == b"\1"


async def test_a_failed_write_shows_nothing() -> None:
    class Failing(KeptStorage):
        broken = False

        async def write(self, offset: int, data: ReadBuffer) -> None:
            await super().write(offset, data[:100])
            if self.broken:
                raise OSError(5, "broken")

    raw = Failing()
    files = Files(BASE, raw=raw)
    await files.create(MIB)
    node = await files.node()
    raw.broken = True
    with pytest.raises(OSError, match="broken"):
        await node.write(0, b"x" * 65536)
    assert await node.read(0, MIB) == BASE


async def test_a_read_only_open_changes_nothing() -> None:
    files = Files(None)
    await files.create(MIB)
    await files.raw.truncate(1000)
    driver = await files.driver(read_only=True)
    await driver.close()
    assert files.raw.size == 1000
    node = await files.node(read_only=True)
    assert await node.read(0, MIB) == bytes(MIB)
    driver = await files.driver()
    assert files.raw.size == MIB
    await driver.close()


async def test_unknown_autoclear_bits_are_cleared_by_a_writable_open_alone() -> None:
    files = Files(None)
    await files.create(MIB)
    header = bytes(await files.image.read(0, 4096))
    await files.image.write(0, with_checksum(header[:2088] + (5).to_bytes(8, "big") + header[2096:]))
    await (await files.driver(read_only=True)).close()
    assert (await read_header(files.image))[0].autoclear == 5
    await (await files.driver()).close()
    assert (await read_header(files.image))[0].autoclear == 0


async def test_the_raw_file_is_its_companion() -> None:
    files = Files(BASE)
    await files.create(MIB, raw_file="../pool/vm.img")
    companions = await RawCowDriver.companions(files.image)
    assert [(one.name, one.field, one.read_only) for one in companions] == [("../pool/vm.img", "raw file", False)]
    with pytest.raises(ImageError, match="the raw file is not given"):
        await RawCowDriver.open(files.image, {}, read_only=True)


async def test_a_failed_open_changes_nothing() -> None:
    files = Files(BASE)
    await files.create(MIB)
    await files.raw.truncate(0)
    files.image.read_only = True
    with pytest.raises(ImageError, match="read-only"):
        await files.driver()
    assert files.raw.size == 0
    with pytest.raises(CorruptImageError, match="magic"):
        await RawCowDriver.open(KeptStorage(bytes(8192)), {"companions": [files.raw]}, read_only=False)


async def test_closing_releases_both_files() -> None:
    image, raw = MemoryStorage(), MemoryStorage()
    await RawCowDriver.create(image, MIB, {"raw_file": "r"}, companions=[raw])
    driver = await RawCowDriver.open(image, {"companions": [raw]}, read_only=False)
    await driver.close()
    for storage in (image, raw):
        with pytest.raises(OSError, match="closed"):
            await storage.read(0, 1)


async def test_an_image_below_another() -> None:
    files = Files(BASE)
    await files.create(MIB)
    node = await files.node()
    await node.write(0, b"middle")
    await node.close()
    top = Files(None)
    await top.create(MIB)
    layers = [
        await top.driver(),
        await files.driver(read_only=True),
        await RawDriver.open(MemoryStorage(BASE), {}, read_only=True),
    ]
    chain = Node(layers)
    await chain.write(3, b"TOP")
    assert await chain.read(0, MIB) == b"midTOP" + BASE[6:]
