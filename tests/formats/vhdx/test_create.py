"""Making images: qemu-img takes them, with its own idea of every default."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.create import create_vhdx, plan_image
from nbdserve.formats.vhdx.driver import VhdxDriver
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, ZERO
from nbdserve.formats.vhdx.structure import read_structure
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, KIB, MIB, TIB
from tests.formats.vhdx.helpers import child_of, made, node_on, parse, qemu_image, stored
from tests.support import images
from tests.support.images import needs_qemu

OPTIONS = [
    "",
    "block_size=1M",
    "block_size=256M",
    "block_size=600k",
    "block_size=1G",
    "log_size=1",
    "log_size=2500000",
    "block_state_zero=off",
    "subformat=fixed,block_size=1M",
    "subformat=fixed,block_state_zero=off",
    "subformat=dynamic,block_size=2M,log_size=4M",
]
SIZES = [0, 512, MIB, 20 * MIB + 512, GIB, GIB + 512, 100 * GIB, 100 * GIB + MIB, 32 * TIB + 512, 64 * TIB]


@needs_qemu
@pytest.mark.parametrize("options", OPTIONS)
async def test_what_qemu_img_says_of_it(tmp_path: Path, options: str) -> None:
    size = 20 * MIB + 512
    ours, theirs = tmp_path / "ours.vhdx", qemu_image(tmp_path / "theirs.vhdx", size, options)
    storage = await FileStorage.open(str(ours), create=True)
    await VhdxDriver.create(storage, size, parse(options))
    await storage.close()
    images.check(ours, "vhdx")
    images.compare(ours, "vhdx", theirs, "vhdx", strict=True)
    a, b = images.info(ours), images.info(theirs)
    for key in ("virtual-size", "cluster-size", "format", "dirty-flag"):
        assert a[key] == b[key], key


@needs_qemu
@pytest.mark.parametrize("size", SIZES)
def test_block_size_follows_the_size_as_in_qemu_img(tmp_path: Path, size: int) -> None:
    theirs = images.info(qemu_image(tmp_path / "theirs.vhdx", size, "block_state_zero=off"))
    plan = plan_image(size, {})
    assert (plan.parameters.size, plan.parameters.block_size) == (theirs["virtual-size"], theirs["cluster-size"])


@pytest.mark.parametrize("size", SIZES)
async def test_the_table_holds_every_block(size: int) -> None:
    storage = await made(size, "block_state_zero=off,block_size=1M")
    structure = await read_structure(storage)
    assert structure.bat.length >= structure.parameters.bat_entries * 8
    assert storage.size == structure.metadata.end
    assert storage.allocated_size() < 2 * MIB


@pytest.mark.parametrize(
    ("options", "state"), [("block_state_zero=on", ZERO), ("block_state_zero=off", 0), ("subformat=fixed", 6)]
)
async def test_the_state_of_new_blocks(options: str, state: int) -> None:
    """Entries of sector bitmaps are 0 in any case."""
    size = 9 * GIB + MIB
    if "fixed" in options:
        size = 20 * MIB
    storage = await made(size, f"{options},block_size=1M")
    structure = await read_structure(storage)
    table = stored(storage)[structure.bat.offset :]
    ratio = structure.parameters.chunk_ratio
    for block in (0, 1, structure.parameters.blocks - 1, min(ratio, structure.parameters.blocks - 1)):
        entry = int.from_bytes(table[structure.parameters.bat_index(block) * 8 :][:8], "little")
        assert entry & 7 == state
        if state == FULLY_PRESENT:
            assert entry >> 20 == structure.metadata.end // MIB + block
    assert table[ratio * 8 : ratio * 8 + 8] == bytes(8)


@pytest.mark.parametrize(
    ("size", "options", "problem"),
    [
        (64 * TIB + 1, "", "max of 64TB"),
        (MIB, "block_size=3M", "power of two"),
        (MIB, "block_size=many", "block_size: invalid size"),
        (MIB, "log_size=4G", "smaller than 4 GB"),
        (MIB, "log_size=x", "log_size: invalid size"),
        (MIB, "subformat=sparse", "subformat=sparse"),
        (MIB, "subformat=differencing", "backing_file"),
        (MIB, "backing_file=a.vhdx,subformat=fixed,backing_fmt=vhdx", "no other has"),
        (MIB, "backing_file=a.vhdx", "backing_fmt=None"),
        (MIB, "backing_file=a.raw,backing_fmt=raw", "a VHDX image"),
        (MIB, "backing_file=a\\b,backing_fmt=vhdx", "backslashes"),
        (MIB, "block_state_zero=maybe", "on or off"),
        (MIB, "compat=1.1", "unknown vhdx option"),
    ],
)
async def test_what_cannot_be_made(size: int, options: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        VhdxDriver.validate_create(size, parse(options))
    storage = MemoryStorage(b"as it was")
    with pytest.raises(ConfigError, match=problem):
        await VhdxDriver.create(storage, size, parse(options))
    assert stored(storage) == b"as it was"


async def test_a_parent_has_to_be_open() -> None:
    storage = MemoryStorage(b"as it was")
    with pytest.raises(ConfigError, match="identity of its parent"):
        await VhdxDriver.create(storage, MIB, {"backing_file": "p.vhdx", "backing_fmt": "vhdx"})
    assert stored(storage) == b"as it was"


async def test_a_name_too_long_for_a_locator() -> None:
    parent = await read_structure(await made(MIB))
    options = {"backing_file": "a" * 33000, "backing_fmt": "vhdx"}
    with pytest.raises(ConfigError, match="at most 65535"):
        await create_vhdx(MemoryStorage(), MIB, options, parent)


async def test_a_child_takes_after_its_parent() -> None:
    parent = await made(20 * MIB, sector_size=4096)
    child = await read_structure(await child_of(parent, 20 * MIB, ""))
    assert child.parameters.sector_size == 4096
    assert child.parameters.block_size == 2 * MIB
    driver = await VhdxDriver.open(parent, {}, read_only=True)
    storage = MemoryStorage()
    await VhdxDriver.create(storage, MIB, {"backing_file": "p", "backing_fmt": "vhdx"}, backing=driver)
    locator = (await read_structure(storage)).locator
    assert locator is not None
    assert locator.linkages("x") == ((await read_structure(parent)).header.data_write_guid,)


@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_sizes_are_rounded_to_sectors(sector_size: int) -> None:
    structure = await read_structure(await made(20 * MIB + 1, sector_size=sector_size))
    assert structure.parameters.size == 20 * MIB + sector_size
    assert structure.parameters.physical_sector_size == sector_size


async def test_what_the_file_held_is_gone() -> None:
    storage = MemoryStorage(b"\xff" * (12 * MIB))
    await VhdxDriver.create(storage, 8 * MIB, {"block_size": "1M", "subformat": "fixed"})
    node = await node_on(storage, read_only=True)
    assert await node.read(0, 8 * MIB) == bytes(8 * MIB)


class _Failing(MemoryStorage):
    """Its write or flush number ``fails`` does, as do all after it."""

    def __init__(self, fails: int) -> None:
        super().__init__()
        self.left = fails

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "no space")

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self._count()
        await super().write(offset, data)

    async def flush(self) -> None:
        self._count()


async def test_an_image_that_was_not_completed_is_none() -> None:
    """Wherever it stops before the end, the file has no signature."""
    done = False
    fails = 0
    while not done:
        storage = _Failing(fails)
        try:
            await create_vhdx(storage, 20 * MIB, {"block_size": "1M"})
            done = True
        except OSError:
            data = bytearray(8)
            assert storage.try_read_into(0, memoryview(data))
            assert data != layout.SIGNATURE or fails == 8
        fails += 1
    assert fails > 8


def test_where_things_are() -> None:
    plan = plan_image(20 * MIB, {"log_size": "3M", "subformat": "fixed", "block_size": "8M"})
    assert (plan.log.offset, plan.bat.offset, plan.metadata.offset) == (MIB, 4 * MIB, 5 * MIB)
    assert plan.end == 6 * MIB + 24 * MIB
    assert plan_image(64 * TIB, {"block_size": "1M"}).bat.length == 513 * MIB
    assert 64 * KIB == layout.METADATA_TABLE_LENGTH
