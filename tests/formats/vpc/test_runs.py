"""``iter_runs`` tells what ``lookup`` tells."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest.mock import patch

import pytest

from nbdserve.errors import RequestError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.vpc import runs
from nbdserve.formats.vpc.driver import VpcDriver
from tests.formats.vpc.files import make, open_driver, qemu_io, scribble, stock

SIZE = 10_514_432


async def mapping(driver: VpcDriver, start: int, end: int) -> list[tuple[int, int, int, int]]:
    """Runs of ``[start, end)``, checked to be contiguous."""
    found: list[tuple[int, int, int, int]] = []
    position = start
    async for piece in driver.iter_runs(start, end):
        columns = (piece.start, piece.length, piece.kind, piece.host_offset)
        for run in zip(*(column.tolist() for column in columns), strict=True):
            assert run[0] == position
            assert run[1] > 0
            position += run[1]
            found.append(run)
    assert position == end
    return found


async def looked_up(driver: VpcDriver, start: int, end: int) -> dict[int, tuple[int, int]]:
    """Kind and host offset of every sector."""
    found = {}
    while start < end:
        run = driver.lookup(start, end - start)
        if run is None:
            await driver.load(start)
            continue
        kind, length, host_offset = run
        for at in range(0, length, 512):
            found[start + at] = kind, host_offset + at if kind == DATA else -1
        start += length
    return found


@pytest.mark.parametrize(("start", "end"), [(0, SIZE), (512, SIZE), (2 << 20, (4 << 20) + 512), (5120, 10240)])
@pytest.mark.parametrize("kind", ["dynamic", "differencing", "small blocks"])
async def test_as_lookup(tmp_path: Path, kind: str, start: int, end: int) -> None:
    parent = await make(tmp_path / "parent.vhd", SIZE)
    path = tmp_path / "a.vhd"
    if kind == "dynamic":
        await make(path, SIZE)
    else:
        await make(path, SIZE, parent, block_size="4k" if kind == "small blocks" else "2M")
    await scribble(path, bytearray(SIZE), 3, 8)
    for batch, bits in ((1 << 16, 1 << 14), (3, 96)):
        driver = await open_driver(path, read_only=True)
        with (
            patch.object(runs, "_BLOCKS", batch),
            patch.object(runs, "_BITMAP_BYTES", 512 * batch),
            patch.object(runs, "_BYTES", bits),
        ):
            found = await mapping(driver, start, end)
        sectors = {
            at: (kind_, host_offset + at - begin if kind_ == DATA else -1)
            for begin, length, kind_, host_offset in found
            for at in range(begin, begin + length, 512)
        }
        assert sectors == await looked_up(driver, start, end)
        assert {kind_ for kind_, _ in sectors.values()} <= {DATA, UNALLOCATED}
        await driver.close()


async def test_bits_in_memory_count(tmp_path: Path) -> None:
    parent = await make(tmp_path / "parent.vhd", SIZE)
    driver = await open_driver(await make(tmp_path / "a.vhd", SIZE, parent))
    await driver.prepare(4096, 1024)
    allocation = driver.allocate(4096, 1024)
    assert allocation is not None
    driver.publish(allocation)
    assert [run[:3] for run in await mapping(driver, 0, SIZE)] == [
        (0, 4096, UNALLOCATED), (4096, 1024, DATA), (5120, SIZE - 5120, UNALLOCATED),
    ]  # fmt: skip
    await driver.close()


async def test_an_empty_range(tmp_path: Path) -> None:
    driver = await open_driver(stock(tmp_path / "a.vhd", SIZE), read_only=True)
    assert await mapping(driver, 512, 512) == []
    await driver.close()


async def test_a_bad_entry(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vhd", SIZE)
    qemu_io(path, "write 0 512")
    data = bytearray(path.read_bytes())
    data[1536 + 4 : 1536 + 8] = b"\0\x10\0\0"
    path.write_bytes(data)
    driver = await open_driver(path, read_only=True)
    await mapping(driver, 0, 2 << 20)
    with pytest.raises(RequestError, match="block 1"):
        await mapping(driver, 0, SIZE)
    await driver.close()


async def test_the_loop_runs_meanwhile(tmp_path: Path) -> None:
    driver = await open_driver(await make(tmp_path / "a.vhd", SIZE, block_size="4k"), read_only=True)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(count())
    with patch.object(runs, "_BLOCKS", 10):
        await mapping(driver, 0, SIZE)
    task.cancel()
    assert turns > 100
    await driver.close()
