from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.errors import ImageError, RequestError, UnsupportedImageError
from nbdserve.extents import DATA, ZERO
from nbdserve.formats.dmg import layout, lzfse
from nbdserve.formats.dmg.driver import DmgDriver
from nbdserve.storage.memory import MemoryStorage
from tests.formats.dmg.build import ENCODERS, Chunk, Image, content, guest, image_of
from tests.support import images

EVERY_KIND = [layout.ZLIB, layout.RAW, layout.ZERO_FILL, layout.BZIP2, layout.IGNORED, layout.ADC, layout.LZFSE]
DATA_BYTES = content(1 << 20)


async def open_image(data: bytes) -> DmgDriver:
    return await DmgDriver.open(MemoryStorage(data, path="disk.dmg"), {}, read_only=True)


async def check_reads(driver: DmgDriver, wanted: bytes) -> None:
    """In whole, at random places, and where the map says."""
    node = Node([driver])
    assert driver.size == len(wanted)
    assert await node.read(0, node.size) == wanted
    rng = random.Random(len(wanted))
    for _ in range(60):
        offset = rng.randrange(node.size)
        length = min(node.size - offset, rng.choice((1, 512, 700_000)))
        assert await node.read(offset, length) == wanted[offset : offset + length]
    position = 0
    async for runs in driver.iter_runs(0, driver.size):
        for start, length, kind, host_offset in zip(
            runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), runs.host_offset.tolist(), strict=True
        ):
            assert start == position
            position += length
            assert driver.lookup(start, driver.size - start) == (kind, length, host_offset)
            if kind == DATA:
                assert await driver.storage.read(host_offset, length) == wanted[start:position]
                assert driver.lookup(start + 100, 10) == (DATA, 10, host_offset + 100)
            elif kind == ZERO:
                assert not any(wanted[start:position])
    assert position == driver.size


@images.needs_qemu
@pytest.mark.parametrize("resource_fork", [False, True])
@pytest.mark.parametrize("data_fork_offset", [0, 4096])
@pytest.mark.parametrize(
    "kinds",
    [
        [layout.ZLIB],
        [layout.RAW],
        [layout.ZLIB, layout.RAW, layout.ZERO_FILL, layout.IGNORED],
        [layout.ZERO_FILL],
    ],
)
async def test_the_disk_is_the_one_qemu_img_reads(
    tmp_path: Path, kinds: list[int], data_fork_offset: int, resource_fork: bool
) -> None:
    image = image_of(DATA_BYTES, kinds)
    image.data_fork_offset = data_fork_offset
    image.resource_fork = resource_fork
    wanted = guest(image, DATA_BYTES)
    path = tmp_path / "disk.dmg"
    path.write_bytes(image.build())
    facts = images.info(path)
    assert (facts["format"], facts["virtual-size"]) == ("dmg", len(wanted))
    assert images.raw_content(path, "dmg", tmp_path) == wanted
    await check_reads(await open_image(path.read_bytes()), wanted)


@pytest.mark.skipif(not lzfse.available(), reason="the package lzfse is not installed")
@pytest.mark.parametrize("kinds", [EVERY_KIND, *([kind] for kind in EVERY_KIND)])
async def test_every_kind_of_chunk(kinds: list[int]) -> None:
    image = image_of(DATA_BYTES, kinds, seed=len(kinds))
    await check_reads(await open_image(image.build()), guest(image, DATA_BYTES))


@images.needs_qemu
async def test_bzip2_as_qemu_img_reads_it_where_it_can(tmp_path: Path) -> None:
    image = image_of(DATA_BYTES, [layout.BZIP2, layout.ZLIB])
    path = tmp_path / "disk.dmg"
    path.write_bytes(image.build())
    try:
        seen = images.raw_content(path, "dmg", tmp_path)
    except images.ToolError:
        pytest.skip("this qemu-img was built without bzip2")
    assert seen == DATA_BYTES
    await check_reads(await open_image(path.read_bytes()), seen)


@images.needs_qemu
@pytest.mark.parametrize("padding", [1, 100, 511])
async def test_a_trailer_that_is_not_quite_at_the_end(tmp_path: Path, padding: int) -> None:
    """A file that was copied in whole sectors ends in zeroes."""
    image = image_of(DATA_BYTES, [layout.ZLIB])
    data = image.build()
    image.padding = bytes(-len(data) % 512 or padding)
    await check_reads(await open_image(image.build()), DATA_BYTES)
    path = tmp_path / "disk.dmg"
    path.write_bytes(image.build())
    assert images.raw_content(path, "dmg", tmp_path) == DATA_BYTES


async def test_tables_in_any_order() -> None:
    image = image_of(DATA_BYTES, [layout.ZLIB, layout.RAW], tables=5)
    image.tables.reverse()
    image.first_sectors.reverse()
    for chunks in image.tables:
        chunks.reverse()
    await check_reads(await open_image(image.build()), DATA_BYTES)


async def test_a_disk_longer_than_its_chunks() -> None:
    image = Image(100, [[Chunk(layout.RAW, 0, 10, b"x" * 5120), Chunk(layout.RAW, 20, 10, b"y" * 5120)]], [0])
    driver = await open_image(image.build())
    node = Node([driver])
    assert await node.read(0, 5120) == b"x" * 5120
    assert await node.read(10240, 5120) == b"y" * 5120
    for sector in (10, 15, 19, 30, 99):
        with pytest.raises(RequestError, match=f"no chunk has disk sector {sector}"):
            await node.read(sector * 512, 1)
    for start in (0, 12 * 512):
        with pytest.raises(RequestError, match="no chunk has disk sector 1"):
            [part async for part in driver.iter_runs(start, driver.size)]


async def test_chunks_longer_than_the_disk() -> None:
    image = Image(15, [[Chunk(layout.RAW, 0, 10, b"x" * 5120), Chunk(layout.RAW, 10, 10, b"y" * 5120)]], [0])
    await check_reads(await open_image(image.build()), b"x" * 5120 + b"y" * 2560)


async def test_it_is_never_written() -> None:
    with pytest.raises(ImageError, match="can only be read"):
        await DmgDriver.open(MemoryStorage(image_of(DATA_BYTES, [layout.RAW]).build()), {}, read_only=False)
    assert not DmgDriver.can("allocate")
    assert not DmgDriver.can("create")


@pytest.mark.parametrize(
    "kind",
    [
        layout.ZLIB,
        layout.BZIP2,
        layout.ADC,
        pytest.param(layout.LZFSE, marks=pytest.mark.skipif(not lzfse.available(), reason="no lzfse")),
    ],
)
@pytest.mark.parametrize("count", [63, 65])
async def test_a_chunk_of_another_size_than_its_row_says(kind: int, count: int) -> None:
    stored = ENCODERS[kind](DATA_BYTES[: 64 * 512])
    node = Node([await open_image(Image(count, [[Chunk(kind, 0, count, stored)]], [0]).build())])
    with pytest.raises(RequestError, match="data: "):
        await node.read(0, 512)


async def test_damaged_chunks_are_errors_and_the_others_are_read() -> None:
    image = Image(128, [[Chunk(layout.ZLIB, 0, 64, b"junk" * 10), Chunk(layout.RAW, 64, 64, b"y" * 32768)]], [0])
    node = Node([await open_image(image.build())])
    with pytest.raises(RequestError, match=r"disk\.dmg: at 0x0: compressed data"):
        await node.read(0, 512)
    assert await node.read(32768, 32768) == b"y" * 32768


async def test_without_the_package_lzfse_the_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lzfse, "available", lambda: False)
    data = Image(8, [[Chunk(layout.LZFSE, 0, 8, b"bvx-")]], [0]).build()
    with pytest.raises(UnsupportedImageError, match=r"pip install nbdserve\[lzfse\]"):
        await open_image(data)


@pytest.mark.parametrize("data", [b"", b"koly", bytes(511), bytes(512), bytes(5000), b"koly" + bytes(2000)])
async def test_no_trailer(data: bytes) -> None:
    with pytest.raises(ImageError, match="no trailer"):
        await open_image(data)


async def test_an_encrypted_image() -> None:
    with pytest.raises(UnsupportedImageError, match="encrypted"):
        await open_image(b"encrcdsa" + bytes(5000))
