from pathlib import Path

from tests.admin.clients import RawClient
from tests.admin.commands.test_backup import Disk, action, pattern
from tests.admin.commands.test_nodes import add, nodes
from tests.admin.images import needs_images
from tests.cli.processes import output

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


def overlay(images: Path, name: str) -> Path:
    path = images / f"{name}.qcow2"
    output("qemu-img", "create", "-q", "-f", "qcow2", "-b", images / "a.qcow2", "-F", "qcow2", path)
    return path


def test_an_image_that_was_made_before(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    disk.write(98, "0")
    new = overlay(images, "new")
    options = {"node_name": "d", "snapshot_node_name": "top", "mode": "existing"}
    assert client.execute("blockdev-snapshot-sync", snapshot_file=str(new), **options) == {}
    disk.write(99, "64k")
    client.execute("nbd-server-stop")
    assert client.execute("blockdev-del", node_name="d") == {}
    pattern(images / "a.qcow2", "98 0 64k", "97 64k 64k")
    pattern(new, "98 0 64k", "99 64k 64k")


def test_a_node_as_the_layer(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    new = overlay(images, "new")
    file = {"driver": "file", "filename": str(new), "node-name": "top-file"}
    opened = {"driver": "qcow2", "node_name": "top", "file": file, "backing": None, "discard": "unmap"}
    assert client.execute("blockdev-add", **opened) == {}
    assert client.execute("blockdev-snapshot", node="d", overlay="top") == {}
    assert nodes(client).keys() >= {"d", "top-file"}
    assert client.execute("block-dirty-bitmap-add", node="top", name="b") == {}
    output("qemu-io", "-f", "raw", "-c", "write -P 99 64k 64k", "-c", "discard 64k 64k", disk.uri)
    assert "verification failed" not in output("qemu-io", "-f", "raw", "-c", "read -P 97 0 64k", disk.uri)
    assert client.execute("blockdev-del", node_name="top") == "Node top is not owned by the monitor"
    client.execute("nbd-server-stop")
    assert client.execute("blockdev-del", node_name="d") == {}
    pattern(images / "a.qcow2", "97 0 256k")
    pattern(new, "97 0 64k", "97 128k 128k")
    output("qemu-img", "check", "-q", new)


def test_all_or_none(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    file = {"driver": "file", "filename": str(overlay(images, "new"))}
    assert client.execute("blockdev-add", driver="qcow2", node_name="top", file=file, backing=None) == {}
    for each in (
        action("blockdev-snapshot-sync", node_name="d", snapshot_file=str(images / "made.qcow2")),
        action("blockdev-snapshot", node="d", overlay="top"),
    ):
        refused = client.execute("transaction", actions=[each, action("abort")])
        assert refused == "Transaction aborted using Abort action"
        assert nodes(client)["d"]["file"] == str(images / "a.qcow2")
        disk.write(99, "0")
    assert not (images / "made.qcow2").exists()
    assert nodes(client)["d"]["backing_file_depth"] == 0
    assert client.execute("blockdev-snapshot", node="d", overlay="top") == {}
    assert client.execute("blockdev-snapshot", node="d", overlay="top") == "The overlay already has a backing image"
    client.execute("nbd-server-stop")
    assert client.execute("blockdev-del", node_name="d") == {}
    pattern(images / "a.qcow2", "99 0 64k")


def test_an_overlay_on_a_file_that_is_a_node(client: RawClient, images: Path) -> None:
    assert add(client, "qcow2", images / "a.qcow2", "q") == {}
    assert client.execute("blockdev-add", driver="file", node_name="f", filename=str(images / "o.qcow2")) == {}
    assert client.execute("blockdev-add", driver="qcow2", node_name="o", file="f", backing=None) == {}
    assert client.execute("blockdev-snapshot", node="q", overlay="o") == {}
    assert client.execute("blockdev-del", node_name="f") == "Block device f is in use"
    assert client.execute("blockdev-del", node_name="q") == {}
    assert client.execute("blockdev-del", node_name="f") == {}
