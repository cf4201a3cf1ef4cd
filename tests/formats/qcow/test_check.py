"""What the check of a qcow image finds and repairs. QEMU has none to compare with; its reads are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nbdserve.errors import ImageError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.qcow import check
from nbdserve.formats.qcow.driver import QcowDriver, read_header
from nbdserve.formats.two_level.entries import FLAG
from tests.formats.qcow.test_driver import CLUSTER, SIZE, made, opened, with_compressed
from tests.support import images
from tests.support.recording import ByteStorage


async def filled(clusters: int = 40) -> ByteStorage:
    """An image with so many single clusters of data, all over the disk."""
    storage = await made()
    node = await opened(storage)
    for number in range(clusters):
        await node.write(number * 17 * CLUSTER % SIZE, bytes([number + 1]) * CLUSTER)
    await node.close()
    return storage


async def examined(storage: ByteStorage) -> CheckResult:
    return await (await opened(storage, read_only=True)).top.check()


async def repaired(storage: ByteStorage) -> CheckResult:
    driver = await QcowDriver.open(storage, {}, read_only=True)
    return await driver.check(repair_leaks=True, repair_errors=True)


async def content(storage: ByteStorage) -> bytes:
    return bytes(await (await opened(ByteStorage(storage.content), read_only=True)).read(0, SIZE))


async def tables_of(storage: ByteStorage) -> tuple[int, list[int]]:
    driver = await QcowDriver.open(storage, {}, read_only=True)
    return driver.l1.host_offset, [int(entry) for entry in driver.l1.words if entry]


def used_entries(storage: ByteStorage, table: int) -> list[int]:
    words = np.frombuffer(bytes(storage.content[table : table + CLUSTER]), ">u8")
    return [table + int(index) * 8 for index in np.flatnonzero(words)]


def put(storage: ByteStorage, at: int, value: int) -> None:
    storage.content[at : at + 8] = value.to_bytes(8, "big")


def word(storage: ByteStorage, at: int) -> int:
    return int.from_bytes(storage.content[at : at + 8], "big")


async def test_a_sound_image() -> None:
    storage = await filled()
    result = await examined(storage)
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert (result.total_clusters, result.allocated_clusters) == (SIZE // CLUSTER, 40)
    assert result.image_end_offset == storage.size


async def test_space_that_nothing_names_is_no_leak() -> None:
    storage = await filled()
    end = storage.size
    storage.content += b"\xff" * 9000
    result = await examined(storage)
    assert (result.leaks, result.corruptions, result.image_end_offset) == (0, 0, end)


async def test_compressed_clusters_are_counted() -> None:
    result = await examined(await with_compressed(cluster=bytes(CLUSTER)))
    assert (result.corruptions, result.compressed_clusters, result.allocated_clusters) == (0, 1, 2)


async def test_entries_that_name_nothing_are_cleared() -> None:
    storage = await filled()
    before = bytearray(await content(storage))
    l1_offset, tables = await tables_of(storage)
    used = used_entries(storage, tables[0])
    put(storage, used[0], storage.size)
    put(storage, used[1], FLAG | 100 << 51 | storage.size - 50)
    put(storage, used[2], FLAG | 4096)
    for at in used[:3]:
        guest = (at - tables[0]) // 8 * CLUSTER
        before[guest : guest + CLUSTER] = bytes(CLUSTER)
    assert (await examined(storage)).corruptions == 3
    result = await repaired(storage)
    assert (result.corruptions, result.corruptions_fixed) == (0, 3)
    assert await content(storage) == before
    put(storage, l1_offset, 48)
    assert (await examined(storage)).corruptions == 1
    assert (await repaired(storage)).corruptions == 0


async def test_a_first_table_full_of_rubbish_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_REPAIRS", 100)
    storage = ByteStorage()
    await QcowDriver.create(storage, 1 << 40, {})
    header = await read_header(storage)
    end = header.l1_table_offset + header.l1_entries * 8
    storage.content[header.l1_table_offset : end] = b"\x7f\xff" * (header.l1_entries * 4)
    result = await examined(storage)
    assert result.corruptions == header.l1_entries == 1 << 19
    assert result.messages == [
        "ERROR 524288 L1 entries name no L2 table of the file, first entry 0: 0x7fff7fff7fff7fff"
    ]
    assert (await repaired(storage)).corruptions_fixed == 100


@images.needs_qemu
@pytest.mark.parametrize("shift", [0, 512, -7])
async def test_the_second_owner_gets_a_copy(tmp_path: Path, shift: int) -> None:
    storage = await filled()
    _, tables = await tables_of(storage)
    one, two = used_entries(storage, tables[0])[3:5]
    put(storage, two, word(storage, one) + shift)
    before = await content(storage)
    found = await examined(storage)
    assert found.corruptions >= 1
    result = await repaired(storage)
    assert (result.corruptions, result.corruptions_fixed) == (0, found.corruptions)
    assert await content(storage) == before
    path = tmp_path / "x.qcow"
    path.write_bytes(storage.content)
    assert images.raw_content(path, "qcow", tmp_path) == before


async def test_data_on_metadata_gets_a_copy() -> None:
    storage = await filled()
    l1_offset, tables = await tables_of(storage)
    used = used_entries(storage, tables[0])
    put(storage, used[2], tables[0] + 512)
    put(storage, used[3], l1_offset + 8)
    assert (await examined(storage)).corruptions == 2
    result = await repaired(storage)
    assert (result.corruptions, result.corruptions_fixed) == (0, 2)
    node = await opened(storage)
    await node.write((used[2] - tables[0]) // 8 * CLUSTER, b"mine")
    await node.close()


async def test_a_compressed_cluster_on_others_gets_a_copy() -> None:
    cluster = bytes(range(256)) * 16
    storage = await with_compressed(cluster=cluster)
    _, tables = await tables_of(storage)
    second = word(storage, tables[0] + 8)
    put(storage, tables[0] + 16, second)
    result = await repaired(storage)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert (await content(storage))[CLUSTER : 3 * CLUSTER] == cluster * 2


async def test_tables_that_overlap_are_left_and_reported() -> None:
    storage = await filled()
    l1_offset, tables = await tables_of(storage)
    put(storage, l1_offset + 8, tables[0])
    before = bytes(storage.content)
    result = await repaired(storage)
    assert result.corruptions
    assert storage.content == before


async def test_windows_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await filled()
    _, tables = await tables_of(storage)
    used = used_entries(storage, tables[0])
    put(storage, used[5], word(storage, used[4]))
    put(storage, used[6], word(storage, used[7]) - 100)
    put(storage, used[8], 1 << 50)
    whole = await examined(storage)
    assert whole.corruptions >= 3
    for limit in (5, 50, 600):
        monkeypatch.setattr(check, "WINDOW_REFERENCES", limit)
        parts = await examined(storage)
        assert (parts.corruptions, parts.allocated_clusters, parts.image_end_offset) == (
            whole.corruptions,
            whole.allocated_clusters,
            whole.image_end_offset,
        )


async def test_too_many_references_to_one_place_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await made()
    node = await opened(storage)
    await node.write(0, b"x" * CLUSTER)
    await node.write(2 << 20, b"x" * CLUSTER)
    await node.close()
    _, tables = await tables_of(storage)
    for table in tables:
        for index in range(512):
            put(storage, table + index * 8, word(storage, tables[0]))
    assert (await examined(storage)).corruptions == 1023
    monkeypatch.setattr(check, "WINDOW_REFERENCES", 100)
    assert (await examined(storage)).corruptions >= 1000


async def test_a_repair_needs_a_writable_file() -> None:
    storage = await filled()
    storage.read_only = True
    driver = await QcowDriver.open(storage, {}, read_only=True)
    with pytest.raises(ImageError, match="read-only"):
        await driver.check(repair_errors=True)
