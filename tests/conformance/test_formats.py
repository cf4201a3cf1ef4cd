"""One suite over every driver: what the contract in ``nbdserve.formats.base`` promises, on the images of its kit.

``tests/support/geometries`` says how a format joins.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.create import create as image_create
from nbdserve.errors import ConfigError, ImageError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import DRIVERS, driver_for
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import GIB, MIB, TIB
from tests.support import images
from tests.support.geometries import CRASH_GEOMETRIES, KITS, Geometry, Image, build, judge
from tests.support.model import ModelDisk
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay
from tests.support.workload import Mix, Workload, read_all

SEED = int(os.environ.get("NBDSERVE_SEED", "1"))
READABLE = [geometry for kit in KITS.values() for geometry in kit.geometries + kit.readable]
RESIZABLE = [g for g in CRASH_GEOMETRIES if driver_for(g.fmt).can("resize") and not g.noise]
BYTES = tuple(range(-2, 3))

pytestmark = images.needs_qemu


def stores_of(image: Image, *, read_only: bool = False) -> list[ByteStorage]:
    """The files of the image, in memory."""
    return [
        ByteStorage(bytearray(content), f"/{name}", read_only=read_only)
        for name, content in zip(image.names, image.contents, strict=True)
    ]


def boundaries(node: Node) -> list[int]:
    """Where one cluster, subcluster, table or layer ends and the next begins, and the ends of the disk."""
    size = node.size
    found = {0, size}
    for unit in {512, node.top.granularity, node.top.cluster_size}:
        found |= {unit * number for number in (1, 2, 3, size // unit // 2, size // unit - 1, size // unit)}
    found |= {1 << bits for bits in range(9, size.bit_length())}  # a table covers a power of two, or the whole disk
    found |= {layer.size for layer in node.layers[1:]}
    return sorted(place for place in found if 0 <= place <= size)


def pieces(node: Node, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Ranges that begin or end at a boundary or a byte beside it."""
    for place in boundaries(node):
        for length in (1, 511, 513, rng.randrange(1, 5000)):
            for start in {place + rng.choice(BYTES), place - length + rng.choice(BYTES), place - length // 2}:
                first, end = max(0, start), min(node.size, start + length)
                if first < end:
                    yield first, end - first


async def decided(driver: FormatDriver, offset: int, length: int) -> tuple[int, int, int]:
    """``lookup``, with the tables it needs."""
    for _ in range(3):
        run = driver.lookup(offset, length)
        if run is not None:
            return run
        await driver.load(offset)
    raise AssertionError(f"lookup({offset:#x}) has no table after load")


async def judged(image: Image, contents: Sequence[ByteStorage], wanted: bytes, folder: Path) -> None:
    """After a clean close: we read ``wanted``, so do others, and no checker finds anything."""
    node = await image.open([ByteStorage(bytes(store.content), store.path) for store in contents], read_only=True)
    assert await read_all(node, node.size) == wanted
    if node.top.can("check"):
        result = await node.top.check()
        assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.messages[:5]
    await node.close()
    path = image.write_to(folder, [store.content for store in contents])
    if image.geometry.stock and KITS[image.geometry.fmt].stock_check:
        images.Stock(path, image.geometry.fmt, image.geometry.encryption, image.geometry.secret).check()
    judge(image.geometry, path, folder, wanted)


def test_every_format_joins() -> None:
    assert sorted(KITS) == sorted(DRIVERS)
    for kit in KITS.values():
        assert kit.fields or kit.fmt == "raw", f"{kit.fmt}: the boundary sweep has nothing to do"
        assert bool(kit.geometries) == DRIVERS[kit.fmt].can("lookup_writable"), kit.fmt


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", READABLE, ids=str)
async def test_every_byte_is_read_at_every_boundary(geometry: Geometry) -> None:
    image, rng = build(geometry), random.Random(SEED)
    stores = stores_of(image, read_only=True)
    node = await image.open(stores, read_only=True)
    assert (node.size, node.read_only, node.format) == (len(image.guest), True, geometry.fmt)
    for offset, length in pieces(node, rng):
        assert await node.read(offset, length) == image.guest[offset : offset + length], (offset, length)
    assert await read_all(node, node.size, 1_000_000) == image.guest
    await node.close()
    assert [bytes(store.content) for store in stores] == image.contents, "reading changes nothing"
    assert all(store.closed for store in stores)


@pytest.mark.parametrize("geometry", READABLE, ids=str)
async def test_the_mapping_is_told_the_same_way_by_all_who_tell_it(geometry: Geometry) -> None:
    image, rng = build(geometry), random.Random(SEED)
    node = await image.open(stores_of(image), read_only=True)
    driver = node.top
    size = driver.size
    windows = [(0, size)] + [tuple(sorted(rng.sample(range(size + 1), 2))) for _ in range(6)]
    for start, end in windows:
        at = start
        async for runs in driver.iter_runs(start, end):
            assert len(runs)
            assert runs.start[0] == at
            assert np.array_equal(runs.start[1:], (runs.start + runs.length)[:-1])
            assert (runs.length > 0).all()
            at = int(runs.start[-1] + runs.length[-1])
            for index in {0, len(runs) - 1, *(rng.randrange(len(runs)) for _ in range(20))}:
                first, length = int(runs.start[index]), int(runs.length[index])
                kind, found, host_offset = await decided(driver, first, length)
                assert 0 < found <= length
                if driver.name != "raw":  # its storage knows of holes, which ``lookup`` does not ask for
                    assert kind == runs.kind[index], f"{first:#x}"
                if kind == DATA and driver.name != "raw" and not driver.info().encrypted:  # a map names no such place
                    assert host_offset == runs.host_offset[index]
        assert at == end, "the runs cover the range"
    await node.close()


@pytest.mark.parametrize("geometry", READABLE, ids=str)
async def test_a_lookup_answers_for_a_part_of_what_was_asked(geometry: Geometry) -> None:
    image, rng = build(geometry), random.Random(SEED)
    node = await image.open(stores_of(image), read_only=True)
    for offset, length in pieces(node, rng):
        kind, found, host_offset = await decided(node.top, offset, length)
        assert kind in {DATA, ZERO, UNALLOCATED, COMPRESSED}
        assert 0 < found <= length
        if kind == DATA:
            content = await node.top.data.read(host_offset, found)
            assert content == image.guest[offset : offset + found]
        elif kind == COMPRESSED:
            start, unit = await node.top.read_compressed(offset)
            assert start <= offset < start + len(unit)
            assert (
                unit[offset - start :][:found] == image.guest[offset : offset + min(found, start + len(unit) - offset)]
            )
        elif kind == ZERO:
            assert not any(image.guest[offset : offset + found])
    await node.close()


def test_backing_files_are_longer_and_shorter() -> None:
    """Of formats that take any image for one; a parent of the same format may have to have the same size."""
    for kit in KITS.values():
        based = [geometry for geometry in kit.all if geometry.base not in {"", kit.fmt}]
        if based:
            assert any(geometry.base_size < geometry.size for geometry in based), kit.fmt
            assert any(geometry.base_size > geometry.size for geometry in based), kit.fmt


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES, ids=str)
async def test_every_byte_is_written_at_every_boundary(geometry: Geometry, tmp_path: Path) -> None:
    image, rng = build(geometry), random.Random(SEED)
    stores, content = stores_of(image), bytearray(image.guest)
    node = await image.open(stores)
    ranges = list(pieces(node, rng))
    rng.shuffle(ranges)
    for number, (offset, length) in enumerate(ranges):
        data = rng.randbytes(length)
        await node.write(offset, data, fua=number % 20 == 0)
        content[offset : offset + length] = data
        around = max(0, offset - 600), min(node.size, offset + length + 600)
        assert await node.read(around[0], around[1] - around[0]) == content[slice(*around)], (offset, length)
    assert await read_all(node, node.size) == content
    await node.close()
    assert all(store.closed for store in stores)
    await judged(image, stores, bytes(content), tmp_path)


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES, ids=str)
async def test_zeroes_and_discards_at_every_boundary(geometry: Geometry, tmp_path: Path) -> None:
    image, rng = build(geometry), random.Random(SEED)
    stores, content = stores_of(image), bytearray(image.guest)
    node = await image.open(stores)
    unit = max(node.top.cluster_size, 4096)
    ranges = list(pieces(node, rng))
    ranges += [(place, min(node.size - place, unit * rng.choice((1, 2)))) for place in range(0, node.size, unit)]
    ranges = rng.sample(ranges, min(100, len(ranges)))
    for offset, length in ranges:
        end = offset + length
        way = rng.randrange(4)
        if way == 0:
            data = rng.randbytes(length)
            await node.write(offset, data)
            content[offset:end] = data
        elif way == 1:
            await node.zero(offset, length, unmap=rng.random() < 0.5)
            content[offset:end] = bytes(length)
        elif way == 2:
            try:
                await node.zero(offset, length, fast=True)
                content[offset:end] = bytes(length)
            except OSError as error:
                assert error.errno == errno.ENOTSUP
        else:
            await node.discard(offset, length)
            now = np.frombuffer(await node.read(offset, length), np.uint8)
            old = np.frombuffer(bytes(content[offset:end]), np.uint8)
            assert ((now == 0) | (now == old)).all(), "a discard leaves the old bytes or zeroes"
            content[offset:end] = now.tobytes()
        around = max(0, offset - 600), min(node.size, end + 600)
        assert await node.read(around[0], around[1] - around[0]) == content[slice(*around)], (offset, length, way)
    assert await read_all(node, node.size) == content
    await node.close()
    await judged(image, stores, bytes(content), tmp_path)


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES, ids=str)
async def test_what_was_flushed_is_there_without_anything_later(geometry: Geometry) -> None:
    """The flush waits for the data and for every table that finds it, in the files of the image."""
    image = build(geometry)
    recorder = Recorder(SEED)
    stores = [recorder.storage(content) for content in image.contents]
    node = await image.open(stores)
    model = ModelDisk(image.size, image.guest)
    mix = Mix(largest=128 << 10, in_flight=3)
    await Workload(node, model, random.Random(SEED), mix=mix).run(30)
    wanted = await read_all(node, node.size)
    await node.flush()
    promised = len(recorder.log)
    await Workload(node, model, random.Random(SEED + 1), mix=mix).run(10)
    await node.close()
    del recorder.log[promised:]
    replay = Replay(recorder, model, SEED)
    for entry in recorder.log:
        replay._advance(entry)
    left = [ByteStorage(content, "stable") for content in replay.stable]
    node = await image.open(left, read_only=True)
    assert await read_all(node, node.size) == wanted
    await node.close()


class Held(ByteStorage):
    """Writes wait, once ``held`` is set, until ``go`` is."""

    held = False
    waiting = 0

    def __init__(self, content: bytes | bytearray, path: str) -> None:
        super().__init__(content, path)
        self.go = asyncio.Event()

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return not self.held and super().try_write(offset, data)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        if self.held:
            self.waiting += 1
            await self.go.wait()
        await super().write(offset, data)


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES, ids=str)
async def test_a_cancelled_write_leaves_no_leak(geometry: Geometry, tmp_path: Path) -> None:
    image = build(geometry)
    stores = [Held(store.content, store.path) for store in stores_of(image)]
    node = await image.open(stores)
    await node.write(0, image.guest[:512])
    for store in stores:
        store.held = True
    unit = max(node.top.cluster_size, 4096)
    ranges = [(at, min(unit, node.size - at)) for at in range(0, node.size, max(unit, node.size // 40))]
    writes = [asyncio.create_task(node.write(at, image.guest[at : at + length])) for at, length in ranges]
    bulk = asyncio.create_task(node.write_all([(at, image.guest[at : at + length]) for at, length in ranges[::2]]))
    while sum(store.waiting for store in stores) == 0:
        await asyncio.sleep(0)
    for write in (*writes, bulk):
        write.cancel()
    for store in stores:
        store.held = False
        store.go.set()
    results = await asyncio.gather(*writes, bulk, return_exceptions=True)
    assert any(isinstance(result, asyncio.CancelledError) for result in results)
    assert await read_all(node, node.size) == image.guest
    await node.close()
    await judged(image, stores, image.guest, tmp_path)


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES, ids=str)
async def test_opening_for_writing_and_closing_changes_no_content(geometry: Geometry, tmp_path: Path) -> None:
    image = build(geometry)
    stores = stores_of(image)
    for _ in range(2):
        stores = [ByteStorage(store.content, store.path) for store in stores]
        node = await image.open(stores)
        assert await node.read(0, 512) == image.guest[:512]
        await node.flush()
        await node.close()
    await judged(image, stores, image.guest, tmp_path)


@pytest.mark.parametrize("geometry", [geometry for geometry in READABLE if geometry.fmt != "raw"], ids=str)
async def test_a_failed_open_changes_nothing(geometry: Geometry) -> None:
    """Files cut at every kind of place: opened, or refused by an ImageError that names field and value."""
    image = build(geometry)
    refused = 0
    for index, content in enumerate(image.contents):
        for length in sorted({0, 1, 100, 511, 512, 513, 1024, len(content) // 2, len(content) - 512, len(content) - 1}):
            if not 0 <= length < len(content):
                continue
            stores = stores_of(image)
            stores[index] = ByteStorage(content[:length], f"/{image.names[index]}")
            before = [bytes(store.content) for store in stores]
            for read_only in (True, False):
                try:
                    node = await image.open(stores, read_only=read_only)
                except ImageError as error:
                    refused += 1
                    assert error.field is not None, error
                    assert [bytes(store.content) for store in stores] == before, f"{length} bytes"
                    continue
                if read_only:
                    await node.close()
                    stores = [ByteStorage(store.content, store.path) for store in stores]
    assert refused, "an empty file is no image"


@pytest.mark.parametrize("name", DRIVERS)
def test_whoever_allocates_does_all_of_it(name: str) -> None:
    driver = DRIVERS[name]
    if driver.can("allocate"):
        for method in ("lookup_writable", "publish", "abandon", "flush"):
            assert driver.can(method), method


# --- making ----------------------------------------------------------------------------------------------------------

SIZES = (0, 1, 512, MIB + 512, 3 * GIB, 2 * TIB)


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, kit in KITS.items() for options in kit.create], ids=str
)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_made_is_what_was_asked_for(name: str, options: str, size: int, tmp_path: Path) -> None:
    driver = driver_for(name)
    if not driver.can("create"):
        pytest.skip(f"{name} images are only read")
    (tmp_path / "base").write_bytes(b"\x5a" * MIB)
    path = tmp_path / "image"
    try:
        assert image_create(str(path), str(size), name, options=[options] if options else [], quiet=True) == 0
    except ConfigError:
        assert sorted(os.listdir(tmp_path)) == ["base"], "what cannot be made leaves no file"
        assert size in {0, 1, 2 * TIB} or options, "there are sizes that every format has"
        return
    parsed = dict(item.partition("=")[::2] for item in options.split(",") if item)
    made = driver.created_size(-(-size // 512) * 512, {k: v for k, v in parsed.items() if k != "size"})
    asyncio.run(_is_sound(path, name, made))
    if KITS[name].geometries and KITS[name].geometries[0].stock:
        known = subprocess.run(["qemu-img", "info", "-f", name, path], capture_output=True, check=False, cwd=tmp_path)
        if known.returncode == 0:
            assert images.info(path, name)["virtual-size"] == made
        if known.returncode == 0 and KITS[name].stock_check:
            images.check(path, name, leaks_allowed=True)  # it finds leaks in its own empty Parallels images of 256 GiB


async def _is_sound(path: Path, name: str, size: int) -> None:
    node = await open_image(ImageSpec(str(path), name, read_only=True))
    try:
        info = node.top.info()
        assert (info.format, info.virtual_size, node.size) == (name, size, size)
        assert not info.dirty
        below = b"\x5a" * MIB if node.top.backing is not None else b""
        for offset in {0, max(0, size - 4096)}:
            length = min(4096, size - offset)
            assert await node.read(offset, length) == below[offset : offset + length].ljust(length, b"\0")
        if node.top.can("check"):
            result = await node.top.check()
            assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.messages[:5]
    finally:
        await node.close()


# --- changing the size -----------------------------------------------------------------------------------------------


async def _resized(image: Image, stores: list[ByteStorage], size: int) -> list[ByteStorage] | None:
    """The files after a change of the size, opened anew; None where the format cannot have that size."""
    stores = [ByteStorage(store.content, store.path) for store in stores]
    node = await image.open(stores)
    try:
        await node.top.resize(size)
        assert node.top.size == size
    except ConfigError:
        return None
    finally:
        await node.close()
    return stores


@pytest.mark.parametrize("geometry", RESIZABLE, ids=str)
async def test_what_an_image_grows_by_reads_as_zeroes(geometry: Geometry, tmp_path: Path) -> None:
    image = build(geometry)
    content = image.guest
    node = await image.open(stores_of(image))
    cluster = node.top.cluster_size
    await node.close()
    grown, size, stores = 0, image.size, stores_of(image)
    for more in (512, 3 * max(512, cluster) + 512, 9 * MIB):
        result = await _resized(image, stores, size + more)
        if result is None:
            continue
        grown += 1
        size += more
        content = content.ljust(size, b"\0")
        stores = [ByteStorage(store.content, store.path) for store in result]
        node = await image.open(stores)
        assert (node.size, await read_all(node, size)) == (size, content)
        at = size - more - 256 if size - more >= 256 else 0
        await node.write(at, b"\xa5" * 512)
        content = content[:at] + b"\xa5" * 512 + content[at + 512 :]
        await node.close()
        await judged(image, stores, content, tmp_path)
    assert grown or geometry.base == geometry.fmt, (
        "a format that can be resized can grow, unless its parent's size counts"
    )


@pytest.mark.parametrize("geometry", RESIZABLE, ids=str)
async def test_what_was_cut_off_does_not_come_back(geometry: Geometry, tmp_path: Path) -> None:
    image = build(geometry)
    stores = stores_of(image)
    node = await image.open(stores)
    tail = min(4096, image.size)
    await node.write(image.size - tail, b"\xa5" * tail)
    await node.close()
    content = image.guest[:-tail] + b"\xa5" * tail
    half = image.size // 2 // 512 * 512
    before = [bytes(store.content) for store in stores]
    result = await _resized(image, stores, half)
    if result is None:
        assert [bytes(store.content) for store in stores] == before, "a size that cannot be changes nothing"
        return
    await judged(image, result, content[:half], tmp_path)
    again = await _resized(image, result, image.size)
    assert again is not None
    await judged(image, again, content[:half].ljust(image.size, b"\0"), tmp_path)
