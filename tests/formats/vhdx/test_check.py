"""``check`` finds what is wrong, agrees with qemu-img about what is not, and repairs what there are two of."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import ImageError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.vhdx import layout
from nbdserve.formats.vhdx.driver import VhdxDriver
from nbdserve.formats.vhdx.layout import FULLY_PRESENT, NO_GUID, PARTIALLY_PRESENT, UNMAPPED
from nbdserve.formats.vhdx.structure import read_structure
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import MIB
from tests.formats.vhdx.helpers import (
    copy,
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


async def _check(storage: MemoryStorage, *, repair: bool = False) -> CheckResult:
    driver = await VhdxDriver.open(storage, {}, read_only=True)
    return await driver.check(repair_errors=repair)


@needs_qemu
@pytest.mark.parametrize("options", ["", "block_size=1M", "subformat=fixed,block_size=8M"])
async def test_images_of_qemu_are_clean(tmp_path: Path, options: str) -> None:
    path = qemu_image(tmp_path / "a.vhdx", 13 * MIB, options)
    images.qemu_io(path, "vhdx", ["write -P 1 0 5M", "write -P 2 12M 1M"])
    node = await node_of(path, read_only=True)
    result = await node.top.check()
    assert (result.corruptions, result.leaks, result.check_errors, result.messages) == (0, 0, 0, [])
    assert 0 < result.allocated_clusters <= result.total_clusters
    await node.close()


async def _image() -> MemoryStorage:
    """Blocks 0 to 2 are at 5, 6 and 7 MiB of a file of 8 MiB."""
    storage = await made(8 * MIB)
    node = await node_on(storage)
    for block in range(3):
        await node.write(block * MIB, b"x" * MIB)
    await finish(node)
    assert storage.size == 7 * MIB
    return storage


@pytest.mark.parametrize(
    ("index", "entry", "problem"),
    [
        (1, 4 * MIB | FULLY_PRESENT, "shares space"),
        (5, 7 * MIB | FULLY_PRESENT, "past the end"),
        (5, (1 << 60) | FULLY_PRESENT, "past the end"),
        (5, 2 * MIB | FULLY_PRESENT, "own tables"),
        (5, FULLY_PRESENT, "own tables"),
        (5, 4, "the state"),
        (5, 5, "the state"),
        (5, 5 * MIB | PARTIALLY_PRESENT, "the state"),
    ],
)
async def test_blocks_that_cannot_be(index: int, entry: int, problem: str) -> None:
    storage = await _image()
    assert (await _check(storage)).corruptions == 0
    await put_entry(storage, index, entry)
    before = stored(storage)
    result = await _check(storage)
    assert result.corruptions >= 1
    assert any(problem in message and f"BAT entry {index}" in message for message in result.messages)
    assert stored(storage) == before


@needs_qemu
@pytest.mark.parametrize("entry", [9 * MIB | FULLY_PRESENT, 4 * MIB | FULLY_PRESENT, 3 * MIB | UNMAPPED])
async def test_qemu_img_agrees(tmp_path: Path, entry: int) -> None:
    storage = await _image()
    await put_entry(storage, 5, entry)
    (tmp_path / "a.vhdx").write_bytes(stored(storage))
    found = (await _check(storage)).corruptions
    shared = entry == 4 * MIB | FULLY_PRESENT  # which qemu-img does not look for
    images.run("qemu-img", "check", "-f", "vhdx", tmp_path / "a.vhdx", codes=(0,) if not found or shared else (1, 2))


async def test_only_so_many_messages() -> None:
    storage = await made(64 * MIB)
    for block in range(64):
        await put_entry(storage, block, 5)
    result = await _check(storage)
    assert result.corruptions == 64
    assert len(result.messages) == 20


async def test_a_part_without_a_sector_bitmap() -> None:
    parent, child, _ = await parent_and_child(8 * MIB)
    node = await node_on(child, parent)
    await node.write(512, b"x" * 512)
    await finish(node)
    assert (await _check(child)).corruptions == 0
    index = (await read_structure(child)).parameters.bitmap_index(0)
    await put_entry(child, index, 0)
    result = await _check(child)
    assert result.messages == [f"BAT entry {index}: no sector bitmap"]


async def test_a_sector_bitmap_has_no_place_in_a_dynamic_image() -> None:
    storage = await made(9 << 30, "block_size=1M,block_state_zero=off")
    index = (await read_structure(storage)).parameters.bitmap_index(0)
    await storage.truncate(8 * MIB)
    await put_entry(storage, index, 7 * MIB | FULLY_PRESENT)
    assert (await _check(storage)).corruptions == 1


async def _left_by_a_crash() -> MemoryStorage:
    storage = await made(8 * MIB)
    node = await node_on(storage)
    await node.write(0, b"x" * MIB)
    await node.flush()
    left = copy(storage)
    structure = await read_structure(left)
    await left.write(structure.bat.offset, b"\2" + bytes(7))
    return left


async def test_a_log_to_replay_is_no_error_and_is_replayed() -> None:
    storage = await _left_by_a_crash()
    before = stored(storage)
    result = await _check(storage)
    assert result.corruptions == 0
    assert "not in their place" in result.messages[0]
    assert stored(storage) == before
    repaired = await _check(storage, repair=True)
    assert (repaired.corruptions, repaired.corruptions_fixed) == (0, 1)
    structure = await read_structure(storage)
    assert (structure.overlay, structure.header.log_guid) == (None, NO_GUID)
    assert (await _check(storage)).messages == []
    node = await node_on(storage, read_only=True)
    assert await node.read(0, MIB) == b"x" * MIB


@needs_qemu
async def test_qemu_replays_our_log_as_we_do(tmp_path: Path) -> None:
    storage = await _left_by_a_crash()
    path = tmp_path / "a.vhdx"
    path.write_bytes(stored(storage))
    images.run("qemu-img", "check", "-f", "vhdx", "-r", "all", path)
    theirs = images.raw_content(path, "vhdx", tmp_path)
    await _check(storage, repair=True)
    (tmp_path / "b.vhdx").write_bytes(stored(storage))
    assert images.raw_content(tmp_path / "b.vhdx", "vhdx", tmp_path) == theirs
    assert theirs[:MIB] == b"x" * MIB


@pytest.mark.parametrize("number", [0, 1])
async def test_copies_are_renewed(number: int) -> None:
    storage = await _image()
    good = await read_structure(storage)
    await storage.write(layout.HEADER_OFFSETS[number] + 100, b"!")
    await storage.write(layout.REGION_TABLE_OFFSETS[number] + 100, b"!")
    result = await _check(storage)
    assert result.corruptions == 1
    assert len(result.messages) == 2
    repaired = await _check(storage, repair=True)
    assert (repaired.corruptions, repaired.corruptions_fixed) == (0, 2)
    after = await _check(storage)
    assert (after.corruptions, after.messages) == (0, [])
    structure = await read_structure(storage)
    assert (structure.regions, structure.parameters) == (good.regions, good.parameters)
    assert structure.header.data_write_guid == good.header.data_write_guid


async def test_repairing_needs_a_file_that_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    path.write_bytes(stored(await _left_by_a_crash()))
    storage = await FileStorage.open(str(path), read_only=True)
    driver = await VhdxDriver.open(storage, {}, read_only=True)
    with pytest.raises(ImageError, match="read-only"):
        await driver.check(repair_errors=True)
    await driver.close()


async def test_an_open_image_is_checked_as_it_is() -> None:
    storage = await made(8 * MIB)
    node = await node_on(storage)
    await node.write(0, b"x" * MIB)
    result = await node.top.check()
    assert (result.corruptions, result.allocated_clusters, result.total_clusters) == (0, 1, 8)
    await node.write(MIB, b"x" * MIB)
    assert (await node.top.check()).allocated_clusters == 2
