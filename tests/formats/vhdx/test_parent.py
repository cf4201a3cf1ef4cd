"""Another parent in the metadata, as independent readers see it."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from dissect.hypervisor.disk.vhdx import VHDX

from nbdserve.errors import ConfigError, RequestError
from nbdserve.formats.base import BackingReference
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.driver import VhdxDriver
from nbdserve.formats.vhdx.layout import Parameters
from nbdserve.formats.vhdx.parent import locator_on, with_parent
from nbdserve.formats.vhdx.structure import Structure, read_structure
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.formats.vhdx.helpers import child_of, copy, driver_of, finish, made, node_on, parent_and_child, stored
from tests.support import images
from tests.support.images import needs_qemu

SIZE = 4 * MIB + 4096
OTHER = UUID("12345678-1234-5678-1234-567812345678")


async def _structures(**options: int) -> tuple[MemoryStorage, Structure, Structure]:
    """A differencing image, its structure, and that of its parent."""
    parent = await made(SIZE, **options)
    child = await child_of(parent, SIZE)
    return child, await read_structure(child), await read_structure(parent)


async def test_independent_readers_see_the_new_parent(tmp_path: Path) -> None:
    parent, child, _ = await parent_and_child(SIZE)
    second = await made(SIZE, "block_size=16M")
    node = await node_on(second)
    await node.write(0, random.Random(1).randbytes(SIZE))
    await finish(node)
    node = await node_on(child, parent)
    for at in range(0, SIZE - 4096, 300 * KIB):
        await node.write(at, b"own " * 256)
    for name, below in (("second one.vhdx", second), ("p.vhdx", parent), ("second one.vhdx", second)):
        opened = await VhdxDriver.open(below, {}, read_only=True)
        await driver_of(node).set_backing(BackingReference(name, "vhdx"), opened)
        await finish(node)
        (tmp_path / name).write_bytes(stored(below))
        (tmp_path / "child.vhdx").write_bytes(stored(child))
        disk = VHDX(tmp_path / "child.vhdx")
        disk.seek(0)
        seen = await node_on(copy(child), below, read_only=True)
        assert disk.read(SIZE) == await seen.read(0, SIZE)
        assert seen.top.backing == BackingReference(name, "vhdx")
    assert (await seen.read(0, SIZE)).count(b"own own ") > 100


@needs_qemu
async def test_stock_tools_take_an_image_that_stands_alone(tmp_path: Path) -> None:
    parent, child, _ = await parent_and_child(SIZE)
    node = await node_on(child, parent)
    model = bytearray(SIZE)
    for at in range(0, SIZE - 4096, 300 * KIB):
        await node.write(at, b"own " * 256)
        model[at : at + 1024] = b"own " * 256
    driver = driver_of(node)
    await driver.set_backing(None)
    node.layers[1:] = []
    await finish(node)
    path = tmp_path / "child.vhdx"
    path.write_bytes(stored(child))
    assert images.raw_content(path, "vhdx", tmp_path) == model
    images.qemu_io(path, "vhdx", [f"write -P 7 {SIZE - 4096} 512", "write -P 8 0 512"])
    model[SIZE - 4096 : SIZE - 3584], model[:512] = b"\x07" * 512, b"\x08" * 512
    images.check(path, "vhdx")
    assert images.raw_content(path, "vhdx", tmp_path) == model


async def test_an_image_with_a_new_parent_is_to_be_opened_anew() -> None:
    parent, alone = await made(SIZE), await made(SIZE)
    driver = await VhdxDriver.open(alone, {}, read_only=False)
    await driver.set_backing(BackingReference("p", "vhdx"), await VhdxDriver.open(parent, {}, read_only=True))
    with pytest.raises(RequestError, match="open it anew"):
        driver.lookup_writable(0, 512)


async def test_items_that_are_not_known_keep_their_places() -> None:
    child, structure, parent = await _structures()
    region = structure.metadata
    table = bytearray(await child.read(region.offset, layout.METADATA_TABLE_LENGTH))
    count = struct.unpack_from("<H", table, 10)[0]
    place = 3 * 64 * KIB
    entry = layout.METADATA_ENTRY.build(
        {"item_id": OTHER.bytes_le, "offset": place, "length": 9, "flags": 0, "reserved": 0}
    )
    table[32 + count * 32 : 64 + count * 32] = entry
    struct.pack_into("<H", table, 10, count + 1)
    await child.write(region.offset, table)
    await child.write(region.offset + place, b"something")
    locator = locator_on(parent, "n" * 3000, structure)
    _, pieces = await with_parent(child, structure, locator)
    await child.write_all(pieces)
    changed = await read_structure(child)
    assert changed.locator == locator
    assert changed.items[layout.PARENT_LOCATOR].offset == place + 9
    assert await child.read(region.offset + place, 9) == b"something"
    alone, pieces = await with_parent(child, changed, None)
    await child.write_all(pieces)
    table = bytearray(await child.read(region.offset, layout.METADATA_TABLE_LENGTH))
    assert struct.unpack_from("<H", table, 10)[0] == count
    assert entry in table
    assert layout.PARENT_LOCATOR.bytes_le not in table
    assert await read_structure(child) == alone
    assert not alone.parameters.has_parent


async def test_no_room() -> None:
    child, structure, parent = await _structures()
    region = structure.metadata
    table = bytearray(await child.read(region.offset, layout.METADATA_TABLE_LENGTH))
    struct.pack_into("<II", table, 32 + 16, region.length - 8, 8)  # of the first item, which is not the locator
    await child.write(region.offset, table)
    with pytest.raises(ConfigError, match="no room for a parent locator"):
        await with_parent(child, structure, locator_on(parent, "p", structure))
    with pytest.raises(ConfigError, match="65535"):
        await with_parent(child, structure, locator_on(parent, "p" * 40000, structure))


async def test_sectors_of_another_size_cannot_be_below() -> None:
    _, structure, _ = await _structures()
    _, _, other = await _structures(sector_size=4096)
    with pytest.raises(ConfigError, match="sectors have 512 bytes, those of p 4096"):
        locator_on(other, "p", structure)


async def test_a_table_without_room_for_sector_bitmaps() -> None:
    _, structure, parent = await _structures()
    parameters = Parameters(size=131041 * MIB, block_size=MIB)
    assert parameters.bat_entries * 8 == MIB
    alone = replace(structure, parameters=parameters)
    with pytest.raises(ConfigError, match="no room for sector bitmaps"):
        locator_on(parent, "p", alone)
