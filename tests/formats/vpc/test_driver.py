"""Dynamic images: with stock tools and dissect in turns, and at every place where something can go wrong."""

from __future__ import annotations

import asyncio
import errno
import json
import random
from pathlib import Path

import pytest
from dissect.hypervisor.disk.vhd import VHD

from nbdserve.block.node import Node
from nbdserve.errors import CorruptImageError, ImageError, RequestError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.vpc.driver import VpcDriver
from tests.formats.vpc.files import content, make, open_driver, open_node, qemu_io, run, same_as_stock, scribble, stock
from tests.support.recording import ByteStorage
from tests.support.vhd_reader import NONE, blocks_of, footer_of, read_plainly

SIZE = 10_514_432


def dissected(path: Path) -> bytes:
    """What dissect.hypervisor reads, going by the footer at the end."""
    with path.open("rb") as file:
        disk = VHD(file)
        data: bytes = disk.read(disk.size)
        return data


def is_well_made(path: Path) -> None:
    """Footers, places and bitmaps are as other readers want them; nothing is behind the last block but the footer."""
    data = path.read_bytes()
    footer_of(data)
    block, table, bitmaps = blocks_of(data)
    for bitmap in bitmaps:
        assert set(bitmap) <= {0xFF}
    ends = [place * 512 + len(bitmap) + block for place, bitmap in zip(table, bitmaps, strict=True) if place != NONE]
    if ends:
        assert len(data) == max(ends) + 512


@pytest.mark.parametrize("maker", ["theirs", "ours", "16k", "4k", "force"])
async def test_everybody_writes_and_reads(tmp_path: Path, maker: str) -> None:
    path = tmp_path / "a.vhd"
    if maker == "theirs":
        stock(path, SIZE)
    else:
        await make(path, SIZE, **{"ours": {}, "force": {"force_size": "on"}}.get(maker, {"block_size": maker}))
    model = bytearray(SIZE)
    rng = random.Random(maker)
    for turn in range(3):
        await scribble(path, model, turn, 10)
        is_well_made(path)
        same_as_stock(path, model)
        if maker != "4k":  # dissect reads a little further than asked, and fails behind the last whole block
            assert dissected(path) == model
        assert read_plainly(path.read_bytes()) == model
        commands = []
        for _ in range(6):
            offset, value = rng.randrange(SIZE), rng.randrange(256)
            length = min(rng.choice((1, 512, 100_000)), SIZE - offset)
            commands.append(f"write -P {value} {offset} {length}")
            model[offset : offset + length] = bytes([value]) * length
        qemu_io(path, *commands)
        assert await content(path) == model


async def test_info_is_qemus(tmp_path: Path) -> None:
    for options in ("subformat=dynamic", "subformat=fixed", "force_size=on"):
        path = stock(tmp_path / "a.vhd", 10_000_384, options)
        theirs = json.loads(run("qemu-img", "info", "--output=json", "-f", "vpc", path))
        driver = await open_driver(path, read_only=True)
        facts = driver.info()
        assert (facts.virtual_size, facts.cluster_size, facts.format) == (
            theirs["virtual-size"], theirs.get("cluster-size"), theirs["format"],
        )  # fmt: skip
        assert not facts.specific
        await driver.close()


async def test_a_foreign_layout(tmp_path: Path) -> None:
    """The table behind the blocks, blocks in any order with gaps, empty bitmaps, a footer of 511 bytes."""
    path = await make(tmp_path / "a.vhd", 40 * 4096, block_size="4k", force_size="on")
    model = bytearray(40 * 4096)
    node = await open_node(path)
    for at in (0, 4000, 30_000, 70_000, 70_600, 100_000):
        await node.write(at, b"%06d" % at * 200)
        model[at : at + 1200] = b"%06d" % at * 200
    await node.close()
    data = path.read_bytes()
    block, table, _ = blocks_of(data)
    foreign = bytearray(data[:1536]).ljust(4096, b"\0")
    entries = [NONE] * 40
    for index in random.Random(1).sample(range(40), 40):
        at = table[index] * 512
        if table[index] != NONE:
            foreign += bytes(512 * (index % 5))
            entries[index] = len(foreign) // 512
            foreign += bytes(512) + data[at + 512 : at + 512 + block]
    table_at = len(foreign)
    foreign += b"".join(entry.to_bytes(4, "big") for entry in entries).ljust(512, b"\xff")
    header = bytearray(foreign[512:1536])
    header[16:24] = table_at.to_bytes(8, "big")
    header[36:40] = bytes(4)
    header[36:40] = (sum(header) ^ 0xFFFF_FFFF).to_bytes(4, "big")
    foreign[512:1536] = header
    path.write_bytes(bytes(foreign) + data[-512:-1])
    assert await content(path) == model
    for at in (4096, 50_000):  # there is a block; there is none
        node = await open_node(path)
        await node.write(at, b"new")
        model[at : at + 3] = b"new"
        await node.close()
        same_as_stock(path, model)
    assert read_plainly(path.read_bytes()) == model


async def test_blocks_without_bitmaps(tmp_path: Path) -> None:
    """Blocks of 2048 bytes, as QEMU reads them: no bitmap, and so an old footer is where data is to be."""
    path = await make(tmp_path / "a.vhd", 20 * 4096, block_size="4k", force_size="on")
    data = bytearray(path.read_bytes())
    header = data[512:1536]
    header[28:36] = (40).to_bytes(4, "big") + (2048).to_bytes(4, "big")
    header[36:40] = bytes(4)
    header[36:40] = (sum(header) ^ 0xFFFF_FFFF).to_bytes(4, "big")
    data[512:1536] = header
    path.write_bytes(data)
    model = bytearray(20 * 4096)
    node = await open_node(path)
    for at in (0, 2048, 9000, 30000, 70000):
        await node.write(at, b"w" * 100)
        model[at : at + 100] = b"w" * 100
    await node.close()
    same_as_stock(path, model)
    assert dissected(path) == model


async def test_bitmaps_are_full_where_anything_is_written(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.vhd", SIZE)
    qemu_io(path, "write -P 7 0 4k", "write -P 7 2M 4k")
    data = bytearray(path.read_bytes())
    _, table, _ = blocks_of(bytes(data))
    for place in table[:2]:
        data[place * 512 : place * 512 + 512] = b"\xf0" + bytes(511)
    path.write_bytes(data)
    node = await open_node(path)
    assert (await node.read(0, 8192)) == b"\7" * 4096 + bytes(4096)
    await node.write(100_000, b"x" * 512)
    await node.close()
    _, _, bitmaps = blocks_of(path.read_bytes())
    assert bitmaps[0] == b"\xff" * 512
    assert bitmaps[1] == b"\xf0" + bytes(511)


async def test_a_read_changes_nothing(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.vhd", SIZE)
    await scribble(path, bytearray(SIZE), 1, 10)
    path.write_bytes(path.read_bytes()[:-512] + b"J" * 70_000 + path.read_bytes()[-512:])
    before = path.read_bytes()
    for read_only in (True, False):
        node = await open_node(path, read_only=read_only)
        await node.read(0, SIZE)
        await node.flush()
        await node.close()
        assert path.read_bytes() == before


async def test_stale_bytes_behind_the_last_block(tmp_path: Path) -> None:
    """Trap 2 of other writers: junk in front of the footer does not become a new block's content, whoever makes it."""
    path = await make(tmp_path / "a.vhd", SIZE)
    data = path.read_bytes()
    path.write_bytes(data[:-512] + b"J" * (5 << 20) + data[-512:])
    node = await open_node(path)
    await node.write(4096, b"x" * 512)
    await node.close()
    qemu_io(path, "write -P 1 2M 512")
    model = bytearray(SIZE)
    model[4096:4608] = b"x" * 512
    model[2 << 20 : (2 << 20) + 512] = b"\1" * 512
    assert await content(path) == model
    same_as_stock(path, model)


async def test_stock_goes_on_where_we_were_killed(tmp_path: Path) -> None:
    """At any moment what stock tools would take for free space is zeroes."""
    path = await make(tmp_path / "a.vhd", SIZE, block_size="64k")
    node = await open_node(path)
    model = bytearray(SIZE)
    for index in range(8):
        await node.write(index * 131072, b"abcd" * 1000)
        model[index * 131072 : index * 131072 + 4000] = b"abcd" * 1000
        copy = tmp_path / "copy.vhd"
        copy.write_bytes(path.read_bytes())
        qemu_io(copy, *(f"write -P 1 {at} 512" for at in range(65536, SIZE, 131072)))
        seen = bytearray(model)
        for at in range(65536, SIZE, 131072):
            seen[at : at + 512] = b"\1" * 512
        same_as_stock(copy, seen)
    await node.close()


async def test_places_are_kept_and_sub_sectors_do_not_get_lost(tmp_path: Path) -> None:
    """Many small writes into one new block at the same time."""
    path = await make(tmp_path / "a.vhd", SIZE)
    node = await open_node(path)
    await asyncio.gather(*(node.write(at * 7, bytes([at % 255 + 1]) * 7) for at in range(300)))
    assert await node.read(0, 2100) == b"".join(bytes([at % 255 + 1]) * 7 for at in range(300))
    await node.close()


async def test_lookup(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vhd", SIZE)
    qemu_io(path, "write 4M 512")
    driver = await open_driver(path)
    assert driver.lookup(0, SIZE) == (UNALLOCATED, 4 << 20, -1)
    kind, length, host_offset = driver.lookup((4 << 20) + 100, SIZE) or (0, 0, 0)
    assert (kind, length) == (DATA, (2 << 20) - 100)
    assert driver.lookup_writable(4 << 20, 512) is None
    await driver.load(4 << 20)
    assert driver.lookup_writable((4 << 20) + 100, 10) == (DATA, 10, host_offset)
    assert driver.allocate(0, 512) is None
    await driver.close()


async def test_a_write_that_failed_leaves_nothing(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.vhd", SIZE)
    driver = await open_driver(path)
    await driver.prepare(0, 4096)
    first = driver.allocate(0, 4096)
    assert first is not None
    await driver.data.write(first.host_offset, b"J" * 4096)
    driver.abandon(first)
    assert driver.lookup(0, 4096) == (UNALLOCATED, 4096, -1)
    assert driver.allocate(0, 4096) is None
    await driver.prepare(0, 4096)
    again = driver.allocate(0, 4096)
    assert again is not None
    assert again.host_offset == first.host_offset
    assert not any(await driver.data.read(again.host_offset, 4096))
    await driver.data.write(first.host_offset, b"J" * 4096)
    driver.abandon(again)
    await driver.close()
    is_well_made(path)
    assert b"JJ" not in path.read_bytes()
    assert not any(await content(path))


async def test_a_file_that_is_not_writable(tmp_path: Path) -> None:
    storage = ByteStorage(stock(tmp_path / "a.vhd", SIZE).read_bytes(), read_only=True)
    with pytest.raises(ImageError, match="read-only"):
        await VpcDriver.open(storage, {}, read_only=False)


@pytest.mark.parametrize(("at", "problem"), [(30, "footer"), (512 + 70, "header")])
async def test_wrong_checksums_are_read_but_not_written(tmp_path: Path, at: int, problem: str) -> None:
    data = bytearray(stock(tmp_path / "a.vhd", SIZE).read_bytes())
    data[at] ^= 1
    if problem == "footer":
        data[-512 + at] ^= 1
    driver = await VpcDriver.open(ByteStorage(data), {}, read_only=True)
    assert driver.size == SIZE
    with pytest.raises(CorruptImageError, match=f"{problem} checksum = 0x.*image check -r all"):
        await VpcDriver.open(ByteStorage(data), {}, read_only=False)


async def test_a_bad_entry(tmp_path: Path) -> None:
    data = bytearray(stock(tmp_path / "a.vhd", SIZE).read_bytes())
    data[1536:1540] = b"\0\x10\0\0"
    driver = await VpcDriver.open(ByteStorage(data), {}, read_only=True)
    with pytest.raises(RequestError, match="block 0") as caught:
        driver.lookup(0, 512)
    assert caught.value.errno == errno.EIO
    assert driver.lookup(2 << 20, 512) == (UNALLOCATED, 512, -1)
    with pytest.raises(CorruptImageError, match="block 0"):
        await VpcDriver.open(ByteStorage(data), {}, read_only=False)


async def test_a_dynamic_image_has_no_parent(tmp_path: Path) -> None:
    driver = await open_driver(stock(tmp_path / "a.vhd", SIZE), read_only=True)
    with pytest.raises(ImageError, match="disk type"):
        driver.accept_backing(driver)
    await driver.close()


async def test_two_tebibytes(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.vhd", 2040 << 30)
    node = await open_node(path)
    for at in (0, 1 << 40, (2040 << 30) - 512):
        await node.write(at, b"z" * 512)
    await node.close()
    node = await open_node(path, read_only=True)
    assert bytes(await node.read((1 << 40) - 512, 1024)) == bytes(512) + b"z" * 512
    assert bytes(await node.read((2040 << 30) - 512, 512)) == b"z" * 512
    await node.close()
    assert path.stat().st_size < 16 << 20
    found = json.loads(run("qemu-img", "map", "--output=json", "-f", "vpc", path))
    assert sum(extent["length"] for extent in found if extent["data"]) == 3 * (2 << 20)


async def test_the_node_of_memory_grows_by_steps(tmp_path: Path) -> None:
    """Blocks one after the other: the file is flushed once for each, and grows in few steps."""
    storage = ByteStorage()
    await VpcDriver.create(storage, SIZE, {"block_size": "64k"})
    driver = await VpcDriver.open(storage, {}, read_only=False)
    node = Node([driver])
    sizes = set()
    for at in range(0, SIZE - 65536, 65536):
        await node.write(at, b"s" * 65536)
        sizes.add(len(storage.content))
    assert len(sizes) < 10
    await node.close()
    assert read_plainly(bytes(storage.content)) == b"s" * (SIZE // 65536 * 65536) + bytes(SIZE % 65536)
