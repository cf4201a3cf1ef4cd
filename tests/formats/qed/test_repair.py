"""Repairing QED images: what QEMU repairs, and leaks, which it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nbdserve.formats.base import CheckResult
from nbdserve.formats.qed import layout
from nbdserve.formats.qed.check import check_qed
from nbdserve.formats.qed.driver import QedDriver, read_header
from nbdserve.units import KIB, MIB
from tests.formats.qed.test_check import examined, filled, tables_of
from tests.formats.qed.test_driver import CLUSTER, SIZE, made, opened
from tests.support import images
from tests.support.recording import ByteStorage


async def repaired(storage: ByteStorage, *, errors: bool = True) -> CheckResult:
    driver = await QedDriver.open(storage, {}, read_only=True)
    return await driver.check(repair_leaks=True, repair_errors=errors)


async def content(storage: ByteStorage, size: int = SIZE) -> bytes:
    return bytes(await (await opened(ByteStorage(storage.content), read_only=True)).read(0, size))


def used_entries(storage: ByteStorage, table: int) -> list[int]:
    words = np.frombuffer(bytes(storage.content[table : table + 2 * CLUSTER]), "<u8")
    return [int(index) for index in np.flatnonzero(words > 1)]


@images.needs_qemu
async def test_invalid_entries_are_cleared(tmp_path: Path) -> None:
    storage = await filled()
    l1_offset, tables = await tables_of(storage)
    first = used_entries(storage, tables[0])[0]
    at = tables[0] + first * 8
    storage.content[at : at + 8] = (77).to_bytes(8, "little")
    storage.content[l1_offset + 800 * 8 : l1_offset + 800 * 8 + 8] = (55).to_bytes(8, "little")
    before = bytearray(await content(ByteStorage(clean_entry(storage, at))))
    before[first * CLUSTER : (first + 1) * CLUSTER] = bytes(CLUSTER)
    result = await repaired(storage)
    assert (result.corruptions, result.corruptions_fixed, result.leaks) == (0, 2, 0)
    assert await content(storage) == before
    path = tmp_path / "x.qed"
    path.write_bytes(storage.content)
    images.check(path, "qed")


def clean_entry(storage: ByteStorage, at: int) -> bytearray:
    copy = bytearray(storage.content)
    copy[at : at + 8] = bytes(8)
    return copy


@images.needs_qemu
async def test_the_second_owner_of_a_cluster_gets_a_copy(tmp_path: Path) -> None:
    storage = await filled()
    _, tables = await tables_of(storage)
    used = used_entries(storage, tables[0])
    one, two = (tables[0] + index * 8 for index in used[:2])
    storage.content[two : two + 8] = storage.content[one : one + 8]
    before = await content(storage)
    result = await repaired(storage)
    assert (result.corruptions, result.leaks, result.corruptions_fixed) == (0, 0, 1)
    assert await content(storage) == before
    node = await opened(storage)
    await node.write(used[0] * CLUSTER, b"new")
    assert await node.read(used[1] * CLUSTER, CLUSTER) == before[used[1] * CLUSTER : (used[1] + 1) * CLUSTER]
    await node.close()
    path = tmp_path / "x.qed"
    path.write_bytes(storage.content)
    images.check(path, "qed")


@images.needs_qemu
@pytest.mark.parametrize("gaps", [1, 5, 30])
async def test_gaps_are_closed(tmp_path: Path, gaps: int) -> None:
    """Clusters that entries have let go of, as nobody but a crash does."""
    storage = await filled(60)
    _, tables = await tables_of(storage)
    storage.content += bytes(3 * CLUSTER)
    for index in used_entries(storage, tables[0])[:gaps]:
        storage.content[tables[0] + index * 8 : tables[0] + index * 8 + 8] = bytes(8)
    before, size = await content(storage), storage.size
    found = await examined(storage)
    assert found.leaks == gaps + 3
    result = await repaired(storage, errors=False)
    assert (result.leaks, result.leaks_fixed, result.corruptions) == (0, gaps + 3, 0)
    assert storage.size == size - (gaps + 3) * CLUSTER
    assert await content(storage) == before
    path = tmp_path / "x.qed"
    path.write_bytes(storage.content)
    images.check(path, "qed")


async def test_gaps_before_a_table_at_the_end_stay() -> None:
    storage = await made(2 * SIZE)
    node = await opened(storage)
    await node.write(0, b"a" * 2 * CLUSTER)
    await node.write(SIZE, b"b" * CLUSTER)
    await node.close()
    _, tables = await tables_of(storage)
    storage.content[tables[0] : tables[0] + 8] = bytes(8)
    del storage.content[tables[1] + 2 * CLUSTER :]
    storage.content[tables[1] : tables[1] + 8] = bytes(8)
    before = bytes(storage.content)
    result = await repaired(storage)
    assert (result.corruptions, result.leaks, result.leaks_fixed) == (0, 1, 0)
    assert storage.content == before


async def overlapping() -> ByteStorage:
    """An image of which two L1 entries name one L2 table."""
    storage = await made(2 * SIZE)
    node = await opened(storage)
    await node.write(0, b"a" * 3 * CLUSTER)
    await node.close()
    l1_offset, tables = await tables_of(storage)
    storage.content[l1_offset + 8 : l1_offset + 16] = tables[0].to_bytes(8, "little")
    return storage


async def test_overlapping_tables_are_left_and_reported() -> None:
    storage = await overlapping()
    before = bytes(storage.content)
    result = await repaired(storage)
    assert (result.corruptions, result.corruptions_fixed) == (1, 0)
    assert storage.content == before


async def test_a_limit_on_what_is_copied() -> None:
    storage = await filled()
    _, tables = await tables_of(storage)
    first = used_entries(storage, tables[0])[0]
    storage.content[tables[0] + first * 8 : tables[0] + first * 8 + 8] = bytes(8)
    storage.content += bytes(CLUSTER)
    header, sector = await read_header(storage)
    result = await check_qed(storage, header, sector, repair_leaks=True, most_moved=0)
    assert (result.leaks, result.leaks_fixed) == (1, 1)
    result = await check_qed(storage, header, sector, repair_leaks=True, most_moved=CLUSTER)
    assert (result.leaks, result.leaks_fixed) == (0, 1)


async def test_need_check_is_cleared_only_when_all_is_well() -> None:
    for storage in (await filled(), await overlapping()):
        storage.content[16] |= layout.FEATURE_NEED_CHECK
        await examined(storage)
        assert storage.content[16] & layout.FEATURE_NEED_CHECK  # looking changes nothing
        result = await repaired(storage)
        assert bool(storage.content[16] & layout.FEATURE_NEED_CHECK) == bool(result.corruptions)


async def test_large_clusters_are_copied_in_parts() -> None:
    storage = ByteStorage(path="x.qed")
    await QedDriver.create(storage, 8 * MIB, {"cluster_size": "2M", "table_size": "1"})
    node = await opened(storage)
    await node.write(0, b"a" * 2 * MIB)
    await node.write(2 * MIB, bytes(range(256)) * (8 * KIB))
    await node.close()
    _, tables = await tables_of(storage)
    storage.content[tables[0] : tables[0] + 8] = bytes(8)
    before = await content(storage, 8 * MIB)
    result = await repaired(storage)
    assert (result.leaks, result.leaks_fixed) == (0, 1)
    assert await content(storage, 8 * MIB) == before
