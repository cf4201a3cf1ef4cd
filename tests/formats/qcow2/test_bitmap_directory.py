from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.errors import CorruptImageError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.bitmap_directory import read_bitmap_directory
from nbdserve.formats.qcow2.check_analysis import read_header
from nbdserve.storage.file import FileStorage
from tests.support.images import create, needs_qemu, run


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
