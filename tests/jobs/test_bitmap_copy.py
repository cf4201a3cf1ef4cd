"""Stored bitmaps go to another image with the data, or it is said why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.raw import RawDriver
from nbdserve.jobs.bitmap_copy import check_bitmap_target, copy_bitmaps, copyable_bitmaps
from nbdserve.storage.memory import MemoryStorage
from tests.formats.qcow2.engine import bits_of, check, create, mark_in_use, open_image, qemu_io, run
from tests.support.images import needs_qemu

pytestmark = needs_qemu


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = create(tmp_path / "source", "2M")
    for name, granularity in (("a", "512"), ("b", "64k"), ("c", "1M")):
        run("qemu-img", "bitmap", "--add", "-g", granularity, path, name)
    qemu_io(path, "write 100k 200k", "write 1M 1k")
    run("qemu-img", "bitmap", "--disable", path, "c")
    return path


async def test_all_of_them_are_copied_with_their_states(source: Path, tmp_path: Path) -> None:
    target = create(tmp_path / "target", "2M", "cluster_size=512")
    read, written = await open_image(source, read_only=True), await open_image(target)
    names = await copyable_bitmaps(read, None)
    await check_bitmap_target(written, names)
    await copy_bitmaps(read, written, names)
    with pytest.raises(ConfigError, match="Failed to create bitmap c: Bitmap already exists: c"):
        await check_bitmap_target(written, names)
    assert await written.stored_bitmaps() == await read.stored_bitmaps()
    await read.close()
    await written.close()
    check(target)
    assert [bits_of(target, name) for name in names] == [bits_of(source, name) for name in names]


async def test_an_inconsistent_one_is_refused_or_skipped(source: Path) -> None:
    mark_in_use(source, "b")
    read = await open_image(source, read_only=True)
    with pytest.raises(ConfigError, match="Cannot copy inconsistent bitmap 'b'\nTry --skip-broken-bitmaps"):
        await copyable_bitmaps(read, None)
    skipped: list[str] = []
    assert await copyable_bitmaps(read, skipped.append) == ["a", "c"]
    assert skipped == ["b"]
    await read.close()


async def test_images_that_hold_none(source: Path, tmp_path: Path) -> None:
    raw = await RawDriver.open(MemoryStorage(bytes(2 << 20)), {}, read_only=False)
    with pytest.raises(ConfigError, match="Source lacks bitmap support"):
        await copyable_bitmaps(raw, None)
    with pytest.raises(ConfigError, match="Format driver 'raw' does not support bitmaps"):
        await check_bitmap_target(raw, [])
    read = await open_image(source, read_only=True)
    longer = await open_image(create(tmp_path / "longer", "3M"))
    with pytest.raises(ConfigError, match="Failed to populate bitmap a: Bitmaps are of different sizes"):
        await copy_bitmaps(read, longer, ["a"])
    assert await longer.stored_bitmaps() == []
    await longer.close()
    await read.close()
