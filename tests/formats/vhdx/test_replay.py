"""Replaying into memory and for good."""

from __future__ import annotations

import random

import pytest

from nbdserve.errors import UnsupportedImageError
from nbdserve.extents import DATA, ZERO
from nbdserve.formats.vhdx import replay as replay_module
from nbdserve.formats.vhdx.log import PAGE, Change
from nbdserve.formats.vhdx.replay import ReplayedStorage, replayed, write_replayed
from nbdserve.formats.vhdx.structure import read_structure
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.formats.vhdx.helpers import copy, driver_of, finish, made, node_on, stored

SIZE = 40 * PAGE


def _changes(seed: int) -> tuple[bytes, list[Change], bytearray]:
    """A file, random changes, and what they make of it."""
    rng = random.Random(seed)
    before = rng.randbytes(SIZE)
    after = bytearray(before.ljust(50 * PAGE, b"\0"))
    changes = []
    for _ in range(12):
        first, count = rng.randrange(48), rng.randrange(1, 9)
        if rng.random() < 0.4:
            end = min(50, first + count) * PAGE
            changes.append(Change(first * PAGE, count * PAGE, None))
            after[first * PAGE : end] = bytes(end - first * PAGE)
        else:
            page = rng.randbytes(PAGE)
            changes.append(Change(first * PAGE, PAGE, page))
            after[first * PAGE : (first + 1) * PAGE] = page
    return before, changes, after


@pytest.mark.parametrize("seed", range(8))
async def test_a_file_as_it_will_be(seed: int) -> None:
    before, changes, after = _changes(seed)
    file = MemoryStorage(before)
    overlay = ReplayedStorage(file, changes, 50 * PAGE)
    assert overlay.size == 50 * PAGE
    assert await overlay.read(0, 50 * PAGE) == after
    rng = random.Random(seed)
    for _ in range(30):
        offset = rng.randrange(50 * PAGE)
        length = rng.randrange(1, 3 * PAGE)
        buffer = bytearray(length)
        assert overlay.try_read_into(offset, memoryview(buffer))
        assert buffer == bytes(after[offset : offset + length]).ljust(length, b"\0")
    assert stored(file) == before
    await write_replayed(overlay)
    assert stored(file) == after


async def test_nothing_is_written_through_it() -> None:
    overlay = ReplayedStorage(MemoryStorage(bytes(SIZE)), [], SIZE)
    for change in (overlay.write(0, b"x"), overlay.zero(0, 1), overlay.discard(0, 1), overlay.truncate(0)):
        with pytest.raises(OSError, match="replayed in memory"):
            await change
    await overlay.flush()
    assert overlay.allocated_size() >= 0
    await overlay.close()
    with pytest.raises(OSError, match="closed"):
        await overlay.read(0, 1)


async def test_holes_end_where_a_change_is() -> None:
    file = MemoryStorage(size=8 * MIB)
    overlay = ReplayedStorage(file, [Change(2 * MIB, PAGE, b"x" * PAGE), Change(4 * MIB, PAGE, None)], 0)
    assert (await overlay.host_map(0, MIB)).kind.tolist() == [ZERO]
    assert (await overlay.host_map(2 * MIB, MIB)).kind.tolist() == [DATA]
    assert overlay.touches(4 * MIB + 1, 4 * MIB + 2)
    assert not overlay.touches(4 * MIB + PAGE, 5 * MIB)


def test_a_bounded_number_of_zero_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "_MAX_ZERO_RANGES", 3)
    with pytest.raises(UnsupportedImageError, match="zero descriptors"):
        ReplayedStorage(MemoryStorage(size=SIZE), [Change(0, PAGE, None)] * 4, 0)


async def test_an_image_that_was_not_closed() -> None:
    storage = await made(8 * MIB)
    before = copy(storage)
    assert await replayed(storage, (await read_structure(storage)).header) is None
    node = await node_on(storage)
    await node.write(3 * MIB, b"x" * MIB)
    await node.flush()
    left = copy(storage)
    # The block is there, and the log; what the log was to change is lost.
    bat = driver_of(node).structure.bat.offset
    await left.write(bat, stored(before)[bat : bat + MIB])
    await finish(node)
    held = stored(left)
    again = await node_on(left, read_only=True)
    assert await again.read(3 * MIB, MIB) == b"x" * MIB
    assert stored(left) == held
    await again.top.check()
    assert stored(left) == held
    writable = await node_on(left)
    assert await writable.read(3 * MIB, MIB) == b"x" * MIB
    await writable.write(0, b"y" * 4 * KIB)
    await finish(writable)
    structure = await read_structure(left)
    assert structure.overlay is None
    assert not structure.header.log_guid.int
