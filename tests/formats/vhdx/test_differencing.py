"""Differencing images: what is here, what is the parent's, and what independent readers see."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.errors import RequestError
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.formats.vhdx.differencing import DifferencingDriver
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, PARTIALLY_PRESENT, UNMAPPED
from nbdserve.formats.vhdx.layout import ZERO as ZERO_STATE
from nbdserve.formats.vhdx.structure import read_structure
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, KIB, MIB
from tests.formats.vhdx.helpers import (
    agrees,
    bat_entry,
    child_of,
    copy,
    driver_of,
    finish,
    made,
    node_on,
    parent_and_child,
    put_entry,
    random_changes,
    stored,
)

dissect = pytest.importorskip("dissect.hypervisor.disk.vhdx")
pyvhdi = pytest.importorskip("pyvhdi")

SIZE = 12 * MIB + 4096


def _by_dissect(folder: Path) -> bytes:
    disk = dissect.VHDX(folder / "child.vhdx")
    disk.seek(0)
    content: bytes = disk.read(SIZE)
    return content


def _by_libvhdi(folder: Path) -> bytes:
    parent, child = pyvhdi.file(), pyvhdi.file()
    parent.open(str(folder / "parent.vhdx"))
    child.open(str(folder / "child.vhdx"))
    child.set_parent(parent)
    content = b""
    while len(content) < SIZE:
        content += child.read_buffer_at_offset(min(MIB, SIZE - len(content)), len(content))
    child.close()
    parent.close()
    return content


def _write(folder: Path, parent: MemoryStorage, child: MemoryStorage) -> None:
    (folder / "parent.vhdx").write_bytes(stored(parent))
    (folder / "child.vhdx").write_bytes(stored(child))


@pytest.mark.parametrize(
    ("options", "sector_size"),
    [("block_size=1M", 512), ("block_size=2M", 4096), ("block_size=8M", 512), ("block_size=256M", 4096)],
)
async def test_independent_readers_see_what_we_wrote(tmp_path: Path, options: str, sector_size: int) -> None:
    parent, child, model = await parent_and_child(SIZE, options, sector_size=sector_size)
    _write(tmp_path, parent, child)
    assert _by_dissect(tmp_path) == model  # libvhdi takes the file's head for a sector bitmap while there is none
    for session in range(2):
        node = await node_on(child, parent, discard="unmap" if session else "ignore")
        assert isinstance(driver_of(node), DifferencingDriver)
        rng = random.Random(session)
        for _ in range(40):  # nothing but small ones, so that blocks are here in part
            offset = rng.randrange(SIZE - 8192)
            data = rng.randbytes(rng.choice((1, 512, 4096, 8192)))
            await node.write(offset, data)
            model[offset : offset + len(data)] = data
        await agrees(driver_of(node))
        await finish(node)
        _write(tmp_path, parent, child)
        assert _by_dissect(tmp_path) == model
        assert _by_libvhdi(tmp_path) == model
        await random_changes(node, model, 40, session)
        await agrees(driver_of(node))
        assert await node.read(0, SIZE) == model
        await finish(node)
        _write(tmp_path, parent, child)
        assert _by_dissect(tmp_path) == model
        assert _by_libvhdi(tmp_path) == model
        assert (await node.top.check()).corruptions == 0
    again = await node_on(child, parent, read_only=True)
    assert await again.read(0, SIZE) == model


async def test_a_small_write_copies_nothing() -> None:
    parent, child, model = await parent_and_child(SIZE, "block_size=2M")
    size = child.size
    node = await node_on(child, parent)
    await node.write(3 * MIB + 512, b"\xaa" * 1024)
    await node.write(3 * MIB + 5000, b"\xbb")
    await finish(node)
    assert child.size == size + 2 * MIB + MIB  # a block, and a sector bitmap
    rows = await agrees(driver_of(node))
    here = [(start, length) for start, length, kind, _ in rows if kind == DATA]
    assert here == [(3 * MIB + 512, 1024), (3 * MIB + 4608, 512)]
    model[3 * MIB + 512 : 3 * MIB + 1536] = b"\xaa" * 1024
    model[3 * MIB + 5000] = 0xBB
    assert await node.read(0, SIZE) == model
    structure = await read_structure(child)
    assert bat_entry(child, structure, 1) & 7 == PARTIALLY_PRESENT
    bitmap = bat_entry(child, structure, structure.parameters.bitmap_index(0))
    assert bitmap & 7 == FULLY_PRESENT
    bits = stored(child)[(bitmap >> 20 << 20) + 3 * MIB // 512 // 8 :][:2]
    assert bits == bytes([0b0000_0110, 0b0000_0010])


async def test_a_block_of_which_everything_was_written_is_here_as_a_whole() -> None:
    parent, child, model = await parent_and_child(SIZE)
    node = await node_on(child, parent)
    pieces = list(range(0, MIB, 64 * KIB))
    random.Random(3).shuffle(pieces)
    for at in pieces:
        await node.write(2 * MIB + at, bytes([at >> 16]) * (64 * KIB))
        model[2 * MIB + at : 2 * MIB + at + 64 * KIB] = bytes([at >> 16]) * (64 * KIB)
    await finish(node)
    assert bat_entry(child, await read_structure(child), 2) & 7 == FULLY_PRESENT
    assert await node.read(0, SIZE) == model


async def test_bits_left_over_from_a_former_block_mean_nothing() -> None:
    """The bits are all set, the block is gone; a new one has only what is written to it."""
    parent, model = await made(SIZE), bytearray(b"\x99" * SIZE)
    below = await node_on(parent)
    await below.write(0, model)
    await finish(below)
    child = await child_of(parent, SIZE)
    node = await node_on(child, parent)
    await node.write(2 * MIB, b"\xcc" * (MIB - 512))
    await finish(node)
    await put_entry(child, 2, 0)  # as one who drops the block does
    node = await node_on(child, parent)
    assert await node.read(0, SIZE) == model
    await node.write(2 * MIB + 1024, b"\xdd" * 512)
    model[2 * MIB + 1024 : 2 * MIB + 1536] = b"\xdd" * 512
    assert await node.read(0, SIZE) == model
    await finish(node)
    assert await (await node_on(child, parent, read_only=True)).read(0, SIZE) == model


@pytest.mark.parametrize("state", [1, ZERO_STATE, UNMAPPED])
async def test_a_part_of_a_block_of_zeroes(state: int) -> None:
    """The parent must not show in the rest of it, nor what the place held before."""
    parent, child, model = await parent_and_child(SIZE)
    node = await node_on(child, parent)
    await node.write(5 * MIB, b"\xff" * MIB)
    await node.flush()
    await node.zero(5 * MIB, MIB, unmap=True)
    await finish(node)
    await put_entry(child, 2, state)
    model[2 * MIB : 3 * MIB] = bytes(MIB)
    model[5 * MIB : 6 * MIB] = bytes(MIB)
    node = await node_on(child, parent)
    assert await node.read(0, SIZE) == model
    await node.write(2 * MIB + 700, b"part")
    model[2 * MIB + 700 : 2 * MIB + 704] = b"part"
    assert await node.read(0, SIZE) == model
    await finish(node)
    assert await (await node_on(child, parent, read_only=True)).read(0, SIZE) == model


async def test_a_part_of_a_block_of_zeroes_where_another_block_was() -> None:
    parent, child, model = await parent_and_child(SIZE)
    node = await node_on(child, parent)
    await node.write(5 * MIB, b"\xff" * MIB)
    await node.zero(2 * MIB, MIB)
    await node.flush()
    size = child.size
    await node.zero(5 * MIB, MIB, unmap=True)
    await node.flush()
    await driver_of(node)._commit.settle()
    await node.write(2 * MIB + 700, b"part")
    for start in (2 * MIB, 5 * MIB):
        model[start : start + MIB] = bytes(MIB)
    model[2 * MIB + 700 : 2 * MIB + 704] = b"part"
    assert await node.read(0, SIZE) == model
    await finish(node)
    assert child.size == size
    assert await (await node_on(child, parent, read_only=True)).read(0, SIZE) == model


async def test_zeroes_and_discards_hide_the_parent() -> None:
    parent, child, model = await parent_and_child(SIZE)
    node = await node_on(child, parent, discard="unmap")
    await node.zero(MIB, MIB + 512)
    await node.discard(4 * MIB, 2 * MIB)
    await node.zero(SIZE - 4096, 4096)
    for start, end in ((MIB, 2 * MIB + 512), (4 * MIB, 6 * MIB), (SIZE - 4096, SIZE)):
        model[start:end] = bytes(end - start)
    assert await node.read(0, SIZE) == model
    kinds = {kind for start, _, kind, _ in await agrees(driver_of(node)) if start in (MIB, 4 * MIB)}
    assert kinds == {ZERO}
    await finish(node)
    assert await (await node_on(child, parent, read_only=True)).read(0, SIZE) == model


async def test_a_shorter_and_a_longer_parent() -> None:
    for size in (5 * MIB + 512, 20 * MIB):
        parent = await made(size)
        node = await node_on(parent)
        await node.write(0, b"\x77" * size)
        await finish(node)
        child = await child_of(parent, 8 * MIB)
        model = bytearray((b"\x77" * size)[: 8 * MIB].ljust(8 * MIB, b"\0"))
        node = await node_on(child, parent)
        assert await node.read(0, 8 * MIB) == model
        await random_changes(node, model, 60, size)
        assert await node.read(0, 8 * MIB) == model


async def test_bitmaps_of_many_chunks() -> None:
    """With blocks of 1 MiB a chunk is 4 GiB; each one has a bitmap, made when it is needed."""
    parent = await made(20 * GIB, "block_size=32M,block_state_zero=off")
    child = await child_of(parent, 20 * GIB)
    size = child.size
    node = await node_on(child, parent)
    for number in range(5):
        await node.write(number * 4 * GIB + 300 * MIB, bytes([number + 1]) * 512)
        await node.write((number + 1) * 4 * GIB - 512, bytes([number + 101]) * 512)
    await finish(node)
    assert child.size == size + 5 * (MIB + 2 * MIB)
    again = await node_on(child, parent, read_only=True)
    for number in range(5):
        assert await again.read(number * 4 * GIB + 300 * MIB, 513) == bytes([number + 1]) * 512 + b"\0"
        assert await again.read((number + 1) * 4 * GIB - 513, 513) == b"\0" + bytes([number + 101]) * 512
    assert (await again.top.check()).corruptions == 0


@pytest.mark.parametrize("entry", [0, 7 * MIB | 5, FULLY_PRESENT, (1 << 60) | FULLY_PRESENT])
async def test_a_sector_bitmap_that_cannot_be(entry: int) -> None:
    parent, child, _ = await parent_and_child(SIZE)
    node = await node_on(child, parent)
    await node.write(512, b"x" * 512)
    await finish(node)
    structure = await read_structure(child)
    await put_entry(child, structure.parameters.bitmap_index(0), entry)
    node = await node_on(child, parent, read_only=True)
    with pytest.raises(RequestError, match="sector bitmap"):
        await node.read(0, 512)
    with pytest.raises(RequestError, match="sector bitmap"):
        await agrees(driver_of(node))
    assert (await node.top.check()).corruptions > 0


async def test_alone_it_shows_where_the_parent_would_be() -> None:
    parent, child, _ = await parent_and_child(SIZE)
    node = await node_on(child, parent)
    await node.write(512, b"x" * 512)
    await finish(node)
    alone = driver_of(await node_on(child, read_only=True))
    await alone.load(0)
    assert alone.lookup(0, 2048) == (UNALLOCATED, 512, -1)
    found = alone.lookup(512, 2048)
    assert found is not None
    assert found[:2] == (DATA, 512)
    assert alone.lookup(700, 2048) == (DATA, 324, found[2] + 188)
    assert alone.lookup(1024, 2048) == (UNALLOCATED, 2048, -1)


async def test_an_allocation_that_was_given_up_shows_nothing() -> None:
    parent, child, model = await parent_and_child(SIZE)
    node = await node_on(child, parent)
    driver = driver_of(node)
    await node.write(MIB, b"x" * 512)
    model[MIB : MIB + 512] = b"x" * 512
    for offset, length in ((MIB + 512, 1024), (3 * MIB + 512, 1024), (5 * MIB, 2 * MIB)):
        while (allocation := driver.allocate(offset, length)) is None:
            await driver.prepare(offset, length)
        await child.write(allocation.host_offset, b"\xee" * allocation.length)
        driver.abandon(allocation)
    await finish(node)
    assert await node.read(0, SIZE) == model
    assert await (await node_on(copy(child), parent, read_only=True)).read(0, SIZE) == model
