"""Opening and closing: what is refused, what is written when, and by whom a parent is known."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ConfigError, CorruptImageError, ImageError, RequestError
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.driver import VhdxDriver
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, NO_GUID
from nbdserve.formats.vhdx.structure import read_structure
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, KIB, MIB
from tests.formats.vhdx.helpers import (
    child_of,
    copy,
    driver_of,
    finish,
    made,
    node_of,
    node_on,
    parent_and_child,
    put_entry,
    qemu_image,
    stored,
)
from tests.support import images
from tests.support.images import needs_qemu


@needs_qemu
@pytest.mark.parametrize("options", ["", "block_size=1M", "subformat=fixed,block_size=4M"])
async def test_info_is_that_of_qemu_img(tmp_path: Path, options: str) -> None:
    path = qemu_image(tmp_path / "a.vhdx", 20 * MIB, options)
    node = await node_of(path, read_only=True)
    facts, theirs = node.top.info(), images.info(path)
    assert facts.format == theirs["format"]
    assert facts.virtual_size == theirs["virtual-size"]
    assert facts.cluster_size == theirs["cluster-size"]
    assert facts.dirty == theirs["dirty-flag"]
    assert facts.specific == {}
    assert "format-specific" not in theirs
    await node.close()


async def test_info_of_a_differencing_image() -> None:
    _, child, _ = await parent_and_child(4 * MIB)
    backing = (await VhdxDriver.open(child, {}, read_only=True)).info().backing
    assert backing is not None
    assert (backing.name, backing.format) == ("parent.vhdx", "vhdx")


@pytest.mark.parametrize("read_only", [True, False])
async def test_opening_modifies_nothing(read_only: bool) -> None:
    storage = await made(8 * MIB)
    before = stored(storage)
    node = await node_on(storage, read_only=read_only)
    assert await node.read(0, 8 * MIB) == bytes(8 * MIB)
    await node.flush()
    assert stored(storage) == before
    if not read_only:
        await finish(node)
        assert stored(storage) == before


async def test_the_first_change_renews_the_identities_and_a_second_does_not() -> None:
    storage = await made(8 * MIB)
    first = (await read_structure(storage)).header
    node = await node_on(storage)
    await asyncio.gather(*(node.write(at * MIB, b"x") for at in range(4)))
    second = (await read_structure(storage)).header
    assert second.file_write_guid != first.file_write_guid
    assert second.data_write_guid != first.data_write_guid
    assert second.sequence_number == first.sequence_number + 2
    assert second.log_guid == NO_GUID
    await node.write(5 * MIB, b"x")
    await node.flush()
    third = (await read_structure(storage)).header
    assert third.log_guid != NO_GUID
    await node.write(6 * MIB, b"x")
    await node.flush()
    assert (await read_structure(storage)).header == third
    await finish(node)
    last = (await read_structure(storage)).header
    assert last.log_guid == NO_GUID
    assert last.data_write_guid == second.data_write_guid


async def test_a_write_in_place_renews_them_too() -> None:
    storage = await made(8 * MIB, "subformat=fixed,block_size=1M")
    first = (await read_structure(storage)).header
    node = await node_on(storage)
    await node.write(0, b"x")
    assert (await read_structure(storage)).header.data_write_guid != first.data_write_guid


async def test_a_file_that_cannot_be_written() -> None:
    storage = await made(8 * MIB)
    storage.read_only = True
    with pytest.raises(ImageError, match="read-only"):
        await VhdxDriver.open(storage, {}, read_only=False)
    await VhdxDriver.open(storage, {}, read_only=True)


async def test_an_image_without_a_log_can_be_read() -> None:
    storage = await made(8 * MIB)
    structure = await read_structure(storage)
    header = structure.header.next(log_length=0)
    await storage.write(layout.HEADER_OFFSETS[0], header.build())
    before = stored(storage)
    await VhdxDriver.open(storage, {}, read_only=True)
    with pytest.raises(ImageError, match="LogLength"):
        await VhdxDriver.open(storage, {}, read_only=False)
    assert stored(storage) == before


async def test_an_image_whose_blocks_are_on_its_tables_can_be_read() -> None:
    storage = await made(8 * MIB)
    await put_entry(storage, 3, 2 * MIB | FULLY_PRESENT)
    before = stored(storage)
    node = await node_on(storage, read_only=True)
    assert (await node.read(3 * MIB, 4))[0] == layout.ZERO
    with pytest.raises(CorruptImageError, match="BAT entry 3"):
        await VhdxDriver.open(storage, {}, read_only=False)
    assert stored(storage) == before


async def test_a_replay_waits_until_the_image_is_known_to_be_good() -> None:
    """The log of a damaged image stays as it is."""
    storage = await made(8 * MIB)
    node = await node_on(storage)
    await node.write(0, b"x" * MIB)
    await node.flush()
    left = copy(storage)
    await put_entry(left, 600, 2 * MIB | FULLY_PRESENT)  # past the entries there are
    await left.write(driver_of(node).structure.metadata.offset, b"METADATA")
    before = stored(left)
    with pytest.raises(ImageError, match="metadata signature"):
        await VhdxDriver.open(left, {}, read_only=False)
    assert stored(left) == before


# --- parents --------------------------------------------------------------------------------------------------------


async def test_a_parent_that_was_written_is_another_one() -> None:
    parent, child, _ = await parent_and_child(4 * MIB)
    node = await node_on(child, parent, read_only=True)
    assert len(node.layers) == 2
    above = await node_on(parent)
    await above.write(0, b"!")
    await finish(above)
    with pytest.raises(ImageError, match="DataWriteGuid") as caught:
        await node_on(child, parent, read_only=True)
    assert caught.value.field == "parent_linkage"
    assert caught.value.value


async def test_a_parent_of_another_format() -> None:
    _, child, _ = await parent_and_child(4 * MIB)
    from nbdserve.formats.raw import RawDriver  # noqa: PLC0415

    raw = await RawDriver.open(MemoryStorage(size=4 * MIB), {}, read_only=True)
    driver = await VhdxDriver.open(child, {}, read_only=True)
    with pytest.raises(ImageError, match="parent is a VHDX image"):
        driver.accept_backing(raw)
    (await VhdxDriver.open(await made(MIB), {}, read_only=True)).accept_backing(raw)


async def _chain(folder: Path) -> ImageSpec:
    for name, backing in (("base", None), ("middle", "base"), ("top", "middle")):
        storage = await FileStorage.open(str(folder / f"{name}.vhdx"), create=True)
        options = {"block_size": "1M"}
        below = None
        if backing:
            options |= {"backing_file": f"{backing}.vhdx", "backing_fmt": "vhdx"}
            below = await open_image(ImageSpec(str(folder / f"{backing}.vhdx"), "vhdx", read_only=True, backing=None))
        await VhdxDriver.create(storage, 4 * MIB, options, backing=None if below is None else below.top)
        await storage.close()
        if below is not None:
            await below.close()
        node = await open_image(ImageSpec(str(folder / f"{name}.vhdx"), "vhdx"))
        await node.write(("base", "middle", "top").index(name) * 512, name.encode())
        await node.close()
    return ImageSpec(str(folder / "top.vhdx"), "vhdx", read_only=True)


async def test_a_chain_of_files(tmp_path: Path) -> None:
    node = await open_image(await _chain(tmp_path))
    assert [Path(layer.path).name for layer in node.layers] == ["top.vhdx", "middle.vhdx", "base.vhdx"]
    assert [(await node.read(at * 512, 6)).rstrip(b"\0") for at in range(3)] == [b"base", b"middle", b"top"]
    await node.close()


async def test_a_header_cannot_lead_out_of_the_roots(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    parent = await read_structure(await made(4 * MIB))
    from nbdserve.formats.vhdx.create import create_vhdx  # noqa: PLC0415

    for name in ("../secret", str(tmp_path / "secret"), "C:/secret", "missing.vhdx"):
        path = tmp_path / "in" / "child.vhdx"
        storage = await FileStorage.open(str(path), create=True)
        await create_vhdx(storage, 4 * MIB, {"backing_file": name, "backing_fmt": "vhdx"}, parent)
        await storage.close()
        with pytest.raises((ImageError, ConfigError)) as caught:
            await open_image(ImageSpec(str(path), "vhdx", read_only=True))
        assert name.rpartition("/")[2] in str(caught.value)


# --- failures -------------------------------------------------------------------------------------------------------


class _Full(MemoryStorage):
    """Writes to the log fail when ``failing``."""

    failing = False

    async def write(self, offset: int, data: object) -> None:
        if self.failing and MIB <= offset < 2 * MIB:
            raise OSError(28, "no space")
        await super().write(offset, data)  # type: ignore[arg-type]


async def test_a_commit_that_failed_is_made_up_for() -> None:
    plain = await made(8 * MIB)
    storage = _Full(stored(plain))
    node = await node_on(storage)
    await node.write(0, b"one")
    await node.flush()
    await node.write(3 * MIB, b"two")
    await node.zero(0, MIB)
    storage.failing = True
    with pytest.raises(OSError, match="no space"):
        await node.flush()
    left = await node_on(MemoryStorage(stored(storage)), read_only=True)
    assert await left.read(0, 3) == b"one"
    assert await left.read(3 * MIB, 3) == bytes(3)
    storage.failing = False
    await node.write(5 * MIB, b"new")  # not where "one" is: nothing says so on disk yet
    await node.flush()
    left = await node_on(MemoryStorage(stored(storage)), read_only=True)
    assert await left.read(0, 3) == bytes(3)
    assert await left.read(3 * MIB, 3) == b"two"
    assert await left.read(5 * MIB, 3) == b"new"


async def test_a_repaired_image_is_opened_anew() -> None:
    storage = await made(8 * MIB)
    node = await node_on(storage)
    await node.write(0, b"x")
    await node.top.check(repair_errors=True)
    with pytest.raises(RequestError, match="open it anew"):
        await node.write(0, b"y")
    assert (await read_structure(storage)).header.log_guid == NO_GUID


async def test_tables_of_a_huge_disk_are_read_as_they_are_needed() -> None:
    storage = await made(64 << 40, "block_size=1M,block_state_zero=off")
    node = await node_on(storage)
    for at in (0, 1 << 40, (64 << 40) - 3):
        await node.write(at, b"abc")
    await node.flush()
    assert len(driver_of(node).bat.recent) == 3
    assert storage.allocated_size() < 8 * MIB
    await finish(node)
    again = await node_on(storage, read_only=True)
    assert [await again.read(at, 3) for at in (0, 1 << 40, (64 << 40) - 3)] == [b"abc"] * 3
    assert await again.read(33 << 40, 10) == bytes(10)


async def test_freed_blocks_at_the_end_are_cut_off() -> None:
    storage = await made(8 * MIB)
    size = storage.size
    node = await node_on(storage, discard="unmap")
    await node.write(0, b"x" * (5 * MIB))
    await node.flush()
    assert storage.size == size + 5 * MIB
    await node.zero(2 * MIB, 3 * MIB)
    await finish(node)
    assert storage.size == size + 2 * MIB


async def test_sizes_that_no_table_is_needed_for() -> None:
    storage = await made(0)
    node = await node_on(storage)
    assert node.size == 0
    assert [piece async for piece in driver_of(node).iter_runs(0, 0)] == []
    await finish(node)
    assert (await read_structure(storage)).parameters.blocks == 0


async def test_a_child_of_a_parent_that_was_not_closed() -> None:
    """What the parent's log holds is replayed in memory, below as on top."""
    parent = await made(4 * MIB)
    node = await node_on(parent)
    await node.write(0, b"below" * KIB)
    await node.flush()
    left = copy(parent)
    before = stored(left)
    child = await child_of(left, 4 * MIB)
    chain = await node_on(child, left)
    await chain.write(3, b"!")
    assert await chain.read(0, 10) == b"bel!wbelow"
    assert stored(left) == before
    assert left.size < GIB


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
async def test_many_changed_tables_are_written_back(kind: str) -> None:
    """However many there are, a few are in memory; zeroing and writing go on, without a flush by the guest."""
    size = 256 * GIB
    parent = await made(size, "block_size=256M")
    if kind == "dynamic":
        storage = await made(size, "block_size=1M,block_state_zero=off")
        node = await node_on(storage)
    else:
        storage = await child_of(parent, size)
        node = await node_on(storage, parent)
    driver = driver_of(node)
    for cache in driver._changed_tables():
        cache._generation = 1
    for number in range(12):
        await node.write(number * 20 * GIB + 512, b"x" * 512)
        await node.zero(number * 20 * GIB + MIB, MIB)
        assert all(len(cache.changed) <= 3 for cache in driver._changed_tables())
    await finish(node)
    again = await node_on(*([storage] if kind == "dynamic" else [storage, parent]), read_only=True)
    for number in range(12):
        assert await again.read(number * 20 * GIB, 1024) == bytes(512) + b"x" * 512


class _Device(MemoryStorage):
    """What a block device is: as long as it is, and full of other bytes."""

    grows_zeroed = False

    async def truncate(self, size: int) -> None:
        if size > self.size:
            raise OSError(22, "a block device cannot grow")


async def test_a_block_device() -> None:
    device = _Device(b"\xee" * (10 * MIB + 512))
    await VhdxDriver.create(device, 8 * MIB, {"block_size": "1M"})
    node = await node_on(device)
    model = bytearray(8 * MIB)
    for at in range(6):
        await node.write(at * MIB + 1000, b"x" * 5000)
        model[at * MIB + 1000 : at * MIB + 6000] = b"x" * 5000
    with pytest.raises(OSError, match="cannot address more"):
        await node.write(7 * MIB, b"x")
    await node.flush()
    assert await node.read(0, 8 * MIB) == model
    await finish(node)
    again = await node_on(device, read_only=True)
    assert await again.read(0, 8 * MIB) == model
    assert (await again.top.check()).corruptions == 0
