from pathlib import Path

import pytest

from nbdserve.formats.qcow2.check_analysis import read_header
from nbdserve.formats.qcow2.create import create_qcow2
from nbdserve.formats.qcow2.preallocation import metadata_preallocated
from nbdserve.storage.file import FileStorage


@pytest.mark.parametrize(("preallocation", "expected"), [("metadata", True), ("full", False)])
async def test_an_image_whose_clusters_are_holes_is_recognised(
    preallocation: str, expected: bool, tmp_path: Path
) -> None:
    storage = await FileStorage.open(str(tmp_path / "image"), create=True)
    try:
        await create_qcow2(storage, 4 << 20, {"preallocation": preallocation})
        assert await metadata_preallocated(storage, await read_header(storage)) is expected
    finally:
        await storage.close()
