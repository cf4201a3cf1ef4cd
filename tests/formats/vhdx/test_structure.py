"""Reading what an image says of itself; every damage is refused by field and value."""

from __future__ import annotations

import struct
from uuid import UUID, uuid4

import pytest

from nbdserve.errors import CorruptImageError, ImageError
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, Header
from nbdserve.formats.vhdx.structure import HeaderWriter, read_copies, read_structure, refuse_writing
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.formats.vhdx.helpers import child_of, made, stored


async def test_the_parts_of_an_image() -> None:
    storage = await made(20 * MIB, "block_size=2M,log_size=3M")
    structure = await read_structure(storage)
    assert structure.parameters.size == 20 * MIB
    assert structure.parameters.block_size == 2 * MIB
    assert structure.places() == [(0, MIB), (MIB, 4 * MIB), (4 * MIB, 5 * MIB), (5 * MIB, 6 * MIB)]
    assert (structure.bat.offset, structure.metadata.offset) == (4 * MIB, 5 * MIB)
    assert structure.overlay is None
    assert structure.locator is None


async def test_a_differencing_image_names_its_parent() -> None:
    parent = await made(20 * MIB)
    structure = await read_structure(await child_of(parent, 20 * MIB))
    assert structure.locator is not None
    assert structure.locator.name == "parent.vhdx"
    above, below = structure.parameters, (await read_structure(parent)).parameters
    assert above.has_parent
    assert above.disk_id == below.disk_id


@pytest.mark.parametrize("number", [0, 1])
async def test_one_header_and_one_region_table_are_enough(number: int) -> None:
    storage = await made(20 * MIB)
    before = await read_structure(storage)
    await storage.write(layout.HEADER_OFFSETS[number], bytes(4096))
    await storage.write(layout.REGION_TABLE_OFFSETS[number], b"?" * 65536)
    after = await read_structure(storage)
    assert (after.regions, after.parameters) == (before.regions, before.parameters)


@pytest.mark.parametrize(
    ("offset", "data", "field"),
    [
        (0, b"vhdxfilf", "signature"),
        (3 * MIB, b"metadatb", "metadata signature"),
        (3 * MIB + 64 * KIB, struct.pack("<I", 3 * MIB), "BlockSize"),
        (3 * MIB + 64 * KIB + 4, struct.pack("<I", 2), "HasParent"),
        (3 * MIB + 64 * KIB + 8, struct.pack("<Q", 1 << 60), "VirtualDiskSize"),
        (3 * MIB + 64 * KIB + 8, struct.pack("<Q", 64 << 40), "BAT region Length"),
    ],
)
async def test_damage_is_named(offset: int, data: bytes, field: str) -> None:
    storage = await made(20 * MIB)
    await storage.write(offset, data)
    held = stored(storage)
    with pytest.raises(ImageError) as caught:
        await read_structure(storage)
    assert caught.value.field == field
    assert stored(storage) == held


@pytest.mark.parametrize("size", [0, 7, 512, MIB - 1])
async def test_a_file_that_is_too_short(size: int) -> None:
    storage = await made(20 * MIB)
    await storage.truncate(size)
    with pytest.raises(CorruptImageError):
        await read_structure(storage)


async def test_headers_are_written_in_turn() -> None:
    """The one that is not current first; a write that is torn leaves the other one."""
    storage = await made(20 * MIB)
    structure = await read_structure(storage)
    assert structure.header_copy == 1
    writer = HeaderWriter(storage, structure.header, structure.header_copy)
    guid = uuid4()
    before = await read_copies(storage, layout.HEADER_OFFSETS, 4096)
    await writer.update(data_write_guid=guid)
    after = await read_copies(storage, layout.HEADER_OFFSETS, 4096)
    first, second = (Header.parse(data) for data in after)
    assert first is not None and second is not None
    assert first.sequence_number + 1 == second.sequence_number == structure.header.sequence_number + 2
    assert first.data_write_guid == second.data_write_guid == guid
    # As far as the first write went, whole or torn:
    for torn in (after[0], after[0][:512] + before[0][512:], after[0][:68] + before[0][68:]):
        await storage.write(layout.HEADER_OFFSETS[0], torn)
        await storage.write(layout.HEADER_OFFSETS[1], before[1])
        found = (await read_structure(storage)).header
        assert found in (structure.header, first)
    assert writer.header == second


def test_a_file_that_cannot_be_written() -> None:
    storage = MemoryStorage()
    refuse_writing(storage)
    storage.read_only = True
    with pytest.raises(ImageError, match="read-only"):
        refuse_writing(storage)


async def test_states_have_the_numbers_of_the_specification() -> None:
    assert FULLY_PRESENT == 6
    assert UUID(bytes_le=bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")) == layout.BAT_REGION
