"""What QED and qcow share: the mapping, space at the end of the file, and what a crash or a failure leaves."""

from __future__ import annotations

import random
from typing import Literal

import pytest

from nbdserve.errors import RequestError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.qed.driver import QedDriver
from tests.formats.two_level.disks import LARGE, SHAPES, Shape, top
from tests.support.recording import ByteStorage


@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_what_is_written_is_read_now_and_by_the_next_one(shape: Shape) -> None:
    storage = await shape.made()
    node = await shape.opened(storage)
    rng = random.Random(shape.name)
    content = bytearray(shape.size)
    for _ in range(40):
        offset = rng.randrange(shape.size)
        data = rng.randbytes(min(shape.size - offset, rng.choice((1, 511, 4096, 70000))))
        await node.write(offset, data)
        content[offset : offset + len(data)] = data
        if rng.random() < 0.2:
            await node.flush()
    assert await node.read(0, shape.size) == content
    await node.close()
    again = await shape.opened(ByteStorage(storage.content), read_only=True)
    assert await again.read(0, shape.size) == content
    result = await again.top.check()
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)


@pytest.mark.parametrize("shape", LARGE, ids=str)
async def test_runs_tell_the_same_as_lookups(shape: Shape) -> None:
    node = await shape.opened(await shape.made())
    rng = random.Random(7)
    for _ in range(25):
        await node.write(rng.randrange(shape.size // 512 - 20) * 512, bytes([1]) * 512 * rng.randrange(1, 20))
    driver = top(node)
    for start, end in ((0, shape.size), (512 * 3, shape.size - 512), (shape.size // 2 + 100, shape.size // 2 + 101)):
        position = start
        async for runs in driver.iter_runs(start, end):
            for at, length, kind, host_offset in zip(
                runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), runs.host_offset.tolist(), strict=True
            ):
                assert at == position
                while (found := driver.lookup(at, length)) is None:
                    await driver.load(at)
                assert (kind, host_offset) == (found[0], found[2])
                position += length
        assert position == end


@pytest.mark.parametrize("shape", LARGE, ids=str)
async def test_neighbours_in_the_file_are_one_run(shape: Shape) -> None:
    node = await shape.opened(await shape.made())
    cluster = node.top.cluster_size
    await node.write(0, b"\1" * 3 * cluster)
    run = node.top.lookup(cluster // 2, 4 * cluster)
    assert run is not None
    assert run[:2] == (DATA, 2 * cluster + cluster // 2)
    assert node.top.lookup_writable(cluster // 2, 4 * cluster) == run
    assert node.top.lookup(3 * cluster, cluster) == (UNALLOCATED, cluster, -1)


async def test_space_of_a_failed_write_is_used_again() -> None:
    shape = LARGE[0]
    storage = await shape.made()
    node = await shape.opened(storage)
    await node.write(0, b"x" * 4096)
    driver = top(node)
    allocation = driver.allocate(1 << 20, 4096)
    assert allocation is not None and allocation.zeroed
    driver.abandon(allocation)
    await node.flush()
    again = driver.allocate(1 << 20, 4096)
    assert again is not None
    assert (again.host_offset, again.zeroed) == (allocation.host_offset, False)
    driver.abandon(again)
    await node.close()
    result = await (await shape.opened(storage, read_only=True)).top.check()
    assert result.leaks == 0


async def test_entries_that_lead_astray_are_errors_and_stay_as_they_are() -> None:
    for shape in LARGE:
        storage = await shape.made()
        node = await shape.opened(storage)
        driver = top(node)
        await node.write(0, b"x" * driver.cluster_size)
        l2_offset = driver.slice_offset(0)
        l1_offset = driver.l1.host_offset
        cluster = driver.cluster_size
        await node.close()
        byteorder: Literal["little", "big"] = "little" if shape.driver is QedDriver else "big"
        good = bytes(storage.content)
        for place in (l2_offset, l1_offset, 4096 * 3 + 1, 1 << 40, (1 << 62) + 4096, 0x10):
            if shape.driver is not QedDriver and place == 4096 * 3 + 1:
                continue  # qcow knows no alignment
            at = l2_offset + 8
            bad = bytearray(good)
            bad[at : at + 8] = place.to_bytes(8, byteorder)
            store = ByteStorage(bad)
            image = await shape.opened(store)
            with pytest.raises(RequestError, match="invalid"):
                await image.read(cluster, 1)
            with pytest.raises(RequestError, match=r"invalid|corrupt"):
                await image.write(cluster, b"y")
            with pytest.raises(RequestError, match="invalid"):
                async for _ in image.top.iter_runs(0, shape.size):
                    pass
            assert await image.read(0, cluster) == b"x" * cluster
            await image.close()
            assert store.content[at : at + 8] == place.to_bytes(8, byteorder)
