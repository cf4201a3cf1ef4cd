from __future__ import annotations

import random

import pytest

from nbdserve.errors import ConfigError
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.units import KIB, MIB
from tests.formats.raw_cow.engine import Files

BASE = random.Random(7).randbytes(2 * MIB)


@pytest.mark.parametrize("base_size", [None, 300 * KIB, MIB, 2 * MIB])
@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("raw_size", [0, 3 * MIB])
async def test_a_larger_disk_ends_in_zeroes(base_size: int | None, cluster_size: int, raw_size: int) -> None:
    files = Files(None if base_size is None else BASE[:base_size])
    await files.raw.write(0, b"\xee" * raw_size)
    size = MIB - 512
    await files.create(size, cluster_size=str(cluster_size))
    node = await files.node()
    await node.write(size - 3, b"end")
    before = await node.read(0, size)
    await node.top.resize(size + 1536 * KIB)
    await node.close()
    node = await files.node()
    assert node.size == size + 1536 * KIB
    content = await node.read(0, node.size)
    assert content[:size] == before
    assert not any(content[size:])
    result = await node.top.check()
    assert (result.leaks, result.corruptions) == (0, 0)
    assert files.raw.size == max(node.size, raw_size)


@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_a_smaller_disk_that_grows_again_has_forgotten(cluster_size: int) -> None:
    files = Files(BASE[:MIB])
    await files.create(MIB, cluster_size=str(cluster_size))
    node = await files.node()
    await node.write(0, b"x" * MIB)
    await node.top.resize(300 * KIB)
    await node.close()
    assert files.raw.size == 300 * KIB
    driver = await files.driver()
    assert driver.info().specific["raw-file-stands-alone"] is True
    await driver.resize(MIB)
    await driver.close()
    node = await files.node()
    assert await node.read(0, MIB) == b"x" * (300 * KIB) + bytes(MIB - 300 * KIB)
    assert not (await node.top.check()).leaks


async def test_bits_behind_the_end_do_not_come_alive() -> None:
    files = Files(None)
    await files.raw.write(0, b"\xee" * 2 * MIB)
    await files.create(MIB)
    await files.image.write(4096 + 2, b"\xff\xff")
    driver = await files.driver()
    await driver.resize(2 * MIB)
    node = await files.node(read_only=True)
    assert await node.read(0, 2 * MIB) == bytes(2 * MIB)
    assert driver.bitmap.missing == 32


@pytest.mark.parametrize("write", [False, True])
async def test_what_a_longer_layer_below_has_in_the_last_cluster_is_not_shown(write: bool) -> None:
    files = Files(BASE)
    await files.create(MIB + 512)
    node = await files.node()
    await node.top.resize(2 * MIB)
    await node.close()
    node = await files.node()
    expected = bytearray(BASE[: MIB + 512].ljust(2 * MIB, b"\0"))
    assert node.top.lookup(0, 2 * MIB) == (UNALLOCATED, MIB + 512, -1)
    assert node.top.lookup(MIB + 512, MIB - 512) == (ZERO, MIB - 512, -1)
    assert node.top.lookup_writable(MIB, 65536) == (UNALLOCATED, 65536, -1)
    runs = [part.length.tolist() async for part in node.top.iter_runs(0, 2 * MIB)]
    assert runs == [[MIB + 512], [MIB - 512]]
    if write:
        await node.write(MIB + 1000, b"own")
        parts = [
            list(zip(part.length.tolist(), part.kind.tolist(), strict=True))
            async for part in node.top.iter_runs(0, 2 * MIB)
        ]
        assert parts == [[(MIB, UNALLOCATED), (65536, DATA)], [(MIB - 65536, ZERO)]]
        expected[MIB + 1000 : MIB + 1003] = b"own"
    assert await node.read(0, 2 * MIB) == expected


@pytest.mark.parametrize(("size", "problem"), [(1000, "multiple of 512"), (1 << 45, "use a larger cluster_size")])
async def test_impossible_sizes(size: int, problem: str) -> None:
    files = Files(None)
    await files.create(MIB)
    driver = await files.driver()
    with pytest.raises(ConfigError, match=problem):
        await driver.resize(size)
    assert driver.size == MIB


async def test_a_crash_before_the_header_is_written_is_a_leak() -> None:
    class Stopping(OSError):
        pass

    files = Files(None)
    await files.create(MIB)
    driver = await files.driver()

    async def fail(**values: int) -> None:
        raise Stopping

    driver._header_sector.patch = fail  # type: ignore[method-assign]
    with pytest.raises(Stopping):
        await driver.resize(512 * MIB)
    driver = await files.driver()
    assert driver.size == MIB
    result = await driver.check(repair_leaks=True)
    assert result.corruptions == 0
    assert result.leaks_fixed == 1
    assert (await driver.check()).leaks == 0
