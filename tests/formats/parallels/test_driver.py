"""The Parallels driver beside qemu-img."""

from __future__ import annotations

import dataclasses
import errno
import random
import struct
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, CorruptImageError, RequestError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.parallels import layout
from nbdserve.formats.parallels.driver import ParallelsDriver
from nbdserve.formats.parallels.layout import CLOSED, IN_USE, MAGIC_V1, Header, plan
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB, TIB
from tests.formats import flat
from tests.formats.flat import open_with
from tests.support import images

pytestmark = images.needs_qemu


def _header(path: Path) -> Header:
    data = path.read_bytes()
    return Header.parse(data, str(path), len(data))


def _entries(path: Path) -> list[int]:
    return list(struct.unpack_from(f"<{_header(path).bat_entries}I", path.read_bytes(), 64))


def _patch(path: Path, at: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<I", value))


def _v1(path: Path, size: int, cluster_size: int, data_offset: int = 0) -> Path:
    """An image with entries in sectors, which qemu-img reads and writes, but does not make."""
    header = dataclasses.replace(plan(size, cluster_size=cluster_size), magic=MAGIC_V1, data_offset=data_offset)
    start = data_offset or -(-header.bat_end // 512) * 512
    path.write_bytes(header.build().ljust(start, b"\0"))
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "cluster_size=64k", "cluster_size=32256", "cluster_size=512"])
@pytest.mark.parametrize("size", [0, 512, 60 * KIB, 5 * MIB + 512])
async def test_what_stock_writes_is_read(tmp_path: Path, size: int, options: str) -> None:
    path = tmp_path / "a.hds"
    images.create(path, size, fmt="parallels", options=options)
    model = bytearray(size)
    if size:
        images.qemu_io(path, "parallels", images.random_qemu_io(random.Random(size), size, 8, model))
    driver = await open_with(ParallelsDriver, path, read_only=True)
    assert await flat.read(driver, 0, size) == model
    await flat.agrees(driver)
    await driver.close()


async def test_the_map(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    images.create(path, 9 * MIB + 512, fmt="parallels")
    images.qemu_io(path, "parallels", ["write 7M 1k", "write 1M 2M", "write 9M 512", "write 8M 1M"])
    driver = await open_with(ParallelsDriver, path, read_only=True)
    assert await flat.mapping(driver) == [
        (0, MIB, UNALLOCATED, -1),
        (MIB, 2 * MIB, DATA, 2 * MIB),
        (3 * MIB, 4 * MIB, UNALLOCATED, -1),
        (7 * MIB, MIB, DATA, MIB),
        (8 * MIB, MIB, DATA, 5 * MIB),
        (9 * MIB, 512, DATA, 4 * MIB),
    ]
    await driver.close()


async def test_info_is_that_of_qemu_img(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.hds", 5 * MIB + 512, "parallels")
    stock = images.info(path)
    driver = await open_with(ParallelsDriver, path, read_only=True)
    info = driver.info()
    assert stock["format"] == info.format == "parallels"
    assert stock["virtual-size"] == info.virtual_size == 5 * MIB + 512
    assert "cluster-size" not in stock and info.cluster_size is None
    assert "format-specific" not in stock and not info.specific
    await driver.close()


async def test_opening_and_reading_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    images.create(path, 5 * MIB, fmt="parallels")
    images.qemu_io(path, "parallels", ["write 3M 1M", "write 1M 1M"])
    before = path.read_bytes()
    driver = await open_with(ParallelsDriver, path)
    assert await flat.read(driver, 0, 2 * MIB) == bytes(MIB) + b"\xcd" * MIB
    await driver.flush()
    await driver.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize(("entry", "problem"), [(1, "share their place"), (9, "outside the file"), (0xFFFFFFFF, "out")])
async def test_faulty_tables_are_read_only(tmp_path: Path, entry: int, problem: str) -> None:
    path = tmp_path / "a.hds"
    images.create(path, 5 * MIB, fmt="parallels")
    images.qemu_io(path, "parallels", ["write 3M 1M"])
    _patch(path, 64 + 16, entry)
    with pytest.raises(CorruptImageError, match=f"1 clusters .*{problem}.*guest offset 0x400000"):
        await open_with(ParallelsDriver, path)
    driver = await open_with(ParallelsDriver, path, read_only=True)
    if entry > 1:
        with pytest.raises(RequestError, match="invalid map entry") as caught:
            await flat.read(driver, 4 * MIB, 1)
        assert caught.value.errno == errno.EIO
    await driver.close()


async def test_an_entry_inside_the_header_is_invalid(tmp_path: Path) -> None:
    path = _v1(tmp_path / "a", MIB, 4096, 8192)
    _patch(path, 64, 8)
    driver = await open_with(ParallelsDriver, path, read_only=True)
    with pytest.raises(RequestError, match="invalid map entry 0x8"):
        await flat.read(driver, 0, 1)
    await driver.close()
    with pytest.raises(CorruptImageError, match="outside the file, or not aligned"):
        await open_with(ParallelsDriver, path)


# --- making and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", ["1M", "64k", "32256", "512"])
@pytest.mark.parametrize("size", [0, 512, 5 * MIB + 512])
async def test_what_is_made_is_what_qemu_img_makes(tmp_path: Path, size: int, cluster_size: str) -> None:
    ours = await flat.make(tmp_path / "a.hds", size, "parallels", cluster_size=cluster_size)
    images.create(tmp_path / "b.hds", size, fmt="parallels", options=f"cluster_size={cluster_size}")
    made = bytearray(ours.read_bytes())
    assert _header(ours).in_use == CLOSED
    made[44:48] = bytes(4)  # QEMU leaves it to the first close to say that the image is closed
    assert made == (tmp_path / "b.hds").read_bytes()


async def test_making_drops_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    path.write_bytes(b"x" * 4 * MIB)
    await flat.make(path, 3 * MIB, "parallels")
    assert path.stat().st_size == MIB and not any(_entries(path))


async def test_two_tebibytes(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.hds", 2 * TIB, "parallels")
    driver = await open_with(ParallelsDriver, path)
    await flat.write(driver, 2 * TIB - 100, b"x" * 100)
    await flat.write(driver, TIB - 100, b"y" * 200)
    await driver.close()
    images.check(path, "parallels")
    images.qemu_io(path, "parallels", [f"read -P 0x78 {2 * TIB - 100} 100", f"read -P 0x79 {TIB - 100} 200"])


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (MIB, {"cluster_size": "0"}),
        (MIB, {"cluster_size": "3G"}),
        (MIB, {"cluster_size": "much"}),
        (MIB, {"backing_file": "x"}),
        (1 << 50, {"cluster_size": "512"}),
    ],
)
def test_bad_options(size: int, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"cluster_size=|no backing file"):
        ParallelsDriver.validate_create(size, options)


@pytest.mark.parametrize("by", ["stock", "ours", "v1", "v1-odd"])
@pytest.mark.parametrize("cluster_size", [MIB, 64 * KIB, 63 * 512])
async def test_both_write_in_turn(tmp_path: Path, by: str, cluster_size: int) -> None:
    size, path = 3 * MIB + 512, tmp_path / "a.hds"
    if by == "stock":
        images.create(path, size, fmt="parallels", options=f"cluster_size={cluster_size}")
    elif by == "ours":
        await flat.make(path, size, "parallels", cluster_size=str(cluster_size))
    else:
        _v1(path, size, cluster_size, 0 if by == "v1" else 4096 + 512)
    model = bytearray(size)
    for turn in range(3):
        driver = await open_with(ParallelsDriver, path)
        await flat.random_changes(driver, model, 30, seed=turn)
        await flat.agrees(driver)
        await driver.close()
        assert flat.content(path, "parallels") == model
        images.check(path, "parallels")
        images.qemu_io(path, "parallels", images.random_qemu_io(random.Random(turn), size, 10, model))
        images.check(path, "parallels")
        assert flat.content(path, "parallels") == model


async def test_a_cluster_of_which_a_part_is_written_shows_nothing_stale(tmp_path: Path) -> None:
    """Stock takes the space behind the last cluster for zeroes; so nothing may be there when we close."""
    path = await flat.make(tmp_path / "a.hds", 9 * MIB, "parallels")
    driver = await open_with(ParallelsDriver, path)
    await flat.write(driver, 0, b"s" * 4 * MIB)
    await driver.flush()
    assert await flat.change(driver, "discard", MIB, 3 * MIB)
    await driver.flush()
    await flat.write(driver, 6 * MIB + 5, b"x")
    assert await flat.read(driver, 6 * MIB, MIB) == b"\0\0\0\0\0x".ljust(MIB, b"\0")
    await driver.close()
    assert path.stat().st_size == 3 * MIB
    images.qemu_io(path, "parallels", ["write -P 7 8M 512", "read -P 0 8389120 1048064"])


async def test_a_cancelled_write_leaves_nothing_behind_the_last_cluster(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.hds", 9 * MIB, "parallels")
    driver = await open_with(ParallelsDriver, path)
    await flat.write(driver, 0, b"s" * MIB)
    for _ in range(2):
        allocation = driver.allocate(4 * MIB, MIB)
        assert allocation is not None
        await driver.data.write(allocation.host_offset, b"lost" * (MIB // 4))
    await driver.close()
    assert path.stat().st_size == 2 * MIB
    images.check(path, "parallels")
    images.qemu_io(path, "parallels", ["write -P 7 8M 512", "read -P 0 8389120 1048064"])


# --- in use ----------------------------------------------------------------------------------------------------------


async def test_the_image_is_in_use_before_the_first_change(tmp_path: Path) -> None:
    storage = _Recorder()
    await ParallelsDriver.create(storage, 5 * MIB, {})
    driver = await ParallelsDriver.open(storage, {}, read_only=False)
    storage.log.clear()
    await flat.write(driver, 0, b"x")
    assert storage.log == [0, -1, MIB]
    assert (await storage.read(44, 4)) == struct.pack("<I", IN_USE)
    storage.log.clear()
    await driver.flush()
    assert storage.log == [-1, 64, -1]
    storage.log.clear()
    await flat.write(driver, 5, b"x")
    await driver.flush()
    assert storage.log == [MIB + 5, -1]


async def test_an_overwrite_is_a_change_too(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    images.create(path, 5 * MIB, fmt="parallels")
    images.qemu_io(path, "parallels", ["write 3M 1M"])
    driver = await open_with(ParallelsDriver, path)
    await flat.write(driver, 3 * MIB, b"x")
    assert _header(path).in_use == IN_USE
    await driver.close()
    assert _header(path).in_use == CLOSED


async def test_an_image_that_was_not_closed_is_usable_and_then_closed(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.hds", 5 * MIB, "parallels")
    driver = await open_with(ParallelsDriver, path)
    await flat.write(driver, 3 * MIB, b"x")
    await driver.flush()
    await driver.storage.close()
    with path.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"junk" * MIB)
    driver = await open_with(ParallelsDriver, path)
    assert await flat.read(driver, 3 * MIB, 2) == b"x\0"
    await flat.write(driver, MIB + 7, b"y")
    assert await flat.read(driver, MIB, 9) == b"\0\0\0\0\0\0\0y\0"
    await driver.close()
    images.check(path, "parallels")
    assert path.stat().st_size == 3 * MIB


async def test_the_empty_flag_goes_with_the_first_change(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.hds", 5 * MIB, "parallels")
    _patch(path, 52, 0xF1)
    driver = await open_with(ParallelsDriver, path)
    await flat.write(driver, 0, b"x")
    await driver.close()
    assert _header(path).flags == 0xF0


# --- zeroing ---------------------------------------------------------------------------------------------------------


async def test_zeroing_with_and_without_unmapping(tmp_path: Path) -> None:
    path = await flat.make(tmp_path / "a.hds", 9 * MIB + 512, "parallels")
    driver = await open_with(ParallelsDriver, path)
    await flat.write(driver, 2 * MIB, b"x" * 3 * MIB)
    await flat.write(driver, 9 * MIB, b"x" * 512)
    assert await flat.change(driver, "zero", 0, 9 * MIB + 512, unmap=False) == [(0, 2 * MIB)]
    assert await flat.change(driver, "zero", 3 * MIB, MIB, unmap=True) == [(3 * MIB, MIB)]
    assert await flat.change(driver, "zero", 8 * MIB, MIB + 512, unmap=True) == [(8 * MIB, MIB + 512)]
    assert [(run[0] // MIB, run[2]) for run in await flat.mapping(driver)] == [
        (0, UNALLOCATED),
        (2, DATA),
        (3, UNALLOCATED),
        (4, DATA),
        (5, UNALLOCATED),
    ]
    await driver.flush()
    await flat.write(driver, 0, b"z")
    await driver.close()
    assert _entries(path) == [2, 0, 1, 0, 3, 0, 0, 0, 0, 0]
    assert path.stat().st_size == 4 * MIB


async def test_over_a_backing_file_nothing_is_unmapped(tmp_path: Path) -> None:
    path, below = await flat.make(tmp_path / "a.hds", 4 * MIB, "parallels"), b"p" * 4 * MIB
    driver = await open_with(ParallelsDriver, path, has_backing=True)
    await flat.write(driver, MIB + 1, b"x", below)
    assert await flat.read(driver, MIB, 3, below) == b"pxp"
    for what, how in (("zero", {"unmap": True}), ("discard", {})):
        assert await flat.change(driver, what, 0, 4 * MIB, **how) == []
    assert await flat.read(driver, MIB, 3, below) == b"pxp"
    await driver.close()


async def test_freed_clusters_are_punched_when_discard_is_unmap(tmp_path: Path) -> None:
    for discard, kept in (("ignore", True), ("unmap", False)):
        path = await flat.make(tmp_path / discard, 9 * MIB, "parallels")
        driver = await open_with(ParallelsDriver, path, discard=discard)
        await flat.write(driver, 0, b"x" * 4 * MIB)
        await driver.flush()
        used = driver.storage.allocated_size()
        await flat.change(driver, "discard", 0, 2 * MIB)
        await driver._commits.settle()
        assert (driver.storage.allocated_size() > used - MIB) == kept
        await driver.close()


# --- resizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize(("cluster_size", "size"), [(MIB, 9 * MIB), (512, MIB), (4096, 9 * MIB), (63 * 512, 40 * MIB)])
async def test_growing(tmp_path: Path, v1: bool, cluster_size: int, size: int) -> None:
    """The table grows in place, or over the clusters behind it, which move."""
    path = tmp_path / "a.hds"
    if v1:
        _v1(path, 100 * KIB, cluster_size)
    else:
        await flat.make(path, 100 * KIB, "parallels", cluster_size=str(cluster_size))
    driver = await open_with(ParallelsDriver, path)
    model = bytearray(100 * KIB)
    await flat.random_changes(driver, model, 20, seed=3)
    await driver.resize(size)
    model.extend(bytes(size - len(model)))
    assert await flat.read(driver, 0, size) == model
    await flat.random_changes(driver, model, 20, seed=4)
    await driver.close()
    images.check(path, "parallels")
    assert flat.content(path, "parallels") == model
    again = await open_with(ParallelsDriver, path)
    await flat.random_changes(again, model, 20, seed=5)
    await again.close()
    images.check(path, "parallels")
    assert flat.content(path, "parallels") == model


async def test_sizes_that_cannot_be_had(tmp_path: Path) -> None:
    driver = await open_with(ParallelsDriver, await flat.make(tmp_path / "a", MIB, "parallels", cluster_size="512"))
    with pytest.raises(ConfigError, match="cannot shrink"):
        await driver.resize(512)
    with pytest.raises(ConfigError, match="cannot have"):
        await driver.resize(layout.MAX_BAT_ENTRIES * 512 + 512)
    await driver.close()
    driver = await open_with(ParallelsDriver, _v1(tmp_path / "b", MIB, MIB))
    with pytest.raises(ConfigError, match="cannot have"):
        await driver.resize(2 * TIB)
    await driver.close()


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
