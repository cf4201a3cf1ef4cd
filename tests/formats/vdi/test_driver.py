"""The VDI driver beside qemu-img, and an independent reader where qemu-img knows nothing: differencing images."""

from __future__ import annotations

import dataclasses
import errno
import random
import struct
from pathlib import Path
from uuid import UUID

import pytest

from nbdserve.errors import ConfigError, CorruptImageError, ImageError, RequestError
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.formats.vdi import layout
from nbdserve.formats.vdi.driver import VdiDriver
from nbdserve.formats.vdi.layout import FREE, ZEROED, Header
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB, TIB
from tests.formats import flat
from tests.formats.flat import open_with
from tests.support import images
from tests.support.geometries.vdi import dissected

pytestmark = images.needs_qemu
PARENT, PARENT_MODIFIED = UUID(int=0x1234), UUID(int=0x5678)


def _header(path: Path) -> Header:
    data = path.read_bytes()
    return Header.parse(data[:512], str(path), len(data))


def _entries(path: Path) -> list[int]:
    header, data = _header(path), path.read_bytes()
    return list(struct.unpack_from(f"<{header.blocks}I", data, header.map_offset))


def _patch(path: Path, at: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<I", value))


def _empty(path: Path, header: Header) -> Path:
    entries = struct.pack("<I", FREE) * header.blocks
    path.write_bytes((header.build() + entries).ljust(header.data_offset, b"\0"))
    return path


def _differencing(path: Path, size: int) -> Path:
    """An empty image on a parent."""
    header = dataclasses.replace(
        layout.plan(size),
        type=layout.TYPE_DIFFERENCING,
        uuid=UUID(int=9),
        uuid_modified=UUID(int=10),
        uuid_parent=PARENT,
        uuid_parent_modified=PARENT_MODIFIED,
    )
    return _empty(path, header)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", ["off", "on"])
@pytest.mark.parametrize("size", [0, 512, MIB - 512, MIB, 5 * MIB + 512])
async def test_what_stock_writes_is_read(tmp_path: Path, size: int, static: str) -> None:
    path = tmp_path / "a.vdi"
    images.create(path, size, fmt="vdi", options=f"static={static}")
    model = bytearray(size)
    if size:
        images.qemu_io(path, "vdi", images.random_qemu_io(random.Random(size), size, 8, model))
    driver = await open_with(VdiDriver, path, read_only=True)
    assert await flat.read(driver, 0, size) == model
    if static == "off":
        await flat.agrees(driver)
    await driver.close()


async def test_the_map_is_that_of_qemu_img(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    images.create(path, 9 * MIB + 512, fmt="vdi")
    images.qemu_io(path, "vdi", ["write 7M 1k", "write 1M 2M", "write 9M 512", "write 8M 1M"])
    driver = await open_with(VdiDriver, path, read_only=True)
    base = driver.header.data_offset
    assert await flat.mapping(driver) == [
        (0, MIB, ZERO, -1),
        (MIB, 2 * MIB, DATA, base + MIB),
        (3 * MIB, 4 * MIB, ZERO, -1),
        (7 * MIB, MIB, DATA, base),
        (8 * MIB, MIB, DATA, base + 4 * MIB),
        (9 * MIB, 512, DATA, base + 3 * MIB),
    ]
    assert (await flat.mapping(driver, MIB + 512, 2 * MIB + 1024))[0] == (MIB + 512, MIB + 512, DATA, base + MIB + 512)
    await driver.close()


async def test_the_holes_of_a_static_image_are_zero(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 9 * MIB, "vdi", static="on")
    images.qemu_io(path, "vdi", ["write 7M 1M", "write 2M 64k"])
    driver = await open_with(VdiDriver, path, read_only=True)
    base = driver.header.data_offset
    assert await flat.mapping(driver) == [
        (0, 2 * MIB, ZERO, base),
        (2 * MIB, 65536, DATA, base + 2 * MIB),
        (2 * MIB + 65536, 5 * MIB - 65536, ZERO, base + 2 * MIB + 65536),
        (7 * MIB, MIB, DATA, base + 7 * MIB),
        (8 * MIB, MIB, ZERO, base + 8 * MIB),
    ]
    assert (await flat.mapping(driver, MIB, 3 * MIB))[0] == (MIB, MIB, ZERO, base + MIB)
    await driver.close()


async def test_info_is_that_of_qemu_img(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 5 * MIB + 512, "vdi")
    stock = images.info(path)
    driver = await open_with(VdiDriver, path, read_only=True)
    info = driver.info()
    assert stock["format"] == info.format == "vdi"
    assert stock["virtual-size"] == info.virtual_size == 5 * MIB + 512
    assert stock["cluster-size"] == info.cluster_size
    assert "format-specific" not in stock and not info.specific
    await driver.close()


async def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 5 * MIB, "vdi")
    before = path.read_bytes()
    driver = await open_with(VdiDriver, path)
    assert await flat.read(driver, 0, 5 * MIB) == bytes(5 * MIB)
    await driver.flush()
    await driver.close()
    assert path.read_bytes() == before


async def test_a_map_entry_outside_the_file_is_an_error_of_the_request(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 5 * MIB, "vdi")
    _patch(path, 512, 1)
    driver = await open_with(VdiDriver, path, read_only=True)
    with pytest.raises(RequestError, match="invalid map entry 0x1 for guest offset 0x64") as caught:
        await flat.read(driver, 100, 1)
    assert caught.value.errno == errno.EIO
    with pytest.raises(RequestError, match="invalid map entry"):
        await flat.mapping(driver)
    await driver.close()
    with pytest.raises(CorruptImageError, match="1 blocks are outside the file"):
        await open_with(VdiDriver, path)


async def test_shared_blocks_are_read_only(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 5 * MIB, "vdi", static="on")
    _patch(path, 512 + 4, 3)
    with pytest.raises(CorruptImageError, match=r"1 blocks share their place .* guest offset 0x300000"):
        await open_with(VdiDriver, path)
    await (await open_with(VdiDriver, path, read_only=True)).close()


async def test_other_block_sizes(tmp_path: Path) -> None:
    path = _empty(tmp_path / "a.vdi", dataclasses.replace(layout.plan(MIB), block_size=4096, blocks=256))
    driver = await open_with(VdiDriver, path)
    model = bytearray(MIB)
    await flat.random_changes(driver, model, 200, seed=1)
    await driver.close()
    assert dissected(path) == model


# --- making and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", ["off", "on"])
@pytest.mark.parametrize("size", [0, 512, MIB, 5 * MIB + 512])
async def test_what_is_made_is_good(tmp_path: Path, size: int, static: str) -> None:
    path = await flat.make(tmp_path / "a.vdi", size, "vdi", static=static)
    images.check(path, "vdi")
    assert flat.content(path, "vdi") == bytes(size)
    header = _header(path)
    assert header.data_offset % MIB == 0
    assert header.type == (2 if static == "on" else 1)
    assert path.stat().st_size == header.data_offset + (header.blocks * MIB if static == "on" else 0)
    assert dissected(path) == bytes(size)


async def test_making_drops_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    path.write_bytes(b"x" * 4 * MIB)
    await flat.make(path, 3 * MIB, "vdi", static="on")
    assert flat.content(path, "vdi") == bytes(3 * MIB)


async def test_two_tebibytes(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 2 * TIB, "vdi")
    driver = await open_with(VdiDriver, path)
    await flat.write(driver, 2 * TIB - 100, b"x" * 100)
    await flat.write(driver, TIB - 100, b"y" * 200)
    await driver.close()
    images.check(path, "vdi")
    images.qemu_io(path, "vdi", [f"read -P 0x78 {2 * TIB - 100} 100", f"read -P 0x79 {TIB - 100} 200"])


@pytest.mark.parametrize("by", ["stock", "ours"])
@pytest.mark.parametrize("static", ["off", "on"])
async def test_both_write_in_turn(tmp_path: Path, by: str, static: str) -> None:
    size, path = 9 * MIB + 512, tmp_path / "a.vdi"
    if by == "stock":
        images.create(path, size, fmt="vdi", options=f"static={static}")
    else:
        await flat.make(path, size, "vdi", static=static)
    model = bytearray(size)
    for turn in range(3):
        driver = await open_with(VdiDriver, path)
        await flat.random_changes(driver, model, 30, seed=turn)
        if static == "off":
            await flat.agrees(driver)
        await driver.close()
        images.check(path, "vdi")
        images.qemu_io(path, "vdi", images.random_qemu_io(random.Random(turn), size, 10, model))
        images.check(path, "vdi")
        assert flat.content(path, "vdi") == model


async def test_an_allocating_write_costs_two_barriers() -> None:
    storage = _Recorder()
    await VdiDriver.create(storage, 5 * MIB, {})
    driver = await VdiDriver.open(storage, {}, read_only=False)
    await flat.write(driver, 0, b"x")
    storage.log.clear()
    await driver.flush()
    second = driver.header.map_offset
    assert storage.log == [second, -1, 0, -1] and second > 512
    await flat.write(driver, MIB, b"x")
    storage.log.clear()
    await driver.flush()
    assert storage.log == [512, -1, 0, -1] and driver.header.map_offset == 512
    await flat.write(driver, 5, b"x")
    storage.log.clear()
    await driver.flush()
    assert storage.log == [-1]
    await driver.close()


async def test_the_file_ends_with_the_last_block(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 5 * MIB, "vdi")
    driver = await open_with(VdiDriver, path)
    await flat.write(driver, 3 * MIB, b"x")
    await driver.close()
    assert path.stat().st_size == 2 * MIB


# --- the density rule ------------------------------------------------------------------------------------------------


async def test_a_failed_allocation_leaves_no_hole(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 9 * MIB, "vdi")
    driver = await open_with(VdiDriver, path)
    model = bytearray(9 * MIB)
    await driver.prepare(0, MIB)
    lost = []
    for number in range(6):
        if number % 2:
            allocation = driver.allocate(8 * MIB, MIB)
            assert allocation is not None
            lost.append(allocation)
        await flat.write(driver, number * MIB, bytes([number + 1]) * 1000)
        model[number * MIB : number * MIB + 1000] = bytes([number + 1]) * 1000
    driver.abandon(lost[0])  # the others are those of writes that were cancelled
    await driver.flush()
    assert _header(path).blocks_allocated == 9
    await driver.close()
    header = _header(path)
    assert sorted(e for e in _entries(path) if e != FREE) == list(range(6))
    assert header.blocks_allocated == 6 and path.stat().st_size == header.data_offset + 6 * MIB
    images.check(path, "vdi")
    images.qemu_io(path, "vdi", [f"write -P 0x66 {7 * MIB} 2M"])
    model[7 * MIB :] = b"\x66" * (2 * MIB)
    assert flat.content(path, "vdi") == model
    images.check(path, "vdi")


@pytest.mark.parametrize("count", [2, 3, 4, 5])
async def test_a_map_with_holes_is_mended(tmp_path: Path, count: int) -> None:
    """Blocks 0 and 3 of the data area, whatever the header counts; stock would overwrite block 3 at counts 2 and 3."""
    path = await flat.make(tmp_path / "a.vdi", 9 * MIB, "vdi")
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"a" * MIB + bytes(2 * MIB) + b"b" * MIB)
    _patch(path, 512 + 4 * 2, 3)
    _patch(path, 512 + 4 * 5, 0)
    _patch(path, layout.BLOCKS_ALLOCATED_AT, count)
    driver = await open_with(VdiDriver, path)
    await driver.close()
    assert _entries(path)[2] == 1 and _entries(path)[5] == 0
    images.check(path, "vdi")
    images.qemu_io(path, "vdi", ["write -P 0x66 8M 1M", "read -P 0x62 2M 1M", "read -P 0x61 5M 1M", "read -P 0 3M 1M"])


async def test_holes_are_used_first_and_hold_nothing_stale(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 9 * MIB, "vdi")
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"a" * 4 * MIB)
    _patch(path, 512 + 4 * 2, 3)
    driver = await open_with(VdiDriver, path)
    await flat.write(driver, 0, b"x")
    assert await flat.read(driver, 0, MIB) == b"x".ljust(MIB, b"\0")
    await driver.close()
    assert _entries(path)[:3] == [0, FREE, 1]


# --- zeroing ---------------------------------------------------------------------------------------------------------


async def test_zeroing_what_is_not_allocated_is_nothing(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.vdi", 9 * MIB + 512, "vdi")
    driver = await open_with(VdiDriver, path)
    await flat.write(driver, 4 * MIB, b"x")
    assert await flat.change(driver, "zero", 0, 9 * MIB + 512, unmap=True) == [(0, 4 * MIB)]
    assert await flat.change(driver, "zero", 5 * MIB, 4 * MIB + 512, unmap=False) == [(5 * MIB, 4 * MIB + 512)]
    assert not driver.can("discard")
    await driver.close()


# --- differencing ----------------------------------------------------------------------------------------------------


async def test_a_differencing_image_needs_its_parent(tmp_path: Path) -> None:
    path = _differencing(tmp_path / "a.vdi", 9 * MIB)
    with pytest.raises(ImageError, match="together with its parent") as caught:
        await open_with(VdiDriver, path)
    assert caught.value.field == "parent UUID" and caught.value.value == str(PARENT)


async def test_only_the_right_parent_is_accepted(tmp_path: Path) -> None:
    child = await open_with(VdiDriver, _differencing(tmp_path / "a.vdi", 9 * MIB), read_only=True, has_backing=True)
    right = dataclasses.replace(layout.plan(9 * MIB), uuid=PARENT, uuid_modified=PARENT_MODIFIED)
    parents = []
    for header in (
        right,
        dataclasses.replace(right, uuid=UUID(int=1)),
        dataclasses.replace(right, uuid_modified=UUID(int=1)),
    ):
        storage = MemoryStorage(header.build(), size=2 * MIB, path="parent")
        parents.append(await VdiDriver.open(storage, {}, read_only=True))
    child.accept_backing(parents[0])
    for parent, field in zip(parents[1:], ("parent UUID", "parent modification UUID"), strict=True):
        with pytest.raises(ImageError, match="parent has 00000000-0000") as caught:
            child.accept_backing(parent)
        assert caught.value.field == field
    with pytest.raises(ImageError, match="a dynamic image leaves nothing to a backing file"):
        parents[0].accept_backing(child)
    await child.close()


async def test_a_differencing_image_is_made_on_its_parent(tmp_path: Path) -> None:
    base = await flat.make(tmp_path / "base.vdi", 9 * MIB, "vdi")
    parent = await open_with(VdiDriver, base, read_only=True)
    options = {"backing_file": "base.vdi", "backing_fmt": "vdi"}
    storage = MemoryStorage()
    with pytest.raises(ConfigError, match="the parent has to be opened"):
        await VdiDriver.create(storage, 9 * MIB, options)
    assert storage.size == 0
    await VdiDriver.create(storage, 9 * MIB, options, backing=parent)
    child = await VdiDriver.open(storage, {"has_backing": True}, read_only=False)
    child.accept_backing(parent)
    assert child.header.differencing and child.header.uuid not in (parent.header.uuid, layout.NO_UUID)
    assert child.info().specific == {"uuid": str(child.header.uuid), "parent-uuid": str(parent.header.uuid)}
    await child.close()
    await parent.close()


async def test_differencing_images_are_read_as_dissect_reads_them(tmp_path: Path) -> None:
    size = 40 * MIB
    base = await flat.make(tmp_path / "base.vdi", size, "vdi")
    below = bytearray(size)
    images.qemu_io(base, "vdi", images.random_qemu_io(random.Random(3), size, 20, below))
    path = _differencing(tmp_path / "a.vdi", size)
    model = bytearray(below)
    for turn in range(3):
        driver = await open_with(VdiDriver, path, has_backing=True)
        await flat.random_changes(driver, model, 15, seed=turn, backing=bytes(below))
        assert await flat.read(driver, 0, size, bytes(below)) == model
        await driver.close()
        assert dissected(path, base) == model
    assert ZEROED in _entries(path) and FREE in _entries(path)


async def test_zeroes_over_a_parent(tmp_path: Path) -> None:
    path, below = _differencing(tmp_path / "a.vdi", 9 * MIB), b"p" * 9 * MIB
    driver = await open_with(VdiDriver, path, has_backing=True)
    await flat.write(driver, MIB, b"x", below)
    assert await flat.change(driver, "zero", 0, 4 * MIB, unmap=True) == [(0, MIB)]
    assert await flat.change(driver, "zero", 2 * MIB, 4 * MIB, unmap=True) == [(2 * MIB, 4 * MIB)]
    assert [(run[1] // MIB, run[2]) for run in await flat.mapping(driver)] == [
        (1, ZERO),
        (1, DATA),
        (4, ZERO),
        (3, UNALLOCATED),
    ]
    await driver.close()
    assert _entries(path) == [ZEROED, 0, ZEROED, ZEROED, ZEROED, ZEROED, FREE, FREE, FREE]
    driver = await open_with(VdiDriver, path, has_backing=True)
    await flat.write(driver, 2 * MIB + 5, b"y", below)
    assert await flat.read(driver, 2 * MIB, 10, below) == bytes(5) + b"y" + bytes(4)
    await driver.close()


# --- resizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", ["off", "on"])
async def test_growing(tmp_path: Path, static: str) -> None:
    path = await flat.make(tmp_path / "a.vdi", 3 * MIB + 512, "vdi", static=static)
    with path.open("r+b") as file:  # junk where the map will grow to
        file.seek(512 + 16)
        file.write(b"\x01" * 4096)
    driver = await open_with(VdiDriver, path)
    await flat.write(driver, 3 * MIB, b"x" * 512)
    await driver.resize(9 * MIB)
    assert driver.size == 9 * MIB
    await flat.write(driver, 8 * MIB, b"y" * 512)
    await driver.close()
    images.check(path, "vdi")
    model = bytearray(9 * MIB)
    model[3 * MIB : 3 * MIB + 512] = b"x" * 512
    model[8 * MIB : 8 * MIB + 512] = b"y" * 512
    assert flat.content(path, "vdi") == model


async def test_sizes_that_cannot_be_had(tmp_path: Path) -> None:
    driver = await open_with(VdiDriver, await flat.make(tmp_path / "a.vdi", 3 * MIB, "vdi"))
    most = (MIB - 512) // 4 * MIB
    with pytest.raises(ConfigError, match="cannot shrink"):
        await driver.resize(2 * MIB)
    with pytest.raises(ConfigError, match=f"room for {most} bytes"):
        await driver.resize(TIB)
    await driver.resize(most)
    await driver.close()
    images.check(tmp_path / "a.vdi", "vdi")
    assert images.info(tmp_path / "a.vdi")["virtual-size"] == most


class _Recorder(MemoryStorage):
    """Logs writes by offset, and flushes as -1."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self.log.append(offset)
        await super().write(offset, data)

    async def flush(self) -> None:
        self.log.append(-1)
