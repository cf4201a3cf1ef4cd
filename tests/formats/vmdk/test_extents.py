from pathlib import Path

import pytest

from nbdserve.errors import ImageError, RequestError
from nbdserve.extents import DATA, UNALLOCATED, ZERO
from nbdserve.formats.vmdk.driver import VmdkDriver
from nbdserve.units import KIB, MIB
from tests.formats.vmdk.files import GRAIN, content, driver_of, patch, put, qemu_io, stock, tables
from tests.support.images import needs_qemu

pytestmark = needs_qemu
FIRST = 64 * KIB
"""Where the first grain is in the file of a small extent."""


async def look(driver: VmdkDriver, offset: int, length: int) -> tuple[int, int, int]:
    while (found := driver.lookup(offset, length)) is None:
        await driver.load(offset)
    return found


async def zero(driver: VmdkDriver, offset: int, length: int, *, unmap: bool) -> int:
    while (done := driver.zero(offset, length, unmap=unmap)) is None:
        await driver.load(offset)
    return done


async def test_neighbours_are_one_run(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", 4 * MIB)
    qemu_io(path, "write 0 128k", "write 256k 64k", "write 192k 64k")
    driver = await driver_of(path, read_only=True)
    assert await look(driver, 100, 3 * GRAIN) == (DATA, 2 * GRAIN - 100, FIRST + 100)
    assert await look(driver, 0, 5) == (DATA, 5, FIRST)
    assert await look(driver, 2 * GRAIN, 3 * GRAIN) == (UNALLOCATED, GRAIN, -1)
    assert await look(driver, 3 * GRAIN, 3 * GRAIN) == (DATA, GRAIN, FIRST + 3 * GRAIN)
    assert await look(driver, 5 * GRAIN + 1, 1 << 40) == (UNALLOCATED, 32 * MIB - 5 * GRAIN - 1, -1)
    await driver.close()


async def test_grains_are_written_in_place_and_new_ones_at_the_end(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", 4 * MIB)
    driver = await driver_of(path)
    await put(driver, 0, b"a" * 3 * GRAIN)
    assert driver.lookup_writable(GRAIN + 1, 10 * GRAIN) == (DATA, 2 * GRAIN - 1, FIRST + GRAIN + 1)
    assert driver.lookup_writable(3 * GRAIN, 2 * GRAIN) == (UNALLOCATED, 2 * GRAIN, -1)
    allocation = driver.allocate(10 * GRAIN, 2 * GRAIN)
    assert allocation is not None
    assert (allocation.host_offset, allocation.length, allocation.zeroed) == (FIRST + 3 * GRAIN, 2 * GRAIN, True)
    assert (await look(driver, 10 * GRAIN, 1))[0] == UNALLOCATED
    driver.abandon(allocation)
    await driver.flush()
    again = driver.allocate(10 * GRAIN, GRAIN)
    assert again is not None
    assert again.host_offset == FIRST + 3 * GRAIN
    assert not again.zeroed
    await driver.data.write(again.host_offset, b"b" * GRAIN)
    driver.publish(again)
    await driver.close()
    found = content(path)
    assert found[: 3 * GRAIN] == b"a" * 3 * GRAIN
    assert found[10 * GRAIN : 11 * GRAIN] == b"b" * GRAIN
    primary, redundant = tables(path)
    assert primary == redundant
    assert path.stat().st_size == FIRST + 4 * GRAIN


async def test_zeroes_are_entries(tmp_path: Path) -> None:
    driver = await driver_of(stock(tmp_path / "a.vmdk", 4 * MIB, "zeroed_grain=on"))
    await put(driver, 0, b"a" * 4 * GRAIN)
    assert await zero(driver, GRAIN, 2 * GRAIN, unmap=False) == 0
    assert await zero(driver, GRAIN, 2 * GRAIN, unmap=True) == 2 * GRAIN
    assert await look(driver, GRAIN, 9 * GRAIN) == (ZERO, 2 * GRAIN, -1)
    assert await zero(driver, GRAIN, 3 * GRAIN, unmap=False) == 2 * GRAIN
    assert (await look(driver, 3 * GRAIN, 1))[0] == DATA
    assert await zero(driver, 4 * GRAIN, GRAIN, unmap=True) == GRAIN
    assert (await look(driver, 4 * GRAIN, 1))[0] == UNALLOCATED
    assert driver.lookup_writable(GRAIN, 9 * GRAIN) == (UNALLOCATED, 2 * GRAIN, -1)
    # Their space is used again only when the disk does not point at it any more.
    taken = driver.allocate(GRAIN, GRAIN)
    assert taken is not None
    assert taken.host_offset == FIRST + 4 * GRAIN
    driver.abandon(taken)
    await driver._commit.settle()
    taken = driver.allocate(GRAIN, GRAIN)
    assert taken is not None
    assert (taken.host_offset, taken.zeroed) == (FIRST + GRAIN, False)
    driver.abandon(taken)
    await driver.close()


async def test_without_zeroed_grains_a_parent_must_not_show_through(tmp_path: Path) -> None:
    base = stock(tmp_path / "base.vmdk", 4 * MIB)
    driver = await driver_of(base)
    await put(driver, 0, b"a" * GRAIN)
    assert await zero(driver, 0, 2 * GRAIN, unmap=True) == 2 * GRAIN
    assert (await look(driver, 0, GRAIN))[0] == UNALLOCATED
    await driver.close()
    driver = await driver_of(stock(tmp_path / "a.vmdk", None, backing="base.vmdk"))
    await put(driver, 0, b"a" * GRAIN)
    assert await zero(driver, 0, GRAIN, unmap=True) == 0
    assert driver.discard(0, GRAIN) == 0
    assert not driver.zeroes_fast
    await driver.close()
    driver = await driver_of(stock(tmp_path / "b.vmdk", None, "zeroed_grain=on", backing="base.vmdk"))
    assert await zero(driver, 0, GRAIN, unmap=False) == GRAIN
    assert (await look(driver, 0, GRAIN))[0] == ZERO
    assert driver.zeroes_fast
    await driver.close()


async def test_metadata_is_never_written_as_data(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB)
    qemu_io(path, "write 0 64k")
    table = int.from_bytes(path.read_bytes()[0x1A * 512 :][:4], "little") * 512
    patch(path, table + 4, (21).to_bytes(4, "little"))
    driver = await driver_of(path)
    while driver.lookup_writable(0, 512) is None:
        await driver.load(0)
    with pytest.raises(RequestError, match="0x15"):
        driver.lookup_writable(GRAIN, 512)
    # Such a grain is not given out again, either.
    assert await zero(driver, 0, 2 * GRAIN, unmap=True) == 2 * GRAIN
    await driver._commit.settle()
    space = driver.sparse[0].space
    assert space is not None
    assert space.free_ranges == []
    assert space.end == FIRST
    await driver.close()


@pytest.mark.parametrize(
    ("place", "value", "field"),
    [
        (0x15, 0, "rgdOffset"),
        (0x1A, 0xFFFFFFF, "grain table offset"),
        (0x1A, 0x16, "grain table offset"),
        (0x15, 0x1B, "grain table offset"),
    ],
)
async def test_tables_in_strange_places_are_only_read(tmp_path: Path, place: int, value: int, field: str) -> None:
    path = stock(tmp_path / "a.vmdk", MIB)
    patch(path, place * 512, value.to_bytes(4, "little"))
    with pytest.raises(ImageError) as caught:
        await driver_of(path)
    assert caught.value.field == field
    driver = await driver_of(path, read_only=True)
    if value == 0xFFFFFFF:
        with pytest.raises(RequestError, match="outside the file"):
            await driver.load(0)
    else:
        assert (await look(driver, 0, 1))[0] == UNALLOCATED
    await driver.close()


async def test_a_missing_table_is_read_as_nothing_and_not_written(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", 33 * MIB)
    patch(path, 0x15 * 512, bytes(4))
    patch(path, 0x1E * 512, bytes(4))
    driver = await driver_of(path)
    assert driver.lookup(5, 40 * MIB) == (UNALLOCATED, 32 * MIB - 5, -1)
    with pytest.raises(RequestError, match="no grain table"):
        await put(driver, 0, bytes(GRAIN))
    await put(driver, 32 * MIB, b"x" * GRAIN)
    await driver.close()
    assert content(path)[32 * MIB :][:GRAIN] == b"x" * GRAIN
