from pathlib import Path

import pytest

from nbdserve.errors import RequestError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdserve.formats.vmdk import runs
from nbdserve.formats.vmdk.driver import VmdkDriver
from nbdserve.units import KIB, MIB
from tests.formats.vmdk.files import GRAIN, described, driver_of, patch, put, qemu_io, stock
from tests.support.images import needs_qemu

pytestmark = needs_qemu


async def mapping(
    driver: VmdkDriver, start: int = 0, end: int | None = None, *, holes: int = 0
) -> list[tuple[int, int, int, int]]:
    """``(start, length, kind, host_offset)``, checked to be contiguous and to agree with ``lookup`` from ``holes`` on.

    Before that are files whose holes ``lookup`` does not know of.
    """
    end = driver.size if end is None else end
    runs: list[tuple[int, int, int, int]] = []
    async for piece in driver.iter_runs(start, end):
        columns = piece.start, piece.length, piece.kind, piece.host_offset
        runs += zip(*(column.tolist() for column in columns), strict=True)
    position = start
    for begin, length, kind, host_offset in runs:
        assert begin == position
        position += length
        for probe in {begin, begin + length - 1, begin + length // 2} if begin >= holes else ():
            while (found := driver.lookup(probe, 1)) is None:
                await driver.load(probe)
            if kind in (DATA, COMPRESSED):
                moved = probe - begin if kind == DATA else 0
                assert found == (kind, 1, host_offset + moved)
            else:
                assert found[:2] == (kind, 1)
    assert position == end
    return runs


async def test_grains_of_a_sparse_extent(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", 100 * MIB + 512, "zeroed_grain=on")
    qemu_io(path, "write 64k 192k", "write -z 128k 64k", f"write {64 * MIB} 64k", f"write {100 * MIB} 512")
    driver = await driver_of(path, read_only=True)
    first = driver.sparse[0].header.overhead
    assert await mapping(driver) == [
        (0, GRAIN, UNALLOCATED, -1),
        (GRAIN, GRAIN, DATA, first),
        (2 * GRAIN, GRAIN, ZERO, -1),
        (3 * GRAIN, GRAIN, DATA, first + 2 * GRAIN),
        (4 * GRAIN, 64 * MIB - 4 * GRAIN, UNALLOCATED, -1),
        (64 * MIB, GRAIN, DATA, first + 3 * GRAIN),
        (64 * MIB + GRAIN, 36 * MIB - GRAIN, UNALLOCATED, -1),
        (100 * MIB, 512, DATA, first + 4 * GRAIN),
    ]
    assert await mapping(driver, GRAIN + 100, 4 * GRAIN - 7) == [
        (GRAIN + 100, GRAIN - 100, DATA, first + 100),
        (2 * GRAIN, GRAIN, ZERO, -1),
        (3 * GRAIN, GRAIN - 7, DATA, first + 2 * GRAIN),
    ]
    await driver.close()


async def test_a_few_tables_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock(tmp_path / "a.vmdk", 200 * MIB)
    qemu_io(path, "write 31M 2M", f"write {100 * MIB} 64k")
    driver = await driver_of(path, read_only=True)
    whole = await mapping(driver)
    monkeypatch.setattr(runs, "_MOST_TABLES", 1)
    parts = [piece async for piece in driver.iter_runs(0, driver.size)]
    assert len(parts) == -(-200 // 32)
    starts = {start for piece in parts for start in piece.start.tolist()}
    assert starts == {run[0] for run in whole} | {table * 32 * MIB for table in range(7)}
    await driver.close()


async def test_extents_follow_each_other(tmp_path: Path) -> None:
    with (tmp_path / "flat").open("wb") as file:
        file.truncate(MIB)
        file.seek(256 * KIB)
        file.write(b"x" * 64 * KIB)
    sparse = stock(tmp_path / "sparse", MIB)
    qemu_io(sparse, "write 0 64k")
    lines = ['RW 1024 FLAT "flat" 256', "RW 3 ZERO", 'RW 2048 SPARSE "sparse"']
    driver = await driver_of(described(tmp_path / "a.vmdk", "twoGbMaxExtentFlat", *lines), read_only=True)
    grains = 512 * KIB + 3 * 512
    assert await mapping(driver, holes=512 * KIB) == [
        (0, 128 * KIB, ZERO, 128 * KIB),
        (128 * KIB, 64 * KIB, DATA, 256 * KIB),
        (192 * KIB, 320 * KIB, ZERO, 320 * KIB),
        (512 * KIB, 3 * 512, ZERO, -1),
        (grains, GRAIN, DATA, (1 << 48) + 64 * KIB),
        (grains + GRAIN, MIB - GRAIN, UNALLOCATED, -1),
    ]
    await driver.close()


async def test_changes_in_memory_are_seen(tmp_path: Path) -> None:
    driver = await driver_of(stock(tmp_path / "a.vmdk", 4 * MIB))
    await put(driver, GRAIN, b"x" * GRAIN)
    assert (await mapping(driver))[1][:3] == (GRAIN, GRAIN, DATA)
    await driver.close()


async def test_compressed_grains_are_units(tmp_path: Path) -> None:
    path = stock(tmp_path / "a.vmdk", MIB, "subformat=streamOptimized")
    qemu_io(path, "write 0 64k", "write 64k 64k")
    driver = await driver_of(path, read_only=True)
    assert [run[:3] for run in await mapping(driver)] == [
        (0, GRAIN, COMPRESSED),
        (GRAIN, GRAIN, COMPRESSED),
        (2 * GRAIN, MIB - 2 * GRAIN, UNALLOCATED),
    ]
    await driver.close()


@pytest.mark.parametrize("entry", [1, 0xFFFFFFFF])
async def test_a_bad_entry_is_an_error(tmp_path: Path, entry: int) -> None:
    path = stock(tmp_path / "a.vmdk", MIB)
    table = int.from_bytes(path.read_bytes()[0x1A * 512 :][:4], "little") * 512
    patch(path, table + 4, entry.to_bytes(4, "little"))
    driver = await driver_of(path, read_only=True)
    with pytest.raises(RequestError, match=hex(entry)):
        await mapping(driver)
    await driver.load(0)
    with pytest.raises(RequestError, match=hex(entry)):
        driver.lookup(GRAIN, 1)
    assert driver.lookup(0, 2 * GRAIN) == (UNALLOCATED, GRAIN, -1)
    await driver.close()
