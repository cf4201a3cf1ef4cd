"""What the check of a QED image finds, and that it is what QEMU's finds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from nbdserve.errors import ImageError
from nbdserve.extents import DATA, ZERO, RunArray
from nbdserve.formats.base import CheckResult
from nbdserve.formats.qed import check
from nbdserve.formats.qed.driver import QedDriver
from nbdserve.units import MIB
from tests.formats.qed.test_driver import CLUSTER, SIZE, made, opened
from tests.support import images
from tests.support.recording import ByteStorage


async def filled(clusters: int = 40) -> ByteStorage:
    """An image with so many single clusters of data, all over the disk, none of them zero."""
    storage = await made()
    node = await opened(storage)
    for number in range(clusters):
        at = number * 17 * CLUSTER % SIZE
        await node.write(at, bytes([number + 1]) * CLUSTER)
    await node.close()
    return storage


async def examined(storage: ByteStorage) -> CheckResult:
    return await (await opened(storage, read_only=True)).top.check()


async def tables_of(storage: ByteStorage) -> tuple[int, list[int]]:
    """Host offset of the L1 table, and of the L2 tables."""
    driver = await QedDriver.open(storage, {}, read_only=True)
    return driver.l1.host_offset, [int(entry) for entry in driver.l1.words if entry]


def qemu_check(path: Path) -> dict[str, int]:
    out = images.run("qemu-img", "check", "--output=json", "-f", "qed", path, codes=(0, 2, 3))
    found: dict[str, int] = json.loads(out)
    return found


def agree(ours: CheckResult, qemu: dict[str, int]) -> None:
    for name in ("total-clusters", "allocated-clusters", "fragmented-clusters", "corruptions", "leaks"):
        assert getattr(ours, name.replace("-", "_")) == qemu.get(name, 0), name


@images.needs_qemu
async def test_qemu_finds_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.qed"
    storage = await filled()
    clean = bytes(storage.content)
    l1_offset, tables = await tables_of(storage)
    last = len(clean)

    def put(at: int, value: int) -> None:
        storage.content[at : at + 8] = value.to_bytes(8, "little")

    def duplicate() -> None:
        words = np.frombuffer(storage.content, "<u8")[tables[0] // 8 :][:1024]
        used = np.flatnonzero(words > 1)
        value, at = int(words[used[0]]), tables[0] + int(used[1]) * 8
        del words
        put(at, value)

    damages = {
        "clean": lambda: None,
        "tail": lambda: storage.content.extend(bytes(5 * CLUSTER)),
        "part of a cluster": lambda: storage.content.extend(bytes(100)),
        "unaligned": lambda: put(tables[0], 12345),
        "behind the end": lambda: put(tables[0] + 8 * 17, last),
        "in the header": lambda: put(tables[0] + 8 * 17, 0x80),
        "twice": duplicate,
        "l1 behind the end": lambda: put(l1_offset, last),
        "zero clusters": lambda: put(tables[0] + 8 * 3, 1),
    }
    # An entry that is set to 1 lets go of its cluster where it had one; entry 3 has none.
    for name, damage in damages.items():
        storage.content[:] = clean
        damage()
        path.write_bytes(storage.content)
        ours, qemu = await examined(storage), qemu_check(path)
        agree(ours, qemu)
        assert bool(ours.corruptions or ours.leaks) == (name not in ("clean", "part of a cluster", "zero clusters")), (
            name
        )


async def test_a_table_in_a_hole_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await filled()
    _, tables = await tables_of(storage)
    read = []

    async def host_map(offset: int, length: int, max_runs: int = 0) -> RunArray:
        pieces = [(0, CLUSTER, DATA), (CLUSTER, length - CLUSTER, ZERO)]
        start, size, kind = (np.array(column) for column in zip(*pieces, strict=True))
        return RunArray(start, size, kind.astype(np.uint8), start)

    async def read_into(offset: int, buffer: memoryview) -> None:
        read.append(offset)
        storage._fill(offset, buffer)

    monkeypatch.setattr(storage, "host_map", host_map)
    monkeypatch.setattr(storage, "read_into", read_into)
    await examined(storage)
    assert read == [0, CLUSTER, 0]  # header and L1 table at open, the header again
    assert tables


async def test_windows_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await filled()
    storage.content += bytes(9 * CLUSTER)
    _, tables = await tables_of(storage)
    storage.content[tables[0] : tables[0] + 8] = (len(storage.content) - CLUSTER).to_bytes(8, "little")
    storage.content[tables[0] + 8 : tables[0] + 16] = storage.content[tables[0] + 17 * 8 : tables[0] + 18 * 8]
    whole = await examined(storage)
    assert (whole.corruptions, whole.leaks > 8) == (1, True)
    for window in (1, 3, 7, 20):
        monkeypatch.setattr(check, "WINDOW_CLUSTERS", window)
        parts = await examined(storage)
        assert (parts.corruptions, parts.leaks, parts.allocated_clusters, parts.image_end_offset) == (
            whole.corruptions,
            whole.leaks,
            whole.allocated_clusters,
            whole.image_end_offset,
        )


async def test_l1_entries_past_the_end_of_the_disk_use_clusters_too() -> None:
    storage = await filled()
    l1_offset, tables = await tables_of(storage)
    at = l1_offset + 700 * 8
    end = len(storage.content)
    storage.content += bytes(2 * CLUSTER)
    assert (await examined(storage)).leaks == 2
    storage.content[at : at + 8] = end.to_bytes(8, "little")
    result = await examined(storage)
    assert (result.leaks, result.corruptions) == (0, 0)
    storage.content[at : at + 8] = tables[0].to_bytes(8, "little")
    assert (await examined(storage)).corruptions
    storage.content[at : at + 8] = (3 * CLUSTER + 1).to_bytes(8, "little")
    assert (await examined(storage)).corruptions == 1


async def test_one_repair_mends_so_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_REPAIRS", 5)
    storage = await filled()
    _, tables = await tables_of(storage)
    for number in range(12):
        at = tables[0] + number * 8
        storage.content[at : at + 8] = b"\xff" * 8
    storage.content[16] |= 2  # need check
    damaged = bytes(storage.content)
    assert (await examined(storage)).corruptions == 12
    with pytest.raises(ImageError, match="12 errors remain"):
        await QedDriver.open(storage, {}, read_only=False)
    assert storage.content == damaged
    for left in (7, 2, 0):
        driver = await QedDriver.open(storage, {}, read_only=True)
        assert (await driver.check(repair_errors=True)).corruptions == left


async def test_many_first_entries_that_name_one_table() -> None:
    storage = await filled()
    l1_offset, tables = await tables_of(storage)
    for number in range(30, 50):
        at = l1_offset + number * 8
        storage.content[at : at + 8] = tables[0].to_bytes(8, "little")
    result = await examined(storage)
    assert result.corruptions == 20
    assert result.messages == ["ERROR 20 L2 tables overlap another"]


async def test_a_repair_needs_a_writable_file() -> None:
    storage = await filled()
    storage.read_only = True
    driver = await QedDriver.open(storage, {}, read_only=True)
    with pytest.raises(ImageError, match="read-only"):
        await driver.check(repair_leaks=True)


async def test_a_check_of_an_image_that_is_being_written() -> None:
    storage = await made()
    node = await opened(storage)
    await node.write(0, b"x")
    result = await node.top.check()
    assert (result.leaks, result.corruptions, result.allocated_clusters) == (0, 0, 1)
    await node.close()


def test_a_window_knows_what_was_there_before() -> None:
    window = check.Window(10, 10)
    assert not window.take_range(0, 12)
    assert window.take_range(11, 2)
    assert window.take(np.array([9, 12, 13, 13, 20])).tolist() == [False, True, False, True, False]
    assert np.flatnonzero(window.used).tolist() == [0, 1, 2, 3]


async def test_messages_are_bounded() -> None:
    found = check.Analysis((await opened(await made(MIB), read_only=True)).top.header, 0)  # type: ignore[attr-defined]
    for number in range(check.MAX_MESSAGES + 5):
        found.corruption(f"{number}")
    assert len(found.result.messages) == check.MAX_MESSAGES + 1
    assert found.result.corruptions == check.MAX_MESSAGES + 5


@images.needs_qemu
async def test_random_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.qed"
    clean = bytes((await filled()).content)
    rng = random.Random(3)
    for _ in range(15):
        storage = ByteStorage(clean)
        _, tables = await tables_of(storage)
        at = rng.choice(tables) + rng.randrange(1024) * 8
        storage.content[at : at + 8] = (rng.randrange(len(clean) // CLUSTER + 3) * CLUSTER).to_bytes(8, "little")
        path.write_bytes(storage.content)
        agree(await examined(storage), qemu_check(path))
