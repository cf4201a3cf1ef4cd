from pathlib import Path
from typing import Any

import pytest

from nbdserve.admin.blockdev import BlockdevOptions
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeTable
from nbdserve.admin.opening import Opener
from nbdserve.admin.paths import PathPolicy
from nbdserve.admin.schema import validated
from tests.admin.images import make_images, needs_images

pytestmark = needs_images


def options(driver: str, path: Path, **more: Any) -> Any:
    tree = {"driver": driver, "node-name": "n", "file": {"driver": "file", "filename": str(path)}} | more
    return validated(BlockdevOptions, tree)


async def test_policies_reach_the_node(tmp_path: Path) -> None:
    make_images(tmp_path)
    opener = Opener(NodeTable(), PathPolicy([tmp_path]))
    more = {"discard": "unmap", "detect-zeroes": "unmap", "cache": {"no-flush": True}}
    entry = await opener.open(options("raw", tmp_path / "b.raw", **more))
    assert (entry.node.unmap, entry.node.detect_zeroes, entry.cache) == (True, "unmap", "unsafe")
    await opener.nodes.remove("n").close()
    entry = await opener.open(options("qcow2", tmp_path / "o.qcow2", **{"read-only": True}))
    assert entry.node.read_only
    assert len(entry.node.layers) == 2
    await opener.nodes.close()


async def test_a_failure_leaves_nothing_open(tmp_path: Path) -> None:
    make_images(tmp_path)
    opener = Opener(NodeTable(), PathPolicy([tmp_path]))
    for wrong in (
        options("vmdk", tmp_path / "b.raw"),
        options("qcow2", tmp_path / "o.qcow2", backing={"driver": "qcow2", "file": {"driver": "null-co"}}),
        options("qcow2", tmp_path / "o.qcow2", **{"data-file": {"driver": "null-co"}}),
        options("raw", tmp_path / "b.raw", offset=1 << 30),
    ):
        with pytest.raises(QmpError):
            await opener.open(wrong)
    assert list(opener.nodes) == []
    for path in ("b.raw", "a.qcow2"):
        await opener.open(options("raw", tmp_path / path))
        await opener.nodes.close()


async def test_an_inner_name_must_be_free_too(tmp_path: Path) -> None:
    make_images(tmp_path)
    opener = Opener(NodeTable(), PathPolicy([tmp_path]))
    same = {"driver": "file", "filename": str(tmp_path / "b.raw"), "node-name": "1x"}
    with pytest.raises(QmpError, match="Invalid node-name"):
        await opener.open(options("raw", tmp_path / "b.raw", file=same))
    await opener.open(options("raw", tmp_path / "b.raw"))
    await opener.nodes.close()
