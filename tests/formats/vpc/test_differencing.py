"""Differencing images. Stock QEMU misreads them, so that the judges are libvhdi and a reader by the specification."""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import pyvhdi

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ImageError, UnsupportedImageError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.vpc import bitmaps
from nbdserve.formats.vpc.differencing import DifferencingDriver
from nbdserve.formats.vpc.driver import VpcDriver
from nbdserve.storage.file import FileStorage
from tests.formats.vpc.files import content, make, open_driver, open_node, qemu_io, scribble, stock
from tests.support.recording import Barrier, ByteStorage, Change, Recorder
from tests.support.vhd_reader import NONE, blocks_of, checksum_of, footer_of, read_plainly

SIZE = 10_514_432
BYTE = 8 * 512
"""libvhdi 20260901 takes sectors behind one whose bit is set for set, too, up to the end of the bitmap's byte, so that
content made for it comes in units of 8 sectors; and it misses runs in a read of many sectors: it reads one by one."""


def by_libvhdi(*chain: Path) -> bytes:
    """What libvhdi reads, given the parents."""
    files: list[Any] = []
    try:
        for path in chain:
            files.append(pyvhdi.file())
            files[-1].open(str(path))
        for child, parent in itertools.pairwise(files):
            assert child.get_parent_filename() == Path(chain[files.index(parent)]).name
            assert child.get_parent_identifier() == parent.get_identifier()
            child.set_parent(parent)
        return b"".join(files[0].read_buffer_at_offset(512, at) for at in range(0, files[0].get_media_size(), 512))
    finally:
        for file in files:
            file.close()


@pytest.mark.parametrize("kind", ["dynamic", "fixed", "theirs"])
@pytest.mark.parametrize("unit", [BYTE, 1])
async def test_chains_read_alike(tmp_path: Path, kind: str, unit: int) -> None:
    base, middle, top = (tmp_path / name for name in ("base.vhd", "middle.vhd", "top.vhd"))
    model = bytearray(SIZE)
    if kind == "theirs":
        stock(base, SIZE)
    else:
        await make(base, SIZE, subformat=kind)
    await scribble(base, model, 1, 10, unit)
    chain = [base]
    for number, path in enumerate((middle, top)):
        await make(path, SIZE, chain[0], block_size=("2M", "64k")[number])
        chain.insert(0, path)
        for turn in range(2):
            await scribble(path, model, 10 * number + turn, 6, unit)
            assert await content(path) == model
            assert read_plainly(*(layer.read_bytes() for layer in chain)) == model
            if unit == BYTE:
                assert by_libvhdi(*chain) == model
    footer_of(top.read_bytes())


async def test_only_what_was_written_is_here(tmp_path: Path) -> None:
    base = await make(tmp_path / "base.vhd", SIZE)
    qemu_io(base, f"write -P 1 0 {SIZE}")
    path = await make(tmp_path / "a.vhd", SIZE, base)
    node = await open_node(path)
    await node.write(100, b"x")
    await node.write(8192, b"y" * 4096)
    await node.flush()
    await node.close()
    _, table, here = blocks_of(path.read_bytes())
    assert [place != NONE for place in table] == [True] + [False] * (len(table) - 1)
    assert here[0] == b"\x80\x00\xff" + bytes(509)
    driver = await open_driver(path, read_only=True)
    assert driver.lookup(0, SIZE) is None
    await driver.load(0)
    assert (driver.lookup(0, 100_000) or ())[:2] == (DATA, 512)
    assert driver.lookup(512, 100_000) == (UNALLOCATED, 7680, -1)
    assert (driver.lookup(8200, 100_000) or ())[:2] == (DATA, 4088)
    assert driver.lookup(2 << 20, SIZE - (2 << 20)) == (UNALLOCATED, SIZE - (2 << 20), -1)
    await driver.close()


def foreign(parent: bytes, *, locators: list[tuple[bytes, bytes]], name: str = "") -> bytes:
    """A differencing image as Windows lays it out, with one block, of which sector 1 is here."""
    footer = bytearray(parent[-512:])
    struct.pack_into(">Q", footer, 16, 512)
    struct.pack_into(">I", footer, 60, 4)
    footer[68:84] = bytes(range(16))
    struct.pack_into(">I", footer, 64, 0)
    struct.pack_into(">I", footer, 64, checksum_of(footer, 64))
    size = struct.unpack_from(">Q", footer, 48)[0]
    entries = -(-size // (2 << 20))
    header = bytearray(1024)
    struct.pack_into(">8sQQIII", header, 0, b"cxsparse", (1 << 64) - 1, 1536, 0x10000, entries, 2 << 20)
    header[40:56] = parent[-512:][68:84]
    stored = name.encode("utf-16-be")
    header[64 : 64 + len(stored)] = stored
    data = bytearray(2048)
    for number, (code, path) in enumerate(locators):
        struct.pack_into(">4sIIIQ", header, 576 + 24 * number, code, 1, len(path), 0, len(data))
        data += path.ljust(512, b"\0")
    struct.pack_into(">I", header, 36, checksum_of(header, 36))
    table = [len(data) // 512] + [NONE] * (entries - 1)
    data[:512] = footer
    data[512:1536] = header
    data[1536:2048] = struct.pack(f">{entries}I", *table).ljust(512, b"\xff")
    return bytes(data) + b"\x40" + bytes(511) + b"J" * 512 + b"here" * 128 + b"J" * ((2 << 20) - 1024) + bytes(footer)


@pytest.mark.parametrize(
    ("locators", "name"),
    [
        ([(b"W2ku", "C:\\VMs\\base.vhd".encode("utf-16-le")), (b"W2ru", ".\\base.vhd".encode("utf-16-le"))], "no.vhd"),
        ([(b"W2ku", "C:\\VMs\\base.vhd".encode("utf-16-le"))], "no.vhd"),
        ([(b"MacX", b"file://./base.vhd")], "no.vhd"),
        ([(b"Wi2r", b"base.vhd")], "no.vhd"),
        ([], "base.vhd"),
        ([], "D:\\VMs\\base.vhd"),
    ],
)
async def test_images_of_others(tmp_path: Path, locators: list[tuple[bytes, bytes]], name: str) -> None:
    base = await make(tmp_path / "base.vhd", SIZE, subformat="fixed")
    qemu_io(base, "write -P 9 0 8k")
    path = tmp_path / "a.vhd"
    path.write_bytes(foreign(base.read_bytes(), locators=locators, name=name))
    model = bytearray(b"\x09" * 8192).ljust(SIZE, b"\0")
    model[512:1024] = b"here" * 128
    assert await content(path) == model
    node = await open_node(path)
    await node.write(1000, b"new" * 100)
    await node.write(5_000_000, b"n")
    await node.close()
    model[1000:1300] = b"new" * 100
    model[5_000_000:5_000_001] = b"n"
    assert await content(path) == model
    assert read_plainly(path.read_bytes(), base.read_bytes()) == model


async def test_another_parent_is_refused(tmp_path: Path) -> None:
    base = await make(tmp_path / "base.vhd", SIZE)
    path = await make(tmp_path / "a.vhd", SIZE, base)
    await make(base, SIZE)
    with pytest.raises(ImageError, match=r"parent unique id = .*its parent is another image"):
        await open_node(path)


async def test_the_user_may_give_the_parent(tmp_path: Path) -> None:
    base = await make(tmp_path / "base.vhd", SIZE)
    path = await make(tmp_path / "a.vhd", SIZE, base)
    (tmp_path / "moved.raw").write_bytes(b"r" * SIZE)
    base.rename(tmp_path / "moved.vhd")
    with pytest.raises(ImageError, match=r"base\.vhd"):
        await open_node(path)
    for name, fmt, byte in (("moved.vhd", "vpc", 0), ("moved.raw", "raw", ord("r"))):
        node = await open_image(ImageSpec(str(path), "vpc", backing=ImageSpec(str(tmp_path / name), fmt)))
        assert set(await node.read(0, 4096)) == {byte}
        await node.close()


async def test_no_parent_is_named(tmp_path: Path) -> None:
    base = (await make(tmp_path / "base.vhd", SIZE, subformat="fixed")).read_bytes()
    storage = ByteStorage(foreign(base, locators=[(b"W2ku", "C:\\".encode("utf-16-le"))]))
    with pytest.raises(ImageError, match="parent name"):
        await VpcDriver.open(storage, {}, read_only=True)
    driver = await VpcDriver.open(storage, {"has_backing": True}, read_only=True)
    assert driver.info().backing is None


async def test_a_parent_outside_the_roots(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    base = await make(tmp_path / "base.vhd", SIZE)
    path = tmp_path / "in" / "a.vhd"
    path.write_bytes(foreign(base.read_bytes(), locators=[(b"W2ru", "..\\base.vhd".encode("utf-16-le"))]))
    with pytest.raises(ImageError, match="outside the image roots"):
        await open_node(path)


async def test_blocks_without_bitmaps(tmp_path: Path) -> None:
    base = (await make(tmp_path / "base.vhd", 512, subformat="fixed", force_size="on")).read_bytes()
    data = bytearray(foreign(base, locators=[], name="base.vhd"))
    struct.pack_into(">I", data, 512 + 32, 2048)
    with pytest.raises(UnsupportedImageError, match="block size"):
        await VpcDriver.open(ByteStorage(data), {}, read_only=True)


async def test_bits_are_stable_after_the_data(tmp_path: Path) -> None:
    base = await make(tmp_path / "base.vhd", 1 << 20, force_size="on")
    path = await make(tmp_path / "a.vhd", 1 << 20, base, block_size="4k")
    recorder = Recorder(jitter=0)
    driver = await VpcDriver.open(recorder.storage(path.read_bytes()), {}, read_only=False)
    node = Node([driver])
    await node.write(4096, b"d" * 4096)
    await node.flush()
    place = blocks_of(bytes(recorder.stores[0].content))[1][1] * 512
    changes = [entry for entry in recorder.log if isinstance(entry, Change)]
    data = next(change for change in changes if change.offset == place + 512)
    bits = next(change for change in changes if change.offset == place and any(change.data))
    between = recorder.log[recorder.log.index(data) : recorder.log.index(bits)]
    assert any(isinstance(entry, Barrier) for entry in between)
    assert bits.data == b"\xff" + bytes(511)


async def test_a_write_that_failed_does_not_show(tmp_path: Path) -> None:
    base = await make(tmp_path / "base.vhd", SIZE)
    path = await make(tmp_path / "a.vhd", SIZE, base)
    driver = await open_driver(path)
    await driver.prepare(0, 4096)
    allocation = driver.allocate(0, 4096)
    assert allocation is not None
    assert not allocation.zeroed
    await driver.data.write(allocation.host_offset, b"J" * 4096)
    driver.abandon(allocation)
    assert driver.lookup(0, 4096) == (UNALLOCATED, 4096, -1)
    await driver.close()
    assert not any(await content(path))


async def test_allocations_end_at_what_is_here(tmp_path: Path) -> None:
    base = await make(tmp_path / "base.vhd", SIZE)
    driver = await open_driver(await make(tmp_path / "a.vhd", SIZE, base))
    assert isinstance(driver, DifferencingDriver)
    await driver.prepare(4096, 512)
    allocation = driver.allocate(4096, 512)
    assert allocation is not None
    driver.publish(allocation)
    before = driver.allocate(0, 1 << 20)
    behind = driver.allocate(4608, 4 << 20)
    assert before is not None
    assert behind is not None
    assert (before.length, behind.length) == (4096, (2 << 20) - 4608)
    for unused in (before, behind):
        driver.abandon(unused)
    assert all(bitmap.pins == 0 for bitmap in driver.bitmaps.recent.values())
    await driver.close()


async def test_few_bitmaps_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmaps, "CACHE_BYTES", 0)
    monkeypatch.setattr(bitmaps.BitmapCache.__init__, "__defaults__", (0,))
    base = await make(tmp_path / "base.vhd", SIZE)
    path = await make(tmp_path / "a.vhd", SIZE, base, block_size="4k")
    node = await open_node(path)
    model = bytearray(SIZE)
    rng = random.Random(5)

    async def one() -> None:
        for _ in range(60):
            at = rng.randrange(SIZE - 600)
            data = rng.randbytes(rng.choice((1, 600)))
            model[at : at + len(data)] = data
            await node.write(at, data)
            if rng.random() < 0.1:
                await node.flush()

    await asyncio.gather(*(one() for _ in range(4)))
    assert isinstance(node.top, DifferencingDriver)
    assert len(node.top.bitmaps.recent) <= 4
    assert await node.read(0, SIZE) == model
    await node.close()
    assert await content(path) == model


async def test_loading_a_bitmap_once(tmp_path: Path) -> None:
    base = await make(tmp_path / "base.vhd", SIZE)
    path = await make(tmp_path / "a.vhd", SIZE, base)
    await scribble(path, bytearray(SIZE), 1, 3)
    storage = await FileStorage.open(str(path), read_only=True)
    driver = await VpcDriver.open(storage, {}, read_only=True)
    await asyncio.gather(*(driver.load(0) for _ in range(5)))
    assert driver.lookup(0, 512) is not None
    await driver.close()
