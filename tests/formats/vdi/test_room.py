"""Room for a second map in images QEMU made: how it looks, crashes at any point, and where there is none to be had."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdserve.block.forms import READ_DATA
from nbdserve.block.node import Node
from nbdserve.errors import RequestError, UnsupportedImageError
from nbdserve.formats.vdi import layout, room
from nbdserve.formats.vdi.driver import VdiDriver
from nbdserve.formats.vdi.layout import FREE, Header
from nbdserve.formats.vdi.two_maps import TwoMaps
from nbdserve.storage.base import Storage
from nbdserve.units import GIB, MIB
from tests.formats import flat
from tests.formats.flat import open_with
from tests.support import images
from tests.support.geometries.vdi import dissected
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay

STATES = int(os.environ.get("NBDSERVE_CRASH_STATES", "10"))

pytestmark = images.needs_qemu


def _stock(path: Path, size: int, order: Sequence[int]) -> bytes:
    """An image QEMU made, with blocks written in this order; its content."""
    images.create(path, size, fmt="vdi")
    model = bytearray(size)
    for block in order:
        data = bytes([block + 1]) * min(MIB, size - block * MIB)
        model[block * MIB : block * MIB + len(data)] = data
    if order:
        images.qemu_io(
            path, "vdi", [f"write -P {block + 1} {block}M {min(MIB, size - block * MIB)}" for block in order]
        )
    return bytes(model)


async def _open(storage: Storage) -> VdiDriver:
    return await VdiDriver.open(storage, {}, read_only=False)


async def _make_room(storage: Storage) -> None:
    driver = await _open(storage)
    await driver.make_room()
    await driver.close()


def _header(path: Path) -> Header:
    data = path.read_bytes()
    return Header.parse(data[:512], str(path), len(data))


@pytest.mark.parametrize(
    ("size", "order"), [(5 * MIB, [3, 1, 4]), (MIB, [0]), (3 * MIB + 512, [2, 1, 0, 3]), (4 * MIB, [])], ids=str
)
async def test_the_data_area_begins_a_block_further_behind(tmp_path: Path, size: int, order: list[int]) -> None:
    path = tmp_path / "a.vdi"
    model = _stock(path, size, order)
    driver = await open_with(VdiDriver, path)
    await driver.make_room()
    assert await flat.read(driver, 0, size) == model
    await driver.close()
    header = _header(path)
    assert (header.map_offset, header.data_offset) == (512, MIB + 1024)
    assert (header.blocks, header.blocks_allocated) == (header.disk_blocks, len(order))
    assert path.stat().st_size == header.data_offset + len(order) * MIB
    images.check(path, "vdi")
    assert flat.content(path, "vdi") == dissected(path) == model
    before = path.read_bytes()
    driver = await open_with(VdiDriver, path)
    await driver.make_room()
    await driver.close()
    assert path.read_bytes() == before


async def test_what_allocates_nothing_moves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    _stock(path, 5 * MIB, [3, 1, 4])
    expected = bytearray(path.read_bytes())
    node = Node([await open_with(VdiDriver, path)], unmap=True)
    await node.flush()
    await node.write(3 * MIB + 7, b"over" * 1000)
    await node.zero(4 * MIB + 512, 4096)
    await node.zero(0, MIB)
    await node.discard(2 * MIB, MIB)
    await node.close()
    expected[1024 + 7 : 1024 + 4007] = b"over" * 1000
    expected[1024 + 2 * MIB + 512 : 1024 + 2 * MIB + 4608] = bytes(4096)
    assert path.read_bytes() == expected


async def test_clients_go_on_while_the_first_allocation_makes_room(tmp_path: Path) -> None:
    """Reads and overwrites of the block that moves, in every form, before and beside it."""
    path = tmp_path / "a.vdi"
    model = bytearray(_stock(path, 6 * MIB, [3, 1, 4]))
    node = Node([await open_with(VdiDriver, path)])
    assert node.locate_read(3 * MIB, 65536) is None
    await node.read(3 * MIB, 512)
    for number in range(8):  # places are remembered
        model[3 * MIB + number * 4096 : 3 * MIB + (number + 1) * 4096] = b"%04d" % number * 1024
        node.submit_write(3 * MIB + number * 4096, memoryview(b"%04d" % number * 1024), lambda _: None)
        assert node.try_read_into(3 * MIB + number * 4096, memoryview(bytearray(4096))) == READ_DATA

    async def client(number: int) -> None:
        rng = random.Random(number)
        for count in range(12):
            block = rng.choice((0, 2, 3, 3, 5) if count else (3,))
            offset, data = block * MIB + number * 8192, bytes([number * 16 + count]) * 4096
            await node.write(offset, data)
            model[offset : offset + 4096] = data
            assert await node.read(offset, 4096) == data

    await asyncio.gather(*map(client, range(1, 7)))
    assert node.top.info().cluster_size == MIB
    assert node.locate_read(3 * MIB, 65536) is not None
    assert await node.read(0, 6 * MIB) == model
    await node.close()
    assert _header(path).data_offset == MIB + 1024
    images.check(path, "vdi")
    assert flat.content(path, "vdi") == model


async def test_an_error_half_way_stops_all_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.vdi"
    model = _stock(path, 5 * MIB, [3, 1, 4])
    node = Node([await open_with(VdiDriver, path)])

    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(room, "finish", full)
    with pytest.raises(OSError, match="full"):
        await node.write(0, b"x")
    with pytest.raises(RequestError, match=r"open it anew: .*full"):
        await node.write(3 * MIB, b"x")
    assert await node.read(0, 5 * MIB) == model
    await node.close()
    monkeypatch.undo()
    images.check(path, "vdi")
    node = Node([await open_with(VdiDriver, path)])
    await node.write(0, b"x")
    await node.close()
    images.check(path, "vdi")
    assert flat.content(path, "vdi") == b"x" + model[1:]


@pytest.mark.parametrize("order", [[3, 1, 4], []], ids=str)
async def test_a_crash_at_any_point_leaves_a_clean_image(tmp_path: Path, order: list[int]) -> None:
    """Stock may write on, and we may, from every state."""
    path = tmp_path / "a.vdi"
    model = _stock(path, 5 * MIB, order)
    recorder = Recorder(seed=1)
    await _make_room(recorder.storage(path.read_bytes()))
    seen: set[bytes] = set()
    among = 0
    for state in Replay(recorder, None, 1).states(STATES):
        content = bytes(state.contents[0])
        if content in seen:
            continue
        seen.add(content)
        path.write_bytes(content)
        images.check(path, "vdi")
        assert flat.content(path, "vdi") == model, str(state)
        header = _header(path)
        if header.map_among_data:
            among += 1
            result = await flat.check_alone(VdiDriver, path)
            assert result.corruptions == 0 and result.leaks == header.blocks_allocated - len(order)
        images.qemu_io(path, "vdi", ["write -P 0x77 2M 512"])
        images.check(path, "vdi")
        changed = bytearray(model)
        changed[2 * MIB : 2 * MIB + 512] = b"\x77" * 512
        driver = await open_with(VdiDriver, path)
        assert await flat.read(driver, 0, len(model)) == changed
        await flat.write(driver, 0, b"x" * 512)
        changed[:512] = b"x" * 512
        await driver.close()
        images.check(path, "vdi")
        assert flat.content(path, "vdi") == changed, str(state)
    assert len(seen) > 4 and among


async def test_small_blocks_of_which_several_move(tmp_path: Path) -> None:
    """QEMU knows no such images."""
    header = dataclasses.replace(layout.plan(MIB), block_size=4096, blocks=256, blocks_allocated=2, data_offset=1536)
    entries = struct.pack("<256I", *(FREE if block not in (9, 200) else block == 9 for block in range(256)))
    path = tmp_path / "a.vdi"
    path.write_bytes(header.build() + entries + b"a" * 4096 + b"b" * 4096)
    model = bytearray(MIB)
    model[9 * 4096 : 10 * 4096], model[200 * 4096 : 201 * 4096] = b"b" * 4096, b"a" * 4096
    driver = await open_with(VdiDriver, path)
    await driver.make_room()
    assert (driver.header.data_offset - 1536) // 4096 > 2
    assert await flat.read(driver, 0, MIB) == model
    await flat.random_changes(driver, model, 100, seed=1)
    await driver.close()
    assert dissected(path) == model
    assert (await flat.check_alone(VdiDriver, path)).leaks == 0


async def test_the_repair_finishes_what_a_crash_left(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    model = _stock(path, 5 * MIB, [3, 1, 4])
    recorder = Recorder(seed=1)
    await _make_room(recorder.storage(path.read_bytes()))
    for state in Replay(recorder, None, 1).states(20):
        path.write_bytes(state.contents[0])
        if _header(path).map_among_data:
            break
    assert (await flat.check_alone(VdiDriver, path)).leaks == 2
    fixed = await flat.check_alone(VdiDriver, path, repair_leaks=True)
    assert (fixed.corruptions, fixed.leaks, fixed.leaks_fixed) == (0, 0, 2)
    assert not _header(path).map_among_data
    images.check(path, "vdi")
    assert flat.content(path, "vdi") == model


@pytest.mark.parametrize("entries", [[1, FREE, FREE, FREE, FREE], [0, 1, FREE, FREE, FREE]], ids=["over it", "before"])
async def test_another_map_among_the_data_is_only_read(tmp_path: Path, entries: list[int]) -> None:
    """A map entry that refers to where the map is, or blocks from the first one on."""
    path = tmp_path / "a.vdi"
    header = dataclasses.replace(layout.plan(5 * MIB), map_offset=2 * MIB, data_offset=MIB, blocks_allocated=2)
    path.write_bytes(header.build().ljust(2 * MIB, b"\0") + struct.pack("<5I", *entries).ljust(MIB, b"\0"))
    before = path.read_bytes()
    with pytest.raises(UnsupportedImageError, match="lies among the data") as caught:
        await open_with(VdiDriver, path)
    assert caught.value.field == "map offset"
    assert path.read_bytes() == before
    await (await open_with(VdiDriver, path, read_only=True)).close()


async def test_a_file_of_more_than_4_gib(tmp_path: Path) -> None:
    path, allocated = tmp_path / "a.vdi", 4096
    images.create(path, 5 * GIB, fmt="vdi")
    header = _header(path)
    with path.open("r+b") as file:
        file.seek(512)
        file.write(struct.pack(f"<{allocated}I", *range(allocated)))
        file.seek(layout.BLOCKS_ALLOCATED_AT)
        file.write(struct.pack("<I", allocated))
        file.seek(header.data_offset + 100)
        file.write(b"first")
        file.truncate(header.data_offset + allocated * MIB)
    images.check(path, "vdi")
    driver = await open_with(VdiDriver, path)
    await driver.make_room()
    assert driver.header.data_offset == header.data_offset + MIB and TwoMaps.of(driver.header) is not None
    assert await flat.read(driver, 100, 5) == b"first"
    await flat.write(driver, 5 * GIB - MIB, b"x" * 512)
    await driver.close()
    images.check(path, "vdi")
    images.qemu_io(path, "vdi", [f"read -P 0x78 {5 * GIB - MIB} 512"])


async def test_a_crash_while_the_end_is_reserved_by_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock calls it an error until the room is made, and writes nowhere over data; both of us may go on."""
    monkeypatch.setattr(layout, "OFFSET_LIMIT", 3 * MIB)
    path = tmp_path / "a.vdi"
    model = _stock(path, 5 * MIB, [3, 1, 4])
    recorder = Recorder(seed=1)
    storage = recorder.storage(path.read_bytes())
    await (await _open(storage)).make_room()
    path.write_bytes(storage.content)
    images.check(path, "vdi")
    assert _header(path).data_offset == MIB + 1024 and flat.content(path, "vdi") == model
    unclean = 0
    for state in Replay(recorder, None, 1).states(STATES):
        path.write_bytes(state.contents[0])
        result = await flat.check_alone(VdiDriver, path)
        assert result.corruptions == 0, str(state)
        unclean += result.leaks > 0
        assert flat.content(path, "vdi") == model, str(state)
        images.qemu_io(path, "vdi", ["write -P 0x77 2M 512"])
        changed = bytearray(model)
        changed[2 * MIB : 2 * MIB + 512] = b"\x77" * 512
        assert flat.content(path, "vdi") == changed, str(state)
        driver = await open_with(VdiDriver, path)
        await driver.make_room()
        await driver.close()
        images.check(path, "vdi")
        assert flat.content(path, "vdi") == changed, str(state)
    assert unclean


def _without_room(order: Sequence[int]) -> bytes:
    """An image that there can be no room made in: its header has more blocks than the disk."""
    header = dataclasses.replace(
        layout.plan(5 * MIB), data_offset=1024, blocks=20, blocks_allocated=len(order), uuid=layout.NO_UUID
    )
    entries = [order.index(block) if block in order else FREE for block in range(20)]
    return header.build() + struct.pack("<20I", *entries).ljust(512, b"\0") + b"d" * len(order) * MIB


async def test_without_room_the_count_is_never_too_low(tmp_path: Path) -> None:
    """Stock calls a count that is too high an error, but what it writes then is nowhere over data."""
    recorder = Recorder(seed=2)
    driver = await _open(recorder.storage(_without_room([2])))
    assert driver.header.data_offset == 1024
    rng = random.Random(2)
    for block in (4, 0, 1, 3):
        await flat.write(driver, block * MIB, rng.randbytes(512))
        await driver.flush()
    await driver.close()
    path = tmp_path / "a.vdi"
    for state in Replay(recorder, None, 1).states(40):
        store = ByteStorage(bytes(state.contents[0]))
        reader = await VdiDriver.open(store, {}, read_only=True)
        result = await reader.check()
        assert result.corruptions == 0, f"{state}: {result.messages}"
        before = await flat.read(reader, 0, 5 * MIB)
        if state.position % 4 == 0:
            path.write_bytes(store.content)
            images.qemu_io(path, "vdi", [f"write -P 0x77 {block}M 512" for block in range(5)])
            after = bytearray(before)
            for block in range(5):
                after[block * MIB : block * MIB + 512] = b"\x77" * 512
            assert flat.content(path, "vdi") == after
