"""Which clusters are metadata."""

from __future__ import annotations

from pathlib import Path

from nbdserve.formats.qcow2.metadata import metadata_clusters
from tests.formats.qcow2.engine import create, open_image, qemu_io, run


async def test_every_table_is_known(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "1G")
    qemu_io(path, "write 0 64k")
    run("qemu-img", "snapshot", "-c", "s", path)
    qemu_io(path, "write 512M 64k", "write 0 64k")
    run("qemu-img", "bitmap", "--add", path, "b0")
    driver = await open_image(path, read_only=True)
    storage, header = driver.storage, driver.header
    bitmaps = header.bitmaps
    assert bitmaps is not None
    refcount_block = int.from_bytes(await storage.read(header.refcount_table_offset, 8), "big")
    expected = {
        0,
        header.l1_offset,
        header.refcount_table_offset,
        refcount_block,
        header.snapshots_offset,
        driver.snapshots[0].l1_offset,
        driver.l2_offset(0),
        driver.l2_offset(1),
        bitmaps.directory_offset,
    }
    await driver.close()
    with path.open("r+b") as file:  # a writable open clears the bit that makes the directory count
        file.seek(88)
        file.write((1).to_bytes(8, "big"))
    driver = await open_image(path)
    found = metadata_clusters(header, driver.l1, driver.refcounts.table, driver.snapshots, 72, str(path))
    assert found == {offset >> 16 for offset in expected}
    await driver.close()
