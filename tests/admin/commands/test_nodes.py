import errno
import subprocess
from pathlib import Path
from typing import Any

from nbdserve.admin.control import Control
from tests.admin.clients import RawClient
from tests.admin.images import needs_images
from tests.cli.processes import output

pytestmark = needs_images


def add(client: RawClient, driver: str, path: Path, name: str, **more: Any) -> Any:
    file = {"driver": "file", "filename": str(path)}
    return client.execute("blockdev-add", driver=driver, node_name=name, file=file, **more)


def nodes(client: RawClient, **arguments: Any) -> dict[str, Any]:
    return {info["node-name"]: info for info in client.execute("query-named-block-nodes", **arguments)}


def test_a_chain_is_a_node_and_its_parts(client: RawClient, images: Path) -> None:
    file = {"driver": "file", "filename": str(images / "o.qcow2"), "node-name": "o-file"}
    assert client.execute("blockdev-add", driver="qcow2", node_name="o", file=file) == {}
    found = nodes(client)
    assert found["o"]["image"]["backing-image"]["filename"] == str(images / "a.qcow2")
    assert found["o"]["backing_file_depth"] == 1
    assert found["o-file"]["drv"] == "file"
    assert {info["drv"] for name, info in found.items() if name.startswith("#block")} == {"qcow2", "file"}
    assert "backing-image" not in nodes(client, flat=True)["o"]["image"]
    assert nodes(client).keys() == found.keys()
    (device,) = client.execute("query-block")
    assert device["qdev"] == "o"
    assert device["device"] == ""
    assert device["inserted"]["image"]["format"] == "qcow2"
    inner = next(name for name in found if name.startswith("#"))
    assert client.execute("blockdev-del", node_name=inner) == f"Node {inner} is not owned by the monitor"
    assert client.execute("blockdev-del", node_name="o") == {}
    assert nodes(client) == {}
    assert add(client, "qcow2", images / "o.qcow2", "o", backing=None) == {}
    assert nodes(client)["o"]["backing_file_depth"] == 0


def test_an_image_on_a_node_keeps_its_locks(client: RawClient, images: Path) -> None:
    assert client.execute("blockdev-add", driver="file", node_name="f", filename=str(images / "a.qcow2")) == {}
    assert client.execute("blockdev-add", driver="qcow2", node_name="q", file="f") == {}
    again = client.execute("blockdev-add", driver="qcow2", node_name="q2", file="f")
    assert again == "Node 'f' is in use by node 'q'"
    assert client.execute("blockdev-del", node_name="f") == "Block device f is in use"
    assert client.execute("blockdev-del", node_name="q") == {}
    locked = subprocess.run(["qemu-io", "-c", "write 0 512", images / "a.qcow2"], capture_output=True, check=False)
    assert b"lock" in locked.stderr
    assert client.execute("blockdev-del", node_name="f") == {}
    output("qemu-io", "-c", "write 0 512", images / "a.qcow2")
    assert "is no file" in client.execute("blockdev-add", driver="raw", node_name="r", file=_null(client))


def _null(client: RawClient) -> str:
    assert client.execute("blockdev-add", driver="null-co", node_name="null", size=1000) == {}
    assert nodes(client)["null"]["image"]["virtual-size"] == 1024
    return "null"


def test_sizes(client: RawClient, images: Path) -> None:
    assert add(client, "qcow2", images / "a.qcow2", "q") == {}
    assert client.execute("block_resize", node_name="q", size=2 << 20) == {}
    assert nodes(client)["q"]["image"]["virtual-size"] == 2 << 20
    assert client.execute("block_resize", node_name="q", size=1000) == "The new size must be a multiple of 512"
    assert add(client, "raw", images / "b.raw", "r", read_only=True) == {}
    assert client.execute("block_resize", node_name="r", size=2 << 20) == "Image is read-only"


def test_nothing_outside_the_image_roots_is_opened(
    client: RawClient, images: Path, tmp_path: Path, control: Control
) -> None:
    outside = tmp_path / "outside.raw"
    outside.write_bytes(bytes(4096))
    (images / "link.raw").symlink_to(outside)
    for path in (outside, images / "link.raw", images / ".." / "outside.raw"):
        assert "is outside the image roots" in add(client, "raw", path, "r")
    control.paths.add(tmp_path)
    assert add(client, "raw", outside, "r") == {}
    assert nodes(client)["r"]["ro"] is False


def test_what_cannot_be_opened(client: RawClient, images: Path) -> None:
    assert "qcow2" in add(client, "qcow2", images / "b.raw", "q")
    assert nodes(client) == {}
    broken: list[dict[str, Any]] = [
        {"cache": {"direct": True, "no-flush": True}},
        {"backing": "x"},
        {"encrypt": {"format": "luks"}},
        {"encrypt": {"format": "luks", "key-secret": "s"}},
        {"data_file": "x"},
    ]
    problems = [add(client, "qcow2", images / "a.qcow2", "q", **more) for more in broken]
    assert problems == [
        "'cache': direct and no-flush do not go together",
        "Could not open backing file: Cannot find device='x' nor node-name='x'",
        "Parameter 'encrypt.key-secret' is missing",
        "No secret with id 's'",
        "'data-file': give the options of a 'file' or 'host_device' node here",
    ]
    file = {"driver": "file", "filename": str(images / "b.raw"), "locking": "off"}
    assert "always locked" in client.execute("blockdev-add", driver="raw", node_name="r", file=file)


def test_images_in_images(client: RawClient, images: Path) -> None:
    inner = {"driver": "qcow2", "file": {"driver": "file", "filename": str(images / "a.qcow2")}}
    assert client.execute("blockdev-add", driver="raw", node_name="w", file=inner, offset=512, size=1024) == {}
    assert nodes(client)["w"]["image"]["virtual-size"] == 1024
    backing = {"driver": "raw", "file": {"driver": "file", "filename": str(images / "b.raw")}}
    assert add(client, "qcow2", images / "o.qcow2", "o", backing=backing) == {}
    assert nodes(client)["o"]["image"]["backing-image"]["format"] == "raw"


def test_a_throttled_disk(client: RawClient, images: Path) -> None:
    assert client.execute("object-add", qom_type="throttle-group", id="g", limits={"iops-total": 1000}) == {}
    assert add(client, "qcow2", images / "a.qcow2", "q") == {}
    assert client.execute("blockdev-add", driver="throttle", node_name="t", throttle_group="g", file="q") == {}
    inner = {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": str(images / "b.raw")}}
    assert client.execute("blockdev-add", driver="throttle", node_name="u", throttle_group="g", file=inner) == {}
    assert nodes(client)["t"]["drv"] == "throttle"
    assert nodes(client)["r"]["drv"] == "raw"
    assert client.execute("blockdev-del", node_name="r") == "Node r is not owned by the monitor"
    assert [device["qdev"] for device in client.execute("query-block")] == ["t", "u"]
    client.execute("qom-set", path="/objects/g", property="limits", value={"iops-total": 7})
    assert client.execute("qom-get", path="/objects/g", property="limits")["iops-total"] == 7
    client.execute("block_resize", node_name="t", size=2 << 20)
    assert nodes(client)["q"]["image"]["virtual-size"] == 2 << 20
    assert client.execute("object-del", id="g") == "object 'g' is in use, can not be deleted"
    assert client.execute("blockdev-del", node_name="q") == "Block device q is in use"
    for name in ("t", "q", "u"):
        assert client.execute("blockdev-del", node_name=name) == {}
    assert client.execute("object-del", id="g") == {}
    assert add(client, "raw", images / "b.raw", "r") == {}


def test_write_thresholds(client: RawClient, images: Path) -> None:
    file = {"driver": "file", "filename": str(images / "a.qcow2"), "node-name": "f"}
    assert client.execute("blockdev-add", driver="qcow2", node_name="q", file=file) == {}
    for name in ("q", "f"):
        assert client.execute("block-set-write-threshold", node_name=name, write_threshold=1 << 30) == {}
        assert nodes(client)[name]["write_threshold"] == 1 << 30
        assert client.execute("block-set-write-threshold", node_name=name, write_threshold=0) == {}
        assert nodes(client)[name]["write_threshold"] == 0
    refused = client.execute("block-set-write-threshold", node_name="zz", write_threshold=1)
    assert refused == "Device 'zz' not found"


def test_the_name_of_the_backing_file(client: RawClient, images: Path) -> None:
    middle, top = images / "o.qcow2", images / "top.qcow2"
    output("qemu-img", "create", "-q", "-f", "qcow2", "-b", "o.qcow2", "-F", "qcow2", top)
    assert add(client, "qcow2", top, "t") == {}
    inner = next(name for name, info in nodes(client).items() if info["file"] == str(middle) and info["drv"] == "qcow2")

    def change(device: str, name: str) -> Any:
        absolute = str(images / "a.qcow2")
        return client.execute("change-backing-file", device=device, image_node_name=name, backing_file=absolute)

    assert change("t", inner) == {}
    assert inner in nodes(client)
    assert change("t", "zz") == "Cannot find device='' nor node-name='zz'"
    assert add(client, "raw", images / "b.raw", "r") == {}
    assert change("r", "r") == "not allowing backing file change on an image without a backing file"
    assert change("r", "t") == "'r' and image file are not in the same chain"
    assert client.execute("blockdev-del", node_name="t") == {}
    assert f"backing file: {images}/a.qcow2" in output("qemu-img", "info", middle)


def test_a_node_that_cannot_be_flushed_is_deleted(client: RawClient, images: Path, control: Control) -> None:
    for written in (False, True):
        assert add(client, "raw", images / "b.raw", "b") == {}
        node = control.nodes.get("b").node
        close = node.close
        node.changes += written

        async def fail(close: Any = close) -> None:
            await close()
            raise OSError(errno.ENOSPC, "No space left on device")

        node.close = fail  # type: ignore[method-assign]
        answer = client.execute("blockdev-del", node_name="b")
        lost = "Node 'b' is deleted, and what was written to it last may be lost: No space left on device"
        assert answer == (lost if written else {})
        assert nodes(client) == {}
