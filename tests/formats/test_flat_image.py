"""One-level maps through the engine, with blocks of any size: the smallest format there can be."""

from __future__ import annotations

import errno
import random
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pytest

from nbdserve.block.node import Node
from nbdserve.block.pieces import zero_pieces
from nbdserve.block.writer import WRITE_DONE, WRITE_WAIT
from nbdserve.errors import CorruptImageError, RequestError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.append_space import AppendSpace
from nbdserve.formats.base import CheckResult, ImageInfo
from nbdserve.formats.flat_image import FlatImage, copy_unit
from nbdserve.formats.flat_map import PAGE_WORDS, FlatMap
from nbdserve.formats.tables import AnyWords
from nbdserve.storage.base import Storage
from nbdserve.storage.memory import MemoryStorage
from tests.formats import flat
from tests.support.workload import read_all

DATA_AT = 1 << 20


class Tiny(FlatImage):
    """The map is the start of the file, the data is at 1 MiB; a word is 1 + the number of a unit, 0: none."""

    name = "tiny"

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        driver = cls(storage, options["size"], options["block"])
        count = -(-driver.size // driver.cluster_size)
        end = max(DATA_AT, storage.size)
        block = driver.cluster_size
        driver._set_map(FlatMap(storage, 0, count), base=DATA_AT - block, scale=block, low=1, host_limit=end)
        if not read_only:
            driver._set_writable(AppendSpace(storage, block, end))
        return driver

    def info(self) -> ImageInfo:
        return ImageInfo("tiny", self.size)

    async def _check_file(self, *, repair_leaks: bool, repair_errors: bool) -> CheckResult:
        return CheckResult(allocated_clusters=(await self.scan()).allocated)

    def _kind(self, word: int) -> int:
        return -1 if word else UNALLOCATED

    def _kinds(self, words: AnyWords) -> npt.NDArray[np.uint8]:
        return np.where(words == 0, np.uint8(UNALLOCATED), np.uint8(DATA))


async def _tiny(block: int, size: int, storage: Storage | None = None, *, read_only: bool = False) -> Tiny:
    storage = storage or MemoryStorage(size=DATA_AT)
    return await Tiny.open(storage, {"block": block, "size": size}, read_only=read_only)


@pytest.mark.parametrize("block", [512, 1536, 4096, 32256])
async def test_random_changes_on_the_driver(block: int) -> None:
    driver = await _tiny(block, 300_000)
    model = bytearray(300_000)
    await flat.random_changes(driver, model, 200, seed=block)
    assert await flat.read(driver, 0, 300_000) == model
    await flat.agrees(driver)
    await driver.flush()
    again = await _tiny(block, 300_000, driver.storage, read_only=True)
    assert await flat.read(again, 0, 300_000) == model


@pytest.mark.parametrize("block", [512, 1536, 4096, 32256])
async def test_random_changes_through_the_engine(block: int) -> None:
    """Single writes, and several at once by way of the batches, where those can be used."""
    size = 400_000 - 400_000 % 512
    driver = await _tiny(block, size)
    node = Node([driver], unmap=True)
    rng, model = random.Random(block), bytearray(size)
    for number in range(300):
        offset, length = rng.randrange(size), rng.choice((1, 100, 512, 5000, 70_000))
        length = min(length, size - offset)
        data = bytes([number % 255 + 1]) * length
        done: list[Exception | None] = []
        if number % 3 == 0 or not node.submit_write(offset, memoryview(data), done.append):
            await node.write(offset, memoryview(data))
        model[offset : offset + length] = data
        if number % 40 == 0:
            await node.zero(offset, length, unmap=True)
            model[offset : offset + length] = bytes(length)
        if number % 10 == 0:
            part = bytearray(length)
            zero_pieces(memoryview(part), await node.read_pieces(offset, memoryview(part)))
            assert part == model[offset : offset + length]
        assert done in ([], [None])
    assert await read_all(node, size) == model
    await node.flush()
    again = await _tiny(block, size, driver.storage, read_only=True)
    assert await flat.read(again, 0, size) == model


async def test_blocks_that_are_no_power_of_two_are_not_allocated_by_who_rounds_with_masks() -> None:
    driver = await _tiny(1536, 300_000)
    node = Node([driver])
    for _ in range(2):
        await driver.load(0)
        assert node.submit_write(2000, memoryview(b"x" * 100), lambda error: None) == WRITE_WAIT
    await node.write(2000, b"x" * 100)
    assert node.submit_write(2050, memoryview(b"y" * 100), lambda error: None) == WRITE_DONE
    assert await node.read(0, 4000) == bytes(2000) + b"x" * 50 + b"y" * 100 + bytes(1850)


async def test_runs_over_several_pages() -> None:
    size = (2 * PAGE_WORDS + 7) * 512
    driver = await _tiny(512, size)
    for at in (PAGE_WORDS * 512 - 1024, 2 * PAGE_WORDS * 512 - 512):
        await flat.write(driver, at, b"x" * 2048)
    await flat.agrees(driver)
    assert [run[1] for run in await flat.mapping(driver)] == [
        PAGE_WORDS * 512 - 1024,
        2048,
        PAGE_WORDS * 512 - 1536,
        2048,
        7 * 512 - 1536,
    ]


async def test_new_units_are_zeroed_only_where_nothing_was() -> None:
    driver = await _tiny(4096, 100_000, MemoryStorage(size=DATA_AT))
    await driver.prepare(0, 1)
    allocation = driver.allocate(0, 10_000)
    assert allocation is not None
    assert (allocation.length, allocation.host_offset, allocation.zeroed) == (10_000, DATA_AT, True)
    driver.abandon(allocation)
    await driver.flush()
    again = driver.allocate(4096, 4096)
    assert again is not None
    assert (again.host_offset, again.zeroed) == (DATA_AT, False)


async def test_invalid_words() -> None:
    driver = await _tiny(4096, 100_000)
    await driver.map.set(3, 1)
    with pytest.raises(RequestError, match="invalid map entry 0x1 for guest offset 0x3000") as caught:
        driver.lookup(3 * 4096, 1)
    assert caught.value.errno == errno.EIO
    assert driver.lookup(0, 100_000) == (UNALLOCATED, 3 * 4096, -1)


async def test_a_stopped_image_is_written_no_more() -> None:
    driver = await _tiny(4096, 100_000)
    await flat.write(driver, 0, b"x")
    driver._stop_writing("stop")
    for offset in (0, 8192):
        with pytest.raises(RequestError, match="stop"):
            driver.lookup_writable(offset, 1)
    with pytest.raises(RequestError, match="stop"):
        driver.allocate(8192, 1)


async def test_what_is_on_disk_is_read_when_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = await _tiny(512, 2 * PAGE_WORDS * 512)
    await flat.write(driver, 0, b"x")

    async def full(pieces: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(driver.storage, "write_stable", full)
    monkeypatch.setattr(driver.map.cache, "_generation", 0)
    with pytest.raises(OSError, match="full"):
        await driver.load(0)  # is in memory already: it is for a writer, and too much waits for a commit
    assert await flat.read(driver, PAGE_WORDS * 512, 512) == bytes(512)


async def test_a_repair_is_the_end_of_writing() -> None:
    driver = await _tiny(4096, 100_000)
    await flat.write(driver, 5000, b"x")
    assert (await driver.check()).allocated_clusters == 1
    await flat.write(driver, 5001, b"y")
    assert (await driver.check(repair_leaks=True)).allocated_clusters == 1
    with pytest.raises(RequestError, match="open it anew"):
        await flat.write(driver, 5002, b"z")


@pytest.mark.parametrize(
    ("words", "field", "text"),
    [
        ([1, 0, 1], "blocks with a place of their own", "1 blocks share their place .* first that at guest offset 0x2"),
        ([0, 1, 9], "blocks inside the file", "1 blocks are outside the file, first that at guest offset 0x2"),
    ],
)
async def test_what_is_unsound_is_not_written(words: list[int], field: str, text: str) -> None:
    storage = MemoryStorage(np.array(words, "<u4").tobytes(), size=DATA_AT + 4096)
    driver = await _tiny(4096, 12288, storage, read_only=True)
    with pytest.raises(CorruptImageError, match=text) as caught:
        await driver._sound_scan()
    assert caught.value.field == field
    assert "image check -r all" in str(caught.value)


async def test_copying_more_than_is_read_at_once() -> None:
    content = random.Random(1).randbytes(5 << 19)
    storage = MemoryStorage(content, size=8 << 20)
    await copy_unit(storage, 0, 3 << 20, len(content))
    assert await storage.read(3 << 20, 3 << 20) == content.ljust(3 << 20, b"\0")
