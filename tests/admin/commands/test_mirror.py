from pathlib import Path
from typing import Any

from tests.admin.clients import RawClient
from tests.admin.commands.test_jobs import wait_for
from tests.admin.commands.test_live import finish, pattern, prepare
from tests.admin.commands.test_nodes import add, nodes
from tests.admin.images import needs_images
from tests.cli.processes import output

pytestmark = needs_images


def test_a_mirror_takes_the_place_of_the_disk(client: RawClient, images: Path, tmp_path: Path) -> None:
    prepare(client, images)
    output("qemu-img", "create", "-q", "-f", "qcow2", images / "m.qcow2", "1M")
    assert add(client, "qcow2", images / "m.qcow2", "m") == {}
    unix = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    assert client.execute("nbd-server-start", addr=unix) == {}
    assert client.execute("block-export-add", type="nbd", id="e", node_name="o", writable=True) == {}
    started = client.execute("blockdev-mirror", job_id="j", device="o", target="m", sync="full", auto_dismiss=False)
    assert started == {}
    wait_for(client, "j", "ready")
    assert client.execute("job-complete", id="j") == {}
    assert finish(client, "j") is None
    (export,) = client.execute("query-block-exports")
    assert export["node-name"] == "m"
    assert client.execute("blockdev-del", node_name="o") == {}
    assert client.execute("blockdev-del", node_name="m") == "Node m is in use"
    output("qemu-io", "-f", "raw", "-c", "write -P 120 128k 64k", f"nbd+unix:///o?socket={tmp_path}/nbd")
    assert client.execute("nbd-server-stop") == {}
    assert client.execute("blockdev-del", node_name="m") == {}
    for letter, offset in ((97, "0"), (111, "64k"), (120, "128k")):
        pattern(images / "m.qcow2", letter, offset)


def mirror(client: RawClient, images: Path, **given: Any) -> Any:
    return client.execute(
        "drive-mirror", job_id="j", device="o", target=str(images / "m.qcow2"), auto_dismiss=False, **given
    )


def test_a_file_takes_the_place_of_the_disk_under_its_clients(client: RawClient, images: Path, tmp_path: Path) -> None:
    prepare(client, images)
    unix = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    assert client.execute("nbd-server-start", addr=unix) == {}
    assert client.execute("block-export-add", type="nbd", id="e", node_name="o", writable=True) == {}
    assert mirror(client, images, sync="full", node_name="new") == {}
    wait_for(client, "j", "ready")
    output("qemu-io", "-f", "raw", "-c", "write -P 121 192k 64k", f"nbd+unix:///o?socket={tmp_path}/nbd")
    assert client.execute("job-complete", id="j") == {}
    assert finish(client, "j") is None
    assert nodes(client)["o"]["file"] == str(images / "m.qcow2")
    assert nodes(client)["o"]["backing_file_depth"] == 0
    assert "new" in nodes(client)
    output("qemu-io", "-f", "raw", "-c", "write -P 120 128k 64k", f"nbd+unix:///o?socket={tmp_path}/nbd")
    pattern(images / "o.qcow2", 111, "64k")  # closed, so that others may open it
    assert client.execute("nbd-server-stop") == {}
    assert client.execute("blockdev-del", node_name="o") == {}
    for letter, offset in ((97, "0"), (111, "64k"), (120, "128k"), (121, "192k")):
        pattern(images / "m.qcow2", letter, offset)


def test_the_node_below_a_disk_that_was_replaced_is_free(client: RawClient, images: Path) -> None:
    assert client.execute("blockdev-add", driver="file", node_name="f", filename=str(images / "o.qcow2")) == {}
    assert client.execute("blockdev-add", driver="qcow2", node_name="o", file="f") == {}
    assert mirror(client, images, sync="full") == {}
    wait_for(client, "j", "ready")
    assert client.execute("blockdev-del", node_name="f") == "Block device f is in use"
    assert client.execute("job-complete", id="j") == {}
    assert finish(client, "j") is None
    assert client.execute("blockdev-del", node_name="f") == {}
    assert client.execute("blockdev-del", node_name="o") == {}


def test_only_the_top_layer_goes_to_a_file(client: RawClient, images: Path) -> None:
    prepare(client, images)
    assert mirror(client, images, sync="top") == {}
    wait_for(client, "j", "ready")
    assert client.execute("job-complete", id="j") == {}
    assert finish(client, "j") is None
    assert nodes(client)["o"]["backing_file_depth"] == 1
    assert client.execute("blockdev-del", node_name="o") == {}
    assert output("qemu-img", "map", images / "m.qcow2").count("m.qcow2") == 1
    pattern(images / "m.qcow2", 97, "0")
    pattern(images / "m.qcow2", 111, "64k")


def test_a_mirror_that_is_cancelled_leaves_the_disk(client: RawClient, images: Path) -> None:
    prepare(client, images)
    output("qemu-img", "create", "-q", "-f", "qcow2", images / "m.qcow2", "1M")
    assert mirror(client, images, sync="full", mode="existing", format="qcow2") == {}
    wait_for(client, "j", "ready")
    assert client.execute("block-job-cancel", device="j") == {}
    assert finish(client, "j") is None
    assert nodes(client)["o"]["file"] == str(images / "o.qcow2")
    pattern(images / "m.qcow2", 97, "0")


def test_what_is_refused(client: RawClient, images: Path) -> None:
    prepare(client, images)
    assert add(client, "raw", images / "b.raw", "r", read_only=True) == {}
    refused = client.execute("blockdev-mirror", job_id="j", device="o", target="r", sync="full")
    assert refused == "Block node is read-only: 'r' cannot be written"
    assert "give mode 'existing'" in mirror(client, images, sync="none")
    assert "outside the image roots" in client.execute(
        "drive-mirror", job_id="j", device="o", target="/elsewhere/m", sync="full"
    )
    assert mirror(client, images, sync="full", node_name="r") == "Duplicate nodes with node-name='r'"
    client.execute("object-add", qom_type="throttle-group", id="g")
    client.execute("blockdev-add", driver="throttle", node_name="t", throttle_group="g", file="r")
    filtered = client.execute("drive-mirror", job_id="j", device="t", target=str(images / "m.qcow2"), sync="full")
    assert filtered == "Node 't' is a filter: mirror the disk below it"
    before = (images / "o.qcow2").read_bytes()
    own = client.execute("drive-mirror", job_id="j", device="o", target=str(images / "o.qcow2"), sync="full")
    assert "lock" in own
    assert (images / "o.qcow2").read_bytes() == before
    assert not (images / "m.qcow2").exists()
    assert client.execute("query-jobs") == []


def test_a_disk_is_not_copied_to_what_is_made_of_it(client: RawClient, images: Path) -> None:
    assert add(client, "qcow2", images / "a.qcow2", "q") == {}
    assert client.execute("object-add", qom_type="throttle-group", id="g") == {}
    assert client.execute("blockdev-add", driver="throttle", node_name="t", throttle_group="g", file="q") == {}
    assert client.execute("blockdev-add", driver="throttle", node_name="u", throttle_group="g", file="t") == {}
    for command in ("blockdev-mirror", "blockdev-backup"):
        refused = client.execute(command, job_id="j", device="q", target="u", sync="full")
        assert refused == "Node 'u' is on node 'q', and cannot be a copy of it"
    refused = client.execute("blockdev-add", driver="copy-before-write", node_name="k", file="q", target="u")
    assert refused == "Node 'u' cannot be written"


def test_names_stay_with_the_images_when_they_change_places(client: RawClient, images: Path) -> None:
    output("qemu-img", "create", "-q", "-f", "qcow2", images / "new.qcow2", "1M")
    for name, image in (("q", "a"), ("n", "new")):
        file = {"driver": "file", "node-name": f"{name}-file", "filename": str(images / f"{image}.qcow2")}
        assert client.execute("blockdev-add", driver="qcow2", node_name=name, file=file) == {}
    assert client.execute("blockdev-mirror", job_id="m", device="q", target="n", sync="full", auto_dismiss=False) == {}
    wait_for(client, "m", "ready")
    assert client.execute("job-complete", id="m") == {}
    assert finish(client, "m") is None
    for name, image in (("q", "a"), ("n", "new")):
        given = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "read-only": True}
        for _ in range(2):
            assert client.execute("blockdev-reopen", options=[given]) == {}
            assert nodes(client)[f"{name}-file"]["file"] == str(images / f"{image}.qcow2")


def test_filters_stay_on_the_disk_that_clients_have(client: RawClient, images: Path) -> None:
    for name in ("new", "kept"):
        output("qemu-img", "create", "-q", "-f", "qcow2", images / f"{name}.qcow2", "1M")
    for name, image in (("q", "a"), ("n", "new"), ("k", "kept")):
        assert add(client, "qcow2", images / f"{image}.qcow2", name) == {}
    assert client.execute("object-add", qom_type="throttle-group", id="g") == {}
    assert client.execute("blockdev-add", driver="throttle", node_name="t", throttle_group="g", file="q") == {}
    assert client.execute("blockdev-mirror", job_id="m", device="q", target="n", sync="full", auto_dismiss=False) == {}
    wait_for(client, "m", "ready")
    assert client.execute("job-complete", id="m") == {}
    assert finish(client, "m") is None
    assert client.execute("blockdev-del", node_name="q") == {}
    assert client.execute("blockdev-del", node_name="n") == "Block device n is in use"
    assert client.execute("blockdev-add", driver="copy-before-write", node_name="c", file="n", target="k") == {}
    output("qemu-img", "create", "-q", "-f", "qcow2", images / "other.qcow2", "1M")
    assert add(client, "qcow2", images / "other.qcow2", "o") == {}
    for device, target in (("c", "o"), ("o", "c")):
        refused = client.execute("blockdev-mirror", job_id="m", device=device, target=target, sync="full")
        assert refused == "Node 'c' is a filter: mirror the disk below it"
    assert [client.execute("blockdev-del", node_name=name) for name in "ctnko"] == [{}] * 5
