"""New images: byte for byte those of qemu-img where it makes them, but for identity and time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.raw import RawDriver
from nbdserve.formats.vpc.create import plan_image
from nbdserve.formats.vpc.driver import VpcDriver
from nbdserve.formats.vpc.layout import Footer
from tests.formats.vpc.files import make, open_driver, run, stock
from tests.support.recording import ByteStorage, Change, Recorder
from tests.support.vhd_reader import blocks_of, footer_of


def without_identity(data: bytes) -> list[bytes]:
    """The parts of an image apart from time stamp (24..28), checksum and uuid (64..84) of its footers."""
    parts = []
    for at in (0, len(data) - 512):
        footer = bytearray(data[at : at + 512])
        if footer.startswith(b"conectix"):
            footer[24:28] = bytes(4)
            footer[64:84] = bytes(20)
        parts.append(bytes(footer))
    return [*parts, data[512:-512]]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (10 << 20, {}),
        (1, {}),
        (34816, {"subformat": "fixed"}),
        (10_000_000, {"subformat": "fixed"}),
        (10_000_384, {"force_size": "on"}),
        (1 << 40, {}),
        (5 << 20, {"subformat": "fixed", "force_size": "on"}),
    ],
)
async def test_as_qemu_img_makes_them(tmp_path: Path, size: int, options: dict[str, str]) -> None:
    ours = await make(tmp_path / "ours.vhd", size, **options)
    theirs = stock(tmp_path / "theirs.vhd", size, ",".join(f"{name}={value}" for name, value in options.items()))
    assert without_identity(ours.read_bytes()) == without_identity(theirs.read_bytes())
    footer_of(ours.read_bytes())
    seen = [json.loads(run("qemu-img", "info", "--output=json", "-f", "vpc", path)) for path in (ours, theirs)]
    for name in ("virtual-size", "cluster-size", "format"):
        assert seen[0].get(name) == seen[1].get(name)
    assert VpcDriver.created_size(size, options) == seen[0]["virtual-size"]


async def test_each_has_its_own_identity(tmp_path: Path) -> None:
    uuids = {(await make(tmp_path / f"{i}.vhd", 1 << 20)).read_bytes()[68:84] for i in range(3)}
    assert len(uuids) == 3


async def test_differencing(tmp_path: Path) -> None:
    parent = await make(tmp_path / "parent.vhd", 10 << 20, subformat="fixed")
    child = await make(tmp_path / "child.vhd", 10_514_432, parent)
    data = child.read_bytes()
    assert footer_of(data)["type"] == 4
    assert data[512 + 40 : 512 + 56] == parent.read_bytes()[-512:][68:84]
    block, table, _ = blocks_of(data)
    assert (block, set(table)) == (2 << 20, {0xFFFF_FFFF})
    driver = await open_driver(child)
    assert driver.backing is not None
    assert (driver.backing.name, driver.backing.format) == ("parent.vhd", "vpc")
    assert driver.size == 10_514_432
    await driver.close()


async def test_other_block_sizes(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.vhd", 1 << 20, block_size="16k")
    assert blocks_of(path.read_bytes())[0] == 16384
    assert '"cluster-size": 16384' in run("qemu-img", "info", "--output=json", "-f", "vpc", path)


@pytest.mark.parametrize(
    ("size", "options", "problem"),
    [
        (1 << 20, {"cluster_size": "64k"}, "unknown vpc option 'cluster_size'"),
        (1 << 20, {"subformat": "thin"}, "subformat=thin"),
        (1 << 20, {"subformat": "differencing"}, "backing file"),
        (1 << 20, {"subformat": "dynamic", "backing_file": "a", "backing_fmt": "vpc"}, "backing file"),
        (1 << 20, {"backing_file": "a", "backing_fmt": "raw"}, "backing_fmt=raw"),
        (1 << 20, {"backing_file": "a"}, "backing_fmt=None"),
        (1 << 20, {"backing_fmt": "vpc"}, "backing_fmt needs"),
        (1 << 20, {"force_size": "maybe"}, "force_size=maybe"),
        (1 << 20, {"block_size": "3M"}, "block_size=3145728"),
        (1 << 20, {"block_size": "2048"}, "block_size=2048"),
        (1 << 20, {"block_size": "512M"}, "block_size=536870912"),
        (1 << 20, {"block_size": "big"}, "block_size"),
        (1 << 20, {"block_size": "1M", "subformat": "fixed"}, "fixed images have no blocks"),
        (1 << 40, {"block_size": "4096"}, "blocks"),
        (3 << 40, {}, "2040 GiB"),
        (1 << 20, {"backing_file": "x" * 300, "backing_fmt": "vpc"}, "too long"),
    ],
)
def test_bad_options(size: int, options: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        VpcDriver.validate_create(size, options)


async def test_a_parent_has_to_be_open() -> None:
    options = {"backing_file": "a.vhd", "backing_fmt": "vpc"}
    plan_image(1 << 20, options)
    with pytest.raises(ConfigError, match="has to be opened"):
        await VpcDriver.create(ByteStorage(), 1 << 20, options)
    raw = await RawDriver.open(ByteStorage(bytes(512)), {}, read_only=True)
    with pytest.raises(ImageError, match="format = 'raw'"):
        await VpcDriver.create(ByteStorage(), 1 << 20, options, backing=raw)


async def test_what_was_there_is_gone() -> None:
    storage = ByteStorage(b"old" * 10000)
    await VpcDriver.create(storage, 1 << 20, {})
    assert b"old" not in storage.content


async def test_a_device_is_zeroed() -> None:
    storage = ByteStorage(b"old" * 10000)
    storage.grows_zeroed = False
    storage.truncate = lambda size: ByteStorage.flush(storage)  # type: ignore[method-assign]
    await VpcDriver.create(storage, 1 << 20, {})
    assert Footer.parse(storage.content[2048:2560], "a").sound
    assert b"old" not in storage.content[:2560]


async def test_the_footers_come_last() -> None:
    recorder = Recorder(jitter=0)
    await VpcDriver.create(recorder.storage(b""), 1 << 20, {})
    changes = [entry for entry in recorder.log if isinstance(entry, Change)]
    assert [change.data[:8] for change in changes[-2:]] == [b"conectix"] * 2
    assert recorder.log.index(changes[-2]) - recorder.log.index(changes[-3]) > 1, "no barrier in between"
