from pathlib import Path

from nbdserve.admin.command import as_json
from nbdserve.admin.describe import BlockDeviceInfo, CacheInfo, device_info
from nbdserve.admin.nodes import NodeEntry
from nbdserve.block.node import Node
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage


async def test_members_have_qemus_spelling() -> None:
    node = Node([await RawDriver.open(MemoryStorage(bytes(512), path="/m"), {}, read_only=True)], detect_zeroes="on")
    info = as_json(device_info(NodeEntry("n", "file", node, cache="none")))
    assert info["cache"] == {"writeback": True, "direct": True, "no-flush": False}
    assert (info["node-name"], info["drv"], info["ro"], info["detect_zeroes"]) == ("n", "file", True, "on")
    assert info["image"] == {
        "virtual-size": 512, "filename": "/m", "format": "file", "actual-size": 65536, "dirty-flag": False,
    }  # fmt: skip
    names = {field.alias for field in BlockDeviceInfo.model_fields.values()}
    assert {"backing_file_depth", "iops_rd", "write_threshold", "dirty-bitmaps"} <= names
    assert as_json(CacheInfo(direct=False, no_flush=True))["no-flush"] is True


async def test_a_file_that_is_closed_for_a_moment_has_no_size_on_disk(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(bytes(512))
    node = Node([await RawDriver.open(await FileStorage.open(str(tmp_path / "d"), read_only=True), {}, read_only=True)])
    entry = NodeEntry("n", "raw", node)
    assert "actual-size" in device_info(entry).image
    await node.top.close()
    assert "actual-size" not in device_info(entry).image
