from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.errors import CorruptImageError
from nbdserve.formats.qcow2 import bitmap_directory, layout
from nbdserve.formats.qcow2.bitmap_directory import (
    FLAG_AUTO,
    FLAG_IN_USE,
    BitmapEntry,
    build_directory,
    read_bitmap_directory,
)
from nbdserve.formats.qcow2.check_analysis import read_header
from nbdserve.formats.qcow2.header import Header
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from tests.support.images import create, needs_qemu, run


@pytest.mark.parametrize("name", ["a", "späte", "b" * 1023, "\udcff"])
@pytest.mark.parametrize("extra", [b"", b"123", bytes(40)])
async def test_what_is_built_is_read(name: str, extra: bytes) -> None:
    entries = [
        BitmapEntry(name, 9, FLAG_IN_USE, 65536, 3, extra=extra),
        BitmapEntry("z", 31, FLAG_AUTO, 0, 0xFFFF_FFFF, kind=7),
    ]
    data = build_directory(entries)
    assert len(data) % 8 == 0
    assert await _read(data, len(data)) == entries


@pytest.mark.parametrize("missing", [1, 8, 16])
async def test_an_entry_that_is_cut_off(missing: int) -> None:
    data = build_directory([BitmapEntry("x" * 20, 16, 0, 0, 0)])
    with pytest.raises(CorruptImageError, match="bitmap directory entry"):
        await _read(data, len(data) - 4 - missing)


async def test_more_entries_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmap_directory, "MAX_BITMAPS", 3)
    entry = BitmapEntry("x", 16, 0, 0, 0)
    assert len(await _read(data := build_directory([entry] * 3), len(data))) == 3
    with pytest.raises(CorruptImageError, match="the one after 3"):
        await _read(data := build_directory([entry] * 4), len(data))


async def _read(data: bytes, length: int) -> list[BitmapEntry]:
    extension = {"count": 1, "reserved": 0, "directory_size": length, "directory_offset": 0}
    header = Header(
        version=3,
        cluster_bits=16,
        size=0,
        l1_offset=0,
        l1_entries=0,
        refcount_table_offset=0,
        refcount_table_clusters=0,
        autoclear=layout.AUTOCLEAR_BITMAPS,
        extensions=((layout.EXTENSION_BITMAPS, layout.BITMAPS_EXTENSION.build(extension)),),
    )
    return await read_bitmap_directory(MemoryStorage(data), header)


@needs_qemu
async def test_the_directory_is_read(tmp_path: Path) -> None:
    image = tmp_path / "image"
    create(image, 10 << 20)
    run("qemu-img", "bitmap", "--add", "-g", "4k", image, "fine")
    run("qemu-img", "bitmap", "--add", "--disable", image, "off")
    storage = await FileStorage.open(str(image), read_only=True)
    try:
        header = await read_header(storage)
        found = {entry.name: entry for entry in await read_bitmap_directory(storage, header)}
        assert set(found) == {"fine", "off"}
        assert (found["fine"].granularity, found["fine"].flags) == (4096, 2)
        assert (found["off"].granularity, found["off"].flags) == (65536, 0)
        assert await read_bitmap_directory(storage, replace(header, autoclear=0)) == []
        data = layout.BITMAPS_EXTENSION.build(
            {"count": 1, "reserved": 0, "directory_size": 1 << 20, "directory_offset": 1 << 40}
        )
        outside = replace(header, extensions=((layout.EXTENSION_BITMAPS, data),))
        with pytest.raises(CorruptImageError, match="bitmap directory"):
            await read_bitmap_directory(storage, outside)
    finally:
        await storage.close()
