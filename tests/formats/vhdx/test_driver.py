"""The driver against qemu-img and qemu-io, both ways, and what entries of every kind mean."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.errors import RequestError
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, PARTIALLY_PRESENT, UNDEFINED, UNMAPPED
from nbdserve.formats.vhdx.layout import ZERO as ZERO_STATE
from nbdserve.formats.vhdx.structure import read_structure
from nbdserve.units import GIB, MIB
from tests.formats.vhdx.helpers import (
    agrees,
    bat_entry,
    driver_of,
    finish,
    made,
    node_of,
    node_on,
    put_entry,
    qemu_image,
    random_changes,
)
from tests.support import images
from tests.support.images import needs_qemu

GEOMETRIES = [
    "block_size=1M",
    "block_size=2M,block_state_zero=off",
    "",
    "subformat=fixed,block_size=1M",
    "subformat=fixed,block_size=8M",
    "block_size=256M,log_size=3M",
]
SIZE = 12 * MIB + 512 * 3
"""The last block is not whole."""


@needs_qemu
@pytest.mark.parametrize("options", GEOMETRIES)
async def test_reads_what_qemu_wrote(tmp_path: Path, options: str) -> None:
    path = qemu_image(tmp_path / "a.vhdx", SIZE, options)
    images.qemu_io(
        path, "vhdx", ["write -P 1 0 700k", "write -P 2 5M 3M", f"write -P 3 {12 * MIB} 1536", "write -z 6M 1M"]
    )
    expected = images.raw_content(path, "vhdx", tmp_path)
    node = await node_of(path, read_only=True)
    assert await node.read(0, SIZE) == expected
    rng = random.Random(1)
    for _ in range(50):
        offset = rng.randrange(SIZE)
        length = min(SIZE - offset, rng.choice((1, 511, 4096, 70000, 3 * MIB)))
        assert await node.read(offset, length) == expected[offset : offset + length]
    await agrees(driver_of(node))
    await node.close()


@needs_qemu
@pytest.mark.parametrize("options", GEOMETRIES)
async def test_each_goes_on_where_the_other_stopped(tmp_path: Path, options: str) -> None:
    path = qemu_image(tmp_path / "a.vhdx", SIZE, options)
    model = bytearray(SIZE)
    rng = random.Random(options)
    for session in range(3):
        node = await node_of(path, discard="unmap" if session else "ignore")
        await random_changes(node, model, 60, session)
        await agrees(driver_of(node))
        assert await node.read(0, SIZE) == model
        await node.close()
        images.check(path, "vhdx")
        assert images.raw_content(path, "vhdx", tmp_path) == model
        images.qemu_io(path, "vhdx", images.random_qemu_io(rng, SIZE, 15, model))
        images.check(path, "vhdx")
    node = await node_of(path, read_only=True)
    assert await node.read(0, SIZE) == model
    await node.close()


@needs_qemu
async def test_blocks_on_both_sides_of_a_sector_bitmap_entry(tmp_path: Path) -> None:
    """With 1 MiB blocks, 4096 of them are a chunk; and the next part of the table begins within the second one."""
    path = qemu_image(tmp_path / "a.vhdx", 2 << 40, "block_size=1M")
    places = [4 * GIB - 5000, 8 * GIB - 5000, 8 * GIB - 3 * MIB, (1 << 40) - 1, (2 << 40) - 20000]
    node = await node_of(path)
    for number, at in enumerate(places):
        await node.write(at, bytes([number + 1]) * 20000)
    await node.zero(4 * GIB - MIB, 2 * MIB)
    rows = await agrees(driver_of(node), 3 * GIB, 9 * GIB)
    await node.close()
    images.check(path, "vhdx")
    commands = [f"read -P {number + 1} {at} 20000" for number, at in enumerate(places)]
    commands[0] = f"read -P 0 {places[0]} 20000"
    images.qemu_io(path, "vhdx", commands)
    assert sum(length for _, length, kind, _ in rows if kind == DATA) == 3 * MIB


async def test_what_every_state_means() -> None:
    storage = await made(9 * MIB, "block_size=1M,block_state_zero=off")
    await storage.truncate(8 * MIB)
    await storage.write(7 * MIB, b"x" * MIB)
    for block, state in ((1, UNDEFINED), (2, ZERO_STATE), (3, UNMAPPED), (4, FULLY_PRESENT)):
        await put_entry(storage, block, 7 * MIB | state)
    driver = driver_of(await node_on(storage, read_only=True))
    await driver.load(0)
    assert driver.lookup(0, 9 * MIB) == (UNALLOCATED, MIB, -1)
    assert driver.lookup(MIB, 512) == (ZERO, 512, -1)
    assert driver.lookup(2 * MIB + 5, 512) == (ZERO, 512, -1)
    assert driver.lookup(3 * MIB, 2 * MIB) == (ZERO, MIB, -1)
    assert driver.lookup(4 * MIB + 100, 2 * MIB) == (DATA, MIB - 100, 7 * MIB + 100)
    assert driver.lookup(5 * MIB, 4 * MIB) == (UNALLOCATED, 4 * MIB, -1)


@pytest.mark.parametrize(
    "entry",
    [7 * MIB | 4, 7 * MIB | 5, 7 * MIB | PARTIALLY_PRESENT, FULLY_PRESENT, 8 * MIB | FULLY_PRESENT, (1 << 62) | 6],
)
async def test_entries_that_cannot_be(entry: int) -> None:
    storage = await made(9 * MIB)
    await storage.truncate(8 * MIB)
    await put_entry(storage, 4, entry)
    node = await node_on(storage, read_only=True)
    with pytest.raises(RequestError, match="invalid BAT entry"):
        await node.read(4 * MIB, 1)
    with pytest.raises(RequestError, match="invalid BAT entry"):
        await agrees(driver_of(node))
    assert await node.read(3 * MIB, MIB) == bytes(MIB)


async def test_a_last_block_that_the_file_cuts() -> None:
    """qemu-img makes fixed images as long as the disk, whatever the block size."""
    storage = await made(9 * MIB, "subformat=fixed,block_size=8M")
    await storage.truncate(storage.size - 7 * MIB)
    node = await node_on(storage)
    await node.write(9 * MIB - 3, b"end")
    assert await node.read(9 * MIB - 4, 4) == b"\0end"
    await finish(node)
    assert (await (await node_on(storage, read_only=True)).top.check()).corruptions == 0
    await storage.truncate(storage.size - 512)
    node = await node_on(storage, read_only=True)
    assert await node.read(9 * MIB - 1000, 488) == bytes(488)
    with pytest.raises(RequestError, match="invalid BAT entry"):
        await node.read(9 * MIB - 512, 512)
    assert (await node.top.check()).corruptions == 1


async def test_a_new_block_reads_zero_around_what_was_written() -> None:
    """Also when it takes the place of one that was freed and is full of other bytes."""
    storage = await made(8 * MIB)
    node = await node_on(storage)
    await node.write(0, b"\xff" * (2 * MIB))
    await node.flush()
    size = storage.size
    await node.zero(0, 2 * MIB)
    await node.flush()
    await driver_of(node)._commit.settle()
    await node.write(5 * MIB + 1000, b"new")
    await node.flush()
    assert storage.size == size  # it took the place of a freed one
    assert await node.read(5 * MIB, MIB) == (bytes(1000) + b"new").ljust(MIB, b"\0")


async def test_zeroing_whole_blocks_is_a_change_of_the_table() -> None:
    storage = await made(8 * MIB + 512)
    node = await node_on(storage, discard="unmap")
    await node.write(0, b"\xff" * (8 * MIB + 512))
    driver = driver_of(node)
    assert driver.zero(0, 3 * MIB, unmap=True) == 3 * MIB
    assert driver.zero(8 * MIB, 512, unmap=True) == 512
    assert driver.zero(4 * MIB, MIB, unmap=False) == 0  # its space is to be kept
    assert driver.zero(5 * MIB, 512, unmap=True) == 0
    assert driver.discard(5 * MIB + 512, 3 * MIB) == MIB - 512
    assert driver.discard(6 * MIB, MIB) == MIB
    assert driver.discard(7 * MIB, 512) == 512
    kinds = [(start, kind) for start, _, kind, _ in await agrees(driver)]
    assert kinds == [(0, ZERO), (3 * MIB, DATA), (6 * MIB, ZERO), (7 * MIB, DATA), (8 * MIB, ZERO)]
    await finish(node)
    structure = await read_structure(storage)
    assert bat_entry(storage, structure, 0) == ZERO_STATE


async def test_fixed_images_keep_their_blocks() -> None:
    storage = await made(4 * MIB, "subformat=fixed,block_size=1M")
    node = await node_on(storage, discard="unmap")
    await node.write(0, b"\xff" * (4 * MIB))
    await node.zero(0, 2 * MIB)
    await node.discard(2 * MIB, MIB)
    await finish(node)
    assert await node.read(0, 2 * MIB) == bytes(2 * MIB)
    assert [kind for _, _, kind, _ in await agrees(driver_of(node))] == [DATA]
    structure = await read_structure(storage)
    assert all(bat_entry(storage, structure, block) & 7 == FULLY_PRESENT for block in range(4))


async def test_nothing_is_decided_without_the_table() -> None:
    storage = await made(8 * MIB)
    driver = driver_of(await node_on(storage))
    for question in (
        lambda: driver.lookup(0, 512),
        lambda: driver.lookup_writable(0, 512),
        lambda: driver.allocate(0, MIB),
        lambda: driver.zero(0, MIB, unmap=True),
        lambda: driver.discard(0, MIB),
    ):
        assert question() is None
    await driver.load(0)
    assert driver.lookup_writable(0, 3 * MIB) == (UNALLOCATED, 3 * MIB, -1)


async def test_an_allocation_that_was_given_up_shows_nothing() -> None:
    storage = await made(8 * MIB)
    node = await node_on(storage)
    driver = driver_of(node)
    await node.write(7 * MIB, b"x")
    allocation = driver.allocate(0, 3 * MIB)
    assert allocation is not None
    assert (allocation.length, allocation.zeroed) == (3 * MIB, True)
    await storage.write(allocation.host_offset, b"\xff" * (3 * MIB))
    driver.abandon(allocation)
    await node.flush()
    await driver._commit.settle()
    assert await node.read(0, 3 * MIB) == bytes(3 * MIB)
    again = driver.allocate(0, 3 * MIB)
    assert again is not None
    assert (again.host_offset, again.zeroed) == (allocation.host_offset, False)


async def test_what_lies_below_a_dynamic_image() -> None:
    """The user may put a layer there: blocks that are not here show it, and zeroes do not."""
    storage, below = await made(4 * MIB, "block_size=1M,block_state_zero=off"), await made(4 * MIB)
    lower = await node_on(below)
    await lower.write(0, b"below" * (4 * MIB // 5))
    await finish(lower)
    node = await node_on(storage, below, has_backing=True, discard="unmap")
    await node.write(MIB + 10, b"above")
    await node.zero(2 * MIB, MIB)
    assert await node.read(0, 5) == b"below"
    assert (
        await node.read(MIB + 9, 7)
        == (b"below" * MIB)[MIB + 9 : MIB + 10] + b"above" + (b"below" * MIB)[MIB + 15 : MIB + 16]
    )
    assert await node.read(2 * MIB, MIB) == bytes(MIB)
    await node.discard(3 * MIB, MIB)
    assert await node.read(3 * MIB, MIB) == bytes(MIB)
