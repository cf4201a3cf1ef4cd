"""Layers that are opened again, under a node that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.reopening import close_to_writing, open_again, reopen
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ImageError
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage
from tests.jobs.chains import UNIT, chain, make


async def test_a_layer_is_opened_for_writing_and_closed_to_it(tmp_path: Path) -> None:
    path = await make(tmp_path / "a.qcow2")
    node = await open_image(ImageSpec(str(path), "qcow2", read_only=True))
    path.rename(tmp_path / "other")
    async with node.drained():
        layer = await reopen(node, 0, read_only=False)
    assert node.layers == [layer]
    await node.write(0, b"a" * UNIT)
    with pytest.raises(ImageError, match="in use"):
        await open_again(layer)
    await node.flush()
    async with node.drained():
        await close_to_writing(node, 0)
    assert node.top.read_only
    assert await node.read(0, UNIT) == b"a" * UNIT
    await node.close()


async def test_the_same_image_once_more(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a", "qcow2 1b")
    again = await open_again(node.layers[1])
    assert again is not node.layers[1]
    assert (again.name, again.path, again.read_only) == ("raw", node.layers[1].path, True)
    await again.close()
    assert await node.read(0, UNIT) == b"a" * UNIT, "the first one goes on"
    await node.close()


async def test_what_is_no_file_of_its_own() -> None:
    driver = await RawDriver.open(MemoryStorage(bytes(1024)), {}, read_only=True)
    with pytest.raises(ImageError, match="cannot be opened again"):
        await open_again(driver)
