"""Bochs growing disks as its ``bximage`` and its redolog code lay them out, built here: no stock tool writes them."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.errors import ImageError, RequestError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.bochs import BochsDriver
from nbdserve.formats.probe import format_of
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB, SECTOR_SIZE, align_up, div_ceil
from tests.support import images


def build(
    disk: int, sectors: dict[int, bytes], *, extent: int = 64 * KIB, version: int = 2, catalog: int = 0, order: int = 1
) -> bytes:
    """A disk of ``disk`` bytes with these sectors; extents are allocated in random order."""
    bitmap = max(1, extent // SECTOR_SIZE // 8)
    room = align_up(bitmap, SECTOR_SIZE)
    per_extent = extent // SECTOR_SIZE
    entries = [0xFFFFFFFF] * (catalog or div_ceil(disk, extent))
    used = sorted({sector // per_extent for sector in sectors})
    random.Random(order).shuffle(used)
    body = bytearray(len(used) * (room + extent))
    for place, index in enumerate(used):
        entries[index] = place
        at = place * (room + extent)
        for sector, data in sectors.items():
            if sector // per_extent == index:
                inside = sector % per_extent
                body[at + inside // 8] |= 1 << inside % 8
                body[at + room + inside * SECTOR_SIZE : at + room + (inside + 1) * SECTOR_SIZE] = data
    head = struct.pack(
        "<32s16s16sIIIII",
        b"Bochs Virtual HD Image",
        b"Redolog",
        b"Growing",
        version << 16,
        512,
        len(entries),
        bitmap,
        extent,
    )
    head += struct.pack("<Q", disk) if version == 1 else struct.pack("<IQ", 7, disk)
    return head.ljust(512, b"\0") + struct.pack(f"<{len(entries)}I", *entries) + bytes(body)


def some_sectors(disk: int, seed: int) -> dict[int, bytes]:
    rng = random.Random(seed)
    found: dict[int, bytes] = {}
    for _ in range(20):
        first = rng.randrange(disk // SECTOR_SIZE)
        for sector in range(first, min(disk // SECTOR_SIZE, first + rng.choice((1, 2, 9, 100)))):
            found[sector] = rng.randbytes(SECTOR_SIZE)
    return found


def guest(disk: int, sectors: dict[int, bytes]) -> bytes:
    content = bytearray(disk)
    for sector, data in sectors.items():
        content[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE] = data
    return bytes(content)


async def open_image(data: bytes) -> BochsDriver:
    return await BochsDriver.open(MemoryStorage(data, path="c.img"), {}, read_only=True)


@images.needs_qemu
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("extent", [512, 4096, 64 * KIB, MIB, 8 * MIB])
@pytest.mark.parametrize("disk", [3 * MIB, 3 * MIB + 512 * 3])
async def test_the_disk_is_the_one_qemu_img_reads(tmp_path: Path, version: int, extent: int, disk: int) -> None:
    sectors = some_sectors(disk, extent)
    wanted = guest(disk, sectors)
    path = tmp_path / "c.img"
    path.write_bytes(build(disk, sectors, extent=extent, version=version, catalog=div_ceil(disk, extent) + 3))
    assert images.info(path)["format"] == "bochs"
    assert images.raw_content(path, "bochs", tmp_path) == wanted
    driver = await open_image(path.read_bytes())
    assert driver.size == disk
    node = Node([driver])
    assert await node.read(0, disk) == wanted
    position = 0
    async for runs in driver.iter_runs(0, disk):
        for start, length, kind, host_offset in zip(
            runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), runs.host_offset.tolist(), strict=True
        ):
            assert start == position
            position += length
            if kind == DATA:
                assert path.read_bytes()[host_offset : host_offset + length] == wanted[start:position]
                assert driver.lookup(start, length) == (DATA, length, host_offset)
            else:
                assert (kind, host_offset) == (UNALLOCATED, -1)
                assert not any(wanted[start:position])
    assert position == disk


def test_it_is_probed() -> None:
    assert format_of(build(MIB, {})) == "bochs"


async def test_bitmaps_are_read_when_they_are_needed() -> None:
    disk = 5000 * 512
    driver = await open_image(build(disk, dict.fromkeys(range(5000), b"x" * 512), extent=512))
    assert driver.lookup(0, 512) is None
    await driver.load(0)
    kind, length, host_offset = driver.lookup(0, 1024) or (-1, 0, 0)
    assert (kind, length) == (DATA, 512)
    assert await driver.storage.read(host_offset, 512) == b"x" * 512
    for offset in range(0, disk, 512):
        await driver.load(offset)
    assert len(driver._bitmaps) == 4096


async def test_it_is_never_written() -> None:
    with pytest.raises(ImageError, match="can only be read"):
        await BochsDriver.open(MemoryStorage(build(MIB, {})), {}, read_only=False)
    assert not BochsDriver.can("allocate")
    assert not BochsDriver.can("create")


IMAGE = build(MIB, some_sectors(MIB, 3))


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [
        (0, b"bochs", "magic"),
        (32, b"Logredo", "type"),
        (48, b"Undoable\0", "subtype"),
        (64, struct.pack("<I", 0x30000), "version"),
        (68, struct.pack("<I", 0), "header_size"),
        (68, struct.pack("<I", 0xFFFFFFFF), "catalog"),
        (72, struct.pack("<I", 15), "disk"),
        (72, struct.pack("<I", 1 << 20), "catalog"),
        (72, struct.pack("<I", 0xFFFFFFFF), "catalog"),
        (76, struct.pack("<I", 0), "bitmap"),
        (76, struct.pack("<I", 15), "bitmap"),
        (76, struct.pack("<I", 0xFFFFFFFF), "bitmap"),
        (80, struct.pack("<I", 0), "extent"),
        (80, struct.pack("<I", 256), "extent"),
        (80, struct.pack("<I", 65537), "extent"),
        (80, struct.pack("<I", 16 * MIB), "extent"),
        (88, struct.pack("<Q", MIB + 512), "disk"),
        (88, struct.pack("<Q", (1 << 64) - 1), "disk"),
    ],
)
async def test_a_bad_field_is_named(at: int, value: bytes, field: str) -> None:
    with pytest.raises(ImageError) as caught:
        await open_image(IMAGE[:at] + value + IMAGE[at + len(value) :])
    assert caught.value.field == field
    assert str(caught.value).startswith("c.img: ")


@pytest.mark.parametrize("length", [0, 100, 511, 512 + 63])
async def test_a_short_file(length: int) -> None:
    with pytest.raises(ImageError):
        await open_image(IMAGE[:length])


async def test_an_extent_behind_the_end_of_the_file() -> None:
    data = bytearray(IMAGE)
    data[512:516] = struct.pack("<I", 1000)
    driver = await open_image(bytes(data))
    with pytest.raises(RequestError, match=r"catalog\[0\] = 0x3e8"):
        driver.lookup(0, 512)
    with pytest.raises(RequestError, match=r"catalog\[0\]"):
        await driver.load(0)
    with pytest.raises(RequestError, match=r"catalog\[0\]"):
        [part async for part in driver.iter_runs(0, MIB)]
    node = Node([driver])
    await node.read(64 * KIB, MIB - 64 * KIB)


async def test_an_empty_terabyte_is_mapped_in_long_runs() -> None:
    driver = await open_image(build(8 * MIB * 131072, {}, extent=8 * MIB))
    parts = [part async for part in driver.iter_runs(0, driver.size)]
    assert len(parts) == 32
    assert sum(int(part.length[0]) for part in parts) == driver.size
