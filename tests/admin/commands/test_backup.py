from pathlib import Path
from typing import Any

from tests.admin.clients import RawClient
from tests.admin.commands.test_bitmaps import bitmaps
from tests.admin.commands.test_jobs import wait_for
from tests.admin.commands.test_nodes import add, nodes
from tests.admin.images import needs_images
from tests.cli.processes import output

pytestmark = needs_images


class Disk:
    """``d``, exported writable, and a way to write to it."""

    def __init__(self, client: RawClient, images: Path, directory: Path) -> None:
        self.client, self.images = client, images
        self.uri = f"nbd+unix:///d?socket={directory}/nbd"
        output("qemu-io", "-c", "write -P 97 0 256k", images / "a.qcow2")
        assert add(client, "qcow2", images / "a.qcow2", "d") == {}
        assert client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": f"{directory}/nbd"}}) == {}
        assert client.execute("block-export-add", type="nbd", id="d", node_name="d", writable=True) == {}

    def write(self, letter: int, offset: str) -> None:
        output("qemu-io", "-f", "raw", "-c", f"write -P {letter} {offset} 64k", self.uri)

    def new(self, name: str) -> Path:
        """A new image, and its node."""
        path = self.images / f"{name}.qcow2"
        output("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
        assert add(self.client, "qcow2", path, name) == {}
        return path

    def keep(self, bitmap: str | None = None) -> None:
        """What a client does before a backup: a copy-before-write filter, and access to its moment."""
        self.new("fleece")
        more = {} if bitmap is None else {"bitmap": {"node": "d", "name": bitmap}}
        cbw = {"driver": "copy-before-write", "node_name": "cbw", "file": "d", "target": "fleece"} | more
        assert self.client.execute("blockdev-add", **cbw) == {}
        assert self.client.execute("qom-set", path="d", property="drive", value="cbw") == {}
        assert self.client.execute("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw") == {}

    def release(self, target: str) -> None:
        assert self.client.execute("blockdev-del", node_name="cbw") == "Block device cbw is in use"
        assert self.client.execute("blockdev-del", node_name="snap") == {}
        assert self.client.execute("qom-set", path="d", property="drive", value="d") == {}
        for name in ("cbw", "fleece", target):
            assert self.client.execute("blockdev-del", node_name=name) == {}
        (self.images / "fleece.qcow2").unlink()


def action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def pattern(path: Path, *commands: str) -> None:
    for command in commands:
        assert "verification failed" not in output("qemu-io", "-r", "-c", f"read -P {command}", path)


def end(client: RawClient, identity: str) -> dict[str, Any]:
    job = wait_for(client, identity, "concluded")
    assert client.execute("job-dismiss", id=identity) == {}
    return job


def test_full_and_incremental_of_moments(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    disk.keep()
    disk.write(98, "0")  # after the moment, before the bitmap begins: neither may lose it
    full = disk.new("full")
    actions = [
        action("block-dirty-bitmap-add", node="d", name="b", persistent=True),
        action("blockdev-backup", device="snap", target="full", sync="full", job_id="j1", auto_dismiss=False),
    ]
    assert client.execute("transaction", actions=actions) == {}
    assert "error" not in end(client, "j1")
    disk.release("full")
    pattern(full, "97 0 256k", "0 256k 768k")
    assert output("qemu-img", "map", "--output=json", full).count('"data": true') == 1
    assert bitmaps(client, "d")["b"]["count"] == 65536
    disk.write(99, "512k")
    disk.keep("b")
    disk.write(100, "128k")
    increment = disk.new("inc")
    actions = [
        action("block-dirty-bitmap-add", node="snap", name="b"),
        action("block-dirty-bitmap-merge", node="snap", target="b", bitmaps=[{"name": "b", "node": "d"}]),
        action(
            "blockdev-backup", device="snap", target="inc", sync="incremental", bitmap="b", job_id="j2",
            auto_dismiss=False, compress=False, speed=0,
        ),
        action("block-dirty-bitmap-clear", node="d", name="b"),
    ]  # fmt: skip
    assert client.execute("transaction", actions=actions) == {}
    assert "error" not in end(client, "j2")
    disk.release("inc")
    pattern(increment, "98 0 64k", "99 512k 64k", "97 128k 64k")
    assert bitmaps(client, "d")["b"]["count"] == 65536  # what was written between the moment and the transaction
    assert next(iter(nodes(client, flat=True))) == "d"
    client.execute("nbd-server-stop")


def test_a_backup_straight_from_the_disk(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    assert client.execute("block-dirty-bitmap-add", node="d", name="b") == {}
    disk.write(98, "0")
    target = disk.new("t")
    options = {"device": "d", "target": "t", "sync": "incremental", "bitmap": "b", "job_id": "j"}
    assert client.execute("blockdev-backup", **options, auto_finalize=False, auto_dismiss=False) == {}
    wait_for(client, "j", "pending")
    busy = client.execute("block-dirty-bitmap-clear", node="d", name="b")
    assert busy == "Bitmap 'b' is currently in use by another operation and cannot be used"
    disk.write(99, "128k")
    assert client.execute("job-finalize", id="j") == {}
    end(client, "j")
    assert bitmaps(client, "d")["b"]["count"] == 65536
    assert client.execute("blockdev-del", node_name="t") == {}
    pattern(target, "98 0 64k", "0 64k 64k")
    client.execute("nbd-server-stop")


def test_a_transaction_that_fails_begins_nothing(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    disk.new("t")
    assert client.execute("block-dirty-bitmap-add", node="d", name="b") == {}
    backup = action("blockdev-backup", device="d", target="t", sync="incremental", bitmap="b", job_id="j")
    failed = client.execute("transaction", actions=[backup, action("abort")])
    assert failed == "Transaction aborted using Abort action"
    assert client.execute("query-jobs") == []
    assert bitmaps(client, "d")["b"]["busy"] is False
    assert client.execute("blockdev-del", node_name="t") == {}
    client.execute("nbd-server-stop")


def test_grouped_jobs_all_end_well_or_none(client: RawClient, images: Path) -> None:
    assert add(client, "qcow2", images / "a.qcow2", "d") == {}
    for name in ("s", "t", "u"):
        assert client.execute("blockdev-add", driver="null-co", node_name=name, size=1 << 20) == {}
    actions = [
        action("blockdev-backup", device="d", target="t", sync="none", job_id="j1", auto_dismiss=False),
        action("blockdev-backup", device="s", target="u", sync="full", job_id="j2", auto_dismiss=False),
    ]
    grouped = {"completion-mode": "grouped"}
    assert client.execute("transaction", actions=actions, properties=grouped) == {}
    wait_for(client, "j2", "waiting")
    assert client.execute("block-job-cancel", device="j1") == {}
    assert wait_for(client, "j1", "concluded")["error"]
    assert wait_for(client, "j2", "concluded")["error"]


def test_what_is_refused(client: RawClient, images: Path) -> None:
    assert add(client, "qcow2", images / "a.qcow2", "d") == {}
    for name, size in (("t", 1 << 20), ("small", 512)):
        assert client.execute("blockdev-add", driver="null-co", node_name=name, size=size) == {}
    backup = {"device": "d", "target": "t", "sync": "full", "job_id": "j"}
    for more, problem in (
        ({"target": "d"}, "Source and target cannot be the same"),
        ({"target": "small"}, "Source and target image have different sizes"),
        ({"target": "x"}, "Cannot find device='x' nor node-name='x'"),
        ({"sync": "incremental"}, "must provide a valid bitmap name for 'incremental' sync mode"),
        ({"sync": "incremental", "bitmap": "x"}, "Bitmap 'x' could not be found"),
        ({"bitmap_mode": "never"}, "Cannot specify bitmap sync mode without a bitmap"),
        ({"job_id": "1j"}, "Invalid job ID '1j'"),
        ({"sync": "zz"}, "Parameter 'sync' does not accept value 'zz'"),
    ):
        assert client.execute("blockdev-backup", **(backup | more)) == problem
    cbw = {"driver": "copy-before-write", "node_name": "c", "file": "d"}
    assert client.execute("blockdev-add", **cbw, target="small") == "Source and target image have different sizes"
    assert "cannot be written" in client.execute("blockdev-add", **cbw, target="d")
    wrong = client.execute("blockdev-add", **cbw, target="t", bitmap={"node": "d", "name": "x"})
    assert wrong == "Dirty bitmap 'x' not found"
    assert "keeps no moment" in client.execute("blockdev-add", driver="snapshot-access", node_name="s", file="d")
    assert client.execute("query-jobs") == []


def test_a_backup_to_a_file(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    target = {"job_id": "j", "device": "d", "auto_dismiss": False, "format": "qcow2"}
    assert client.execute("block-dirty-bitmap-add", node="d", name="b") == {}
    assert client.execute("drive-backup", target=str(images / "full"), sync="full", **target) == {}
    assert wait_for(client, "j", "concluded").get("error") is None
    client.execute("job-dismiss", id="j")
    disk.write(120, "64k")
    actions = [action("drive-backup", target=str(images / "inc"), sync="incremental", bitmap="b", **target)]
    assert client.execute("transaction", actions=[*actions, action("abort")]).startswith("Transaction aborted")
    assert not (images / "inc").exists()
    assert client.execute("transaction", actions=actions) == {}
    assert wait_for(client, "j", "concluded").get("error") is None
    client.execute("job-dismiss", id="j")
    assert bitmaps(client, "d")["b"]["count"] == 0
    pattern(images / "full", "97 0 256k")
    pattern(images / "inc", "120 64k 64k", "0 0 64k", "0 128k 64k")


def test_what_clients_change_goes_to_a_file_over_the_disk(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    given = {"device": "d", "target": str(images / "t"), "sync": "none", "auto_dismiss": False}
    assert client.execute("drive-backup", job_id="j", **given) == {}
    disk.write(120, "64k")
    assert client.execute("block-job-cancel", device="j") == {}
    wait_for(client, "j", "concluded")
    assert client.execute("blockdev-del", node_name="d") == "Node d is in use"
    assert client.execute("nbd-server-stop") == {}
    client.execute("job-dismiss", id="j")
    assert client.execute("blockdev-del", node_name="d") == {}
    pattern(images / "t", "97 0 256k")  # the moment of the backup, over the disk as it is now
    pattern(images / "a.qcow2", "120 64k 64k")


def test_a_backup_that_cannot_be_leaves_no_file(client: RawClient, images: Path, tmp_path: Path) -> None:
    Disk(client, images, tmp_path)
    given = {"job_id": "j", "device": "d", "target": str(images / "t"), "sync": "incremental"}
    assert client.execute("drive-backup", bitmap="absent", **given) == "Bitmap 'absent' could not be found"
    assert client.execute("drive-backup", **given).startswith("must provide a valid bitmap name")
    assert not (images / "t").exists()
