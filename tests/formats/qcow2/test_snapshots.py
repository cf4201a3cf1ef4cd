"""The snapshot table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nbdserve.errors import CorruptImageError, ImageError
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.image import read_header
from nbdserve.formats.qcow2.snapshots import Snapshot, find_snapshot, read_snapshots
from nbdserve.storage.memory import MemoryStorage
from tests.formats.qcow2.engine import create, run


async def _image(tmp_path: Path, *names: str) -> tuple[MemoryStorage, Header]:
    path = create(tmp_path / "a.qcow2", "8M")
    for name in names:
        run("qemu-img", "snapshot", "-c", name, path)
    storage = MemoryStorage(path.read_bytes())
    return storage, (await read_header(storage))[0]


async def test_entries_are_built_again(tmp_path: Path) -> None:
    storage, header = await _image(tmp_path, "one", "zwei", "ж" * 60)
    snapshots, length = await read_snapshots(storage, header)
    assert [snapshot.name for snapshot in snapshots] == ["one", "zwei", "ж" * 60]
    assert b"".join(s.build() for s in snapshots) == await storage.read(header.snapshots_offset, length)


async def test_an_id_goes_before_a_name(tmp_path: Path) -> None:
    storage, header = await _image(tmp_path, "2", "b")
    snapshots, _ = await read_snapshots(storage, header)
    assert find_snapshot(snapshots, "2", header, "a").name == "b"
    assert find_snapshot(snapshots, "b", header, "a").id == "2"
    with pytest.raises(ImageError, match=r"1 \(2\), 2 \(b\)"):
        find_snapshot(snapshots, "c", header, "a")


async def test_more_entries_than_the_file_holds(tmp_path: Path) -> None:
    storage, header = await _image(tmp_path, "one")
    with pytest.raises(CorruptImageError) as caught:
        await read_snapshots(storage, dataclasses.replace(header, snapshot_count=60000))
    assert caught.value.field is not None


@pytest.mark.parametrize("at", [0, 8, 12, 14, 36])
async def test_impossible_fields(tmp_path: Path, at: int) -> None:
    storage, header = await _image(tmp_path, "one")
    storage.try_write(header.snapshots_offset + at, b"\xff" * 4)
    with pytest.raises(CorruptImageError):
        await read_snapshots(storage, header)


def test_a_table_that_is_cut_off_asks_for_more() -> None:
    entry = Snapshot(65536, 1, "1", "name", 0, 0, 0, 0, 1024, None, b"\0" * 24).build()
    for length in range(len(entry) - 6):
        assert Snapshot.parse(entry[:length], 0, "a") is None
    assert Snapshot.parse(entry, 0, "a") is not None
