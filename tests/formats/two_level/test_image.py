"""What is below the mapping of QED and qcow: tables, space at the end of the file, closing."""

from __future__ import annotations

import asyncio
import errno
from typing import Literal

import pytest

from nbdserve.errors import CorruptImageError, ImageError, RequestError
from nbdserve.formats.qed.driver import QedDriver
from nbdserve.formats.two_level.driver import TwoLevelDriver
from nbdserve.formats.two_level.image import GROWTH_MAX
from nbdserve.units import KIB, MIB
from tests.formats.two_level.disks import LARGE, SHAPES, Shape, top
from tests.support.recording import ByteStorage


@pytest.mark.parametrize("shape", LARGE, ids=str)
async def test_the_file_ends_with_its_last_cluster_when_closed_and_contains_it_whole_before(shape: Shape) -> None:
    storage = await shape.made()
    node = await shape.opened(storage)
    cluster = node.top.cluster_size
    await node.write(cluster, b"x")
    await node.flush()
    run = node.top.lookup(cluster, 1)
    assert run is not None
    assert storage.size >= run[2] + cluster
    await node.close()
    geometry = top(node).geometry
    assert storage.size <= run[2] + cluster + geometry.table_clusters * cluster
    assert storage.size % cluster == 0


async def test_an_image_that_was_only_read_is_not_changed() -> None:
    for shape in SHAPES:
        storage = await shape.made()
        before = bytes(storage.content)
        node = await shape.opened(storage)
        await node.read(0, shape.size)
        await node.flush()
        await node.close()
        assert storage.content == before


async def test_growth_is_bounded_and_follows_the_file() -> None:
    shape = Shape("qed", QedDriver, 1 << 40, {"cluster_size": "1M"})
    storage = await shape.made()
    node = await shape.opened(storage)
    await node.write(0, b"x")
    assert storage.size <= 16 * MIB
    driver = top(node)
    await driver._grow(1 << 27)
    assert (1 << 27) < storage.size <= (1 << 27) + GROWTH_MAX + MIB
    await node.close()
    assert storage.size <= 12 * MIB


async def test_two_loads_of_a_slice_share_it_and_a_dropped_slice_comes_back() -> None:
    shape = Shape("qed", QedDriver, 1 << 36, {"cluster_size": "4k", "table_size": "16"})
    storage = await shape.made()
    node = await shape.opened(storage)
    driver = top(node)
    coverage = 1 << driver.geometry.slice_shift
    for number in range(20):
        await node.write(number * coverage, bytes([number + 1]))
    await node.flush()
    driver.cache._generation = 4
    for number in list(range(20)) * 2:
        first, second = await asyncio.gather(node.read(number * coverage, 1), node.read(number * coverage, 2))
        assert (first[0], second[0]) == (number + 1, number + 1)
    await node.close()


@pytest.mark.parametrize("shape", [shape for shape in LARGE if shape.driver is QedDriver], ids=str)
async def test_a_large_table_is_read_in_slices(shape: Shape) -> None:
    node = await shape.opened(await shape.made())
    driver = top(node)
    assert driver.geometry.slice_bytes <= 64 * KIB
    await node.write(0, b"x")
    last = shape.size - 512
    await node.write(last, b"y" * 512)
    assert await node.read(last, 512) == b"y" * 512
    await node.close()
    tables = {table.l1_index for table in driver.cache.recent.values()}
    assert tables == {0, last >> driver.geometry.slice_shift}


async def test_an_l2_table_is_zeroed_where_the_file_had_junk() -> None:
    """A tail that is no whole cluster is no part of a QED image, and QEMU leaves its bytes there."""
    shape = Shape("qed", QedDriver, 8 * MIB, {"cluster_size": "64k", "table_size": "2"})
    storage = await shape.made()
    storage.content += b"\xff" * 5000
    node = await shape.opened(storage)
    await node.write(0, b"x" * 100)
    assert await node.read(0, 70000) == b"x" * 100 + bytes(69900)
    await node.close()
    assert (await (await shape.opened(storage, read_only=True)).top.check()).corruptions == 0


async def test_an_l1_entry_that_leads_astray() -> None:
    for shape in LARGE:
        storage = await shape.made()
        driver = await shape.driver.open(ByteStorage(storage.content), {}, read_only=True)
        assert isinstance(driver, TwoLevelDriver)
        at = driver.l1.host_offset
        byteorder: Literal["little", "big"] = "little" if shape.driver is QedDriver else "big"
        storage.content[at : at + 8] = (at + 1).to_bytes(8, byteorder)
        node = await shape.opened(storage)
        with pytest.raises(RequestError, match="invalid L1 entry"):
            await node.read(0, 1)
        with pytest.raises(RequestError, match="invalid L1 entry"):
            await node.write(0, b"x")
        await node.close()


async def test_tables_that_overlap_are_read_and_not_written() -> None:
    shape = LARGE[0]
    storage = await shape.made()
    node = await shape.opened(storage)
    await node.write(0, b"a" * 4096)
    at, table = top(node).l1.host_offset, top(node).l1.entries[0]
    await node.close()
    storage.content[at + 8 : at + 16] = table.to_bytes(8, "little")
    reader = await shape.opened(storage, read_only=True)
    assert await reader.read(2 << 20, 4096) == b"a" * 4096
    with pytest.raises(CorruptImageError, match="overlaps another"):
        await shape.opened(storage)


async def test_a_file_that_is_open_read_only_is_not_opened_to_be_written() -> None:
    for shape in SHAPES:
        storage = await shape.made()
        storage.read_only = True
        with pytest.raises(ImageError, match="open read-only"):
            await shape.opened(storage)


async def test_nothing_is_changed_after_a_repair() -> None:
    for shape in LARGE:
        node = await shape.opened(await shape.made())
        await node.write(0, b"x")
        await node.top.check(repair_leaks=True, repair_errors=True)
        with pytest.raises(RequestError, match="open it anew"):
            await node.write(0, b"y")
        assert await node.read(0, 1) == b"x"


async def test_no_room_for_writes_is_no_matter_to_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in LARGE:
        storage = await shape.made()
        node = await shape.opened(storage)
        await node.write(0, b"x")
        await node.close()
        node = await shape.opened(storage)

        async def full(size: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(storage, "truncate", full)
        assert node.top.lookup_writable(shape.size - 512, 512) is not None or node.top.allocate(0, 1) is None
        with pytest.raises(OSError, match="full"):
            await node.write(shape.size - 512, b"y" * 512)
        assert await node.read(0, 1) == b"x"
        assert await node.read(shape.size - 512, 512) == bytes(512)
        await node.write(0, b"z")
        monkeypatch.undo()
        await node.write(shape.size - 512, b"y" * 512)
        await node.close()


async def test_a_block_device_that_is_full() -> None:
    shape = LARGE[0]
    storage = await shape.made()
    storage.grows_zeroed = False
    node = await shape.opened(storage)
    with pytest.raises(OSError, match="cannot grow"):
        await node.write(0, b"x")
