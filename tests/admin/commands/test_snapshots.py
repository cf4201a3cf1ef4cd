from pathlib import Path

from tests.admin.clients import RawClient
from tests.admin.commands.test_backup import Disk, pattern
from tests.admin.commands.test_nodes import nodes
from tests.admin.images import needs_images

pytestmark = needs_images


def test_what_is_written_after_goes_to_the_new_image(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    disk.write(98, "0")
    options = {"node_name": "d", "snapshot_node_name": "top"}
    assert client.execute("blockdev-snapshot-sync", snapshot_file=str(images / "new.qcow2"), **options) == {}
    disk.write(99, "64k")
    info = nodes(client)["d"]
    assert (info["file"], info["backing_file_depth"]) == (str(images / "new.qcow2"), 1)
    assert client.execute("block-dirty-bitmap-add", node="top", name="b") == {}
    assert client.execute("blockdev-snapshot-sync", snapshot_file=str(images / "x"), **options).startswith("Duplicate")
    client.execute("nbd-server-stop")
    assert client.execute("blockdev-del", node_name="d") == {}
    pattern(images / "a.qcow2", "98 0 64k", "97 64k 64k")
    pattern(images / "new.qcow2", "98 0 64k", "99 64k 64k")


def test_what_is_refused(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    outside = str(tmp_path / "x.qcow2")
    refused = client.execute("blockdev-snapshot-sync", node_name="d", snapshot_file=outside)
    assert "outside the image roots" in refused
    unknown = client.execute("blockdev-snapshot-sync", node_name="d", snapshot_file=str(images / "x"), format="nope")
    assert "nope" in unknown
    assert not (images / "x").exists()
    disk.keep()
    busy = client.execute("blockdev-snapshot-sync", node_name="d", snapshot_file=str(images / "x"))
    assert busy == "Node 'd' is in use by a 'copy-before-write' node"
    client.execute("nbd-server-stop")
