from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ImageError, UnsupportedImageError
from nbdserve.extents import DATA
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.formats.raw_cow.exchange import export_to_qcow2, import_from_qcow2
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.formats.raw_cow.engine import Files, KeptStorage
from tests.support import images
from tests.support.model import stamps

SIZE = 3 * MIB + 512


def make_base(folder: Path) -> bytes:
    content = stamps(2, 0, 2 * MIB + 1024)
    (folder / "base").write_bytes(content)
    return content


async def open_raw_cow(path: Path, *, read_only: bool = False) -> Node:
    return await open_image(ImageSpec(str(path), "raw-cow", read_only=read_only))


async def exported(folder: Path, target: Path) -> None:
    """What the command does."""
    source = await RawCowDriver.open(
        await FileStorage.open(str(folder / "vm.raw-cow")), {"companions": [MemoryStorage()]}, read_only=True
    )
    storage = await FileStorage.open(str(target), create=True)
    backing_file = source.backing.name if source.backing else None
    try:
        await export_to_qcow2(source, storage, raw_file="vm.img", backing_file=backing_file)
    finally:
        await storage.close()
        await source.close()


async def imported(folder: Path, source: Path) -> int:
    """What the command does."""
    raw = await FileStorage.open(str(folder / "vm.img"))
    qcow2 = await Qcow2Driver.open(
        await FileStorage.open(str(source), read_only=True), {"companions": [raw]}, read_only=True
    )
    target = await FileStorage.open(str(folder / "vm.raw-cow"), create=True)
    zeroed = await import_from_qcow2(
        qcow2, raw, target, raw_file="vm.img", backing_file=qcow2.backing.name if qcow2.backing else None
    )
    await target.close()
    await qcow2.close()
    return zeroed


@images.needs_qemu
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("backed", [True, False])
async def test_an_exported_image_is_the_same_disk_to_stock_tools(
    tmp_path: Path, cluster_size: int, backed: bool
) -> None:
    options = {"raw_file": "vm.img", "cluster_size": str(cluster_size)}
    if backed:
        make_base(tmp_path)
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    (tmp_path / "vm.img").write_bytes(b"\xee" * (4 * MIB))
    image = await FileStorage.open(str(tmp_path / "vm.raw-cow"), create=True)
    raw = await FileStorage.open(str(tmp_path / "vm.img"))
    await RawCowDriver.create(image, SIZE, options, companions=[raw])
    await image.close()
    await raw.close()
    node = await open_raw_cow(tmp_path / "vm.raw-cow")
    rng = random.Random(cluster_size)
    for serial in range(40):
        offset, length = images.random_range(rng, SIZE, largest=100 * KIB)
        await node.write(offset, stamps(10 + serial, offset, length))
    await node.write(SIZE - 512, stamps(60, SIZE - 512, 512))
    content = bytes(await node.read(0, SIZE))
    await node.close()
    raw_before = (tmp_path / "vm.img").read_bytes()

    await exported(tmp_path, tmp_path / "vm.qcow2")
    assert (tmp_path / "vm.img").read_bytes() == raw_before, "an export writes metadata alone"
    (tmp_path / "expected").write_bytes(content)
    images.check(tmp_path / "vm.qcow2")
    images.compare(tmp_path / "vm.qcow2", "qcow2", tmp_path / "expected", "raw")
    facts = images.info(tmp_path / "vm.qcow2")
    assert facts["format-specific"]["data"]["data-file"] == "vm.img"
    assert facts.get("backing-filename") == ("base" if backed else None)
    assert (facts["cluster-size"], facts["virtual-size"]) == (cluster_size, SIZE)


@images.needs_qemu
@pytest.mark.parametrize(
    "options", ["cluster_size=512", "cluster_size=64k", "cluster_size=2M", "cluster_size=16k,extended_l2=on"]
)
@pytest.mark.parametrize("backed", [True, False])
async def test_an_imported_image_is_the_disk_stock_tools_wrote(tmp_path: Path, options: str, backed: bool) -> None:
    base = make_base(tmp_path) if backed else b""
    source = tmp_path / "vm.qcow2"
    images.create(source, SIZE, options=f"data_file=vm.img,{options}", backing=("base", "raw") if backed else None)
    content = bytearray(base.ljust(SIZE, b"\0"))
    commands = images.random_qemu_io(random.Random(options), SIZE, 60, content)
    content[: 2 * MIB] = bytes(2 * MIB)
    commands.append("write -q -z 0 2M")
    commands += images.random_qemu_io(random.Random(len(options)), SIZE // 4, 10, content)
    images.qemu_io(source, "qcow2", commands)
    before = source.read_bytes()

    zeroed = await imported(tmp_path, source)
    assert source.read_bytes() == before
    assert backed or not zeroed
    assert zeroed or not backed or "2M" in options
    (tmp_path / "expected").write_bytes(content)
    images.compare(source, "qcow2", tmp_path / "expected", "raw")
    node = await open_raw_cow(tmp_path / "vm.raw-cow")
    assert bytes(await node.read(0, SIZE)) == content
    result = await node.top.check()
    assert (result.corruptions, result.leaks) == (0, 0)

    await node.write(1 * MIB - 5, b"and on it goes")
    content[MIB - 5 : MIB + 9] = b"and on it goes"
    await node.close()
    await exported(tmp_path, tmp_path / "back.qcow2")
    (tmp_path / "expected").write_bytes(content)
    images.check(tmp_path / "back.qcow2")
    images.compare(tmp_path / "back.qcow2", "qcow2", tmp_path / "expected", "raw")


@images.needs_qemu
async def test_a_raw_data_file_stands_alone(tmp_path: Path) -> None:
    source = tmp_path / "vm.qcow2"
    images.create(source, SIZE, options="data_file=vm.img,data_file_raw=on")
    images.qemu_io(source, "qcow2", ["write -P 5 100k 100k"])
    assert await imported(tmp_path, source) == 0
    node = await open_raw_cow(tmp_path / "vm.raw-cow", read_only=True)
    assert node.top.info().specific["raw-file-stands-alone"] is True
    assert await node.read(0, SIZE) == (tmp_path / "vm.img").read_bytes()[:SIZE]


@images.needs_qemu
@pytest.mark.parametrize(
    ("options", "problem"), [("cluster_size=64k", "in the image itself"), ("data_file=vm.img", "internal snapshots")]
)
async def test_what_a_raw_cow_image_cannot_say_is_refused(tmp_path: Path, options: str, problem: str) -> None:
    source = tmp_path / "vm.qcow2"
    images.create(source, SIZE, options=options)
    companions = [KeptStorage()] if "data_file" in options else []
    driver = await Qcow2Driver.open(MemoryStorage(source.read_bytes()), {"companions": companions}, read_only=True)
    if companions:  # stock tools make no snapshot of such an image
        driver.snapshots = [object()]  # type: ignore[list-item]
    target = KeptStorage(b"kept")
    with pytest.raises(UnsupportedImageError, match=problem):
        await import_from_qcow2(driver, MemoryStorage(), target, raw_file="r", backing_file=None)
    assert await target.read(0, 4) == b"kept"


@images.needs_qemu
async def test_data_at_another_offset_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "vm.qcow2"
    images.create(source, SIZE, options="data_file=vm.img")
    raw = MemoryStorage()
    driver = await Qcow2Driver.open(MemoryStorage(source.read_bytes()), {"companions": [raw]}, read_only=False)
    await driver.prepare(0, 65536)
    allocation = driver.allocate(0, 65536)
    assert allocation is not None
    allocation.host_offset = 65536
    driver.publish(allocation)
    assert driver.lookup(0, 512) == (DATA, 512, 65536)
    with pytest.raises(ImageError, match="another offset of the data file"):
        await import_from_qcow2(driver, raw, MemoryStorage(), raw_file="r", backing_file=None)


async def test_a_backing_file_without_a_format_is_not_exported() -> None:
    files = Files(b"base")
    await files.create(MIB)
    driver = await files.driver(read_only=True)
    assert driver.backing is not None
    driver.backing = type(driver.backing)("base", None)
    with pytest.raises(ImageError, match="no format"):
        await export_to_qcow2(driver, MemoryStorage(), raw_file="r", backing_file="base")


@images.needs_qemu
async def test_a_disk_that_has_grown_over_a_longer_backing_file(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    options = {"raw_file": "vm.img", "backing_file": "base", "backing_fmt": "raw"}
    image = await FileStorage.open(str(tmp_path / "vm.raw-cow"), create=True)
    raw = await FileStorage.open(str(tmp_path / "vm.img"), create=True)
    await RawCowDriver.create(image, MIB - 512, options, companions=[raw])
    driver = await RawCowDriver.open(image, {"companions": [raw]}, read_only=False)
    await driver.resize(SIZE)
    await driver.close()
    with pytest.raises(UnsupportedImageError, match="cluster at 0xf0000"):
        await exported(tmp_path, tmp_path / "vm.qcow2")
    node = await open_raw_cow(tmp_path / "vm.raw-cow")
    await node.write(MIB - 1, b"x")
    await node.close()
    await exported(tmp_path, tmp_path / "whole.qcow2")
    (tmp_path / "expected").write_bytes((base[: MIB - 512] + bytes(511) + b"x").ljust(SIZE, b"\0"))
    images.check(tmp_path / "whole.qcow2")
    images.compare(tmp_path / "whole.qcow2", "qcow2", tmp_path / "expected", "raw")
