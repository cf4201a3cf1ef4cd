import errno
from pathlib import Path

import pytest

from nbdserve.admin.control import Control
from nbdserve.formats.base import SnapshotInfo
from nbdserve.formats.qcow2.driver import Qcow2Driver
from tests.admin.clients import RawClient
from tests.admin.commands.test_backup import Disk, action
from tests.admin.commands.test_jobs import wait_for
from tests.admin.commands.test_nodes import nodes
from tests.admin.images import needs_images
from tests.cli.processes import output

pytestmark = needs_images


def names(client: RawClient) -> list[str]:
    return [each["name"] for each in nodes(client)["d"]["image"].get("snapshots", [])]


def test_clients_go_on_and_the_snapshot_stays(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    disk.write(98, "0")
    assert client.execute("blockdev-snapshot-internal-sync", device="d", name="s") == {}
    disk.write(99, "0")
    assert "verification failed" not in output("qemu-io", "-f", "raw", "-c", "read -P 99 0 64k", disk.uri)
    assert names(client) == ["s"]
    client.execute("nbd-server-stop")
    assert client.execute("blockdev-del", node_name="d") == {}
    image = images / "a.qcow2"
    output("qemu-img", "check", "-q", image)
    output("qemu-img", "snapshot", "-a", "s", image)
    for pattern in ("98 0 64k", "97 64k 64k"):
        assert "verification failed" not in output("qemu-io", "-r", "-c", f"read -P {pattern}", image)


def test_one_that_is_made_and_fails_nevertheless_is_not_written_to(
    client: RawClient, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_snapshot = Qcow2Driver.create_snapshot

    async def failing(self: Qcow2Driver, name: str, *, icount: int | None = None) -> SnapshotInfo:
        await create_snapshot(self, name, icount=icount)
        raise OSError(errno.EIO, "at the very end")

    disk = Disk(client, images, tmp_path)

    def write(pattern: int) -> None:  # without FUA, so that places are remembered
        output("qemu-io", "-f", "raw", "-t", "writeback", "-c", f"write -P {pattern} 0 4k", disk.uri)

    for _ in range(3):
        write(98)
    monkeypatch.setattr(Qcow2Driver, "create_snapshot", failing)
    assert "at the very end" in str(client.execute("blockdev-snapshot-internal-sync", device="d", name="s"))
    write(99)
    client.execute("nbd-server-stop")
    assert client.execute("blockdev-del", node_name="d") == {}
    image = images / "a.qcow2"
    output("qemu-img", "check", "-q", image)
    output("qemu-img", "snapshot", "-a", "s", image)
    assert "verification failed" not in output("qemu-io", "-r", "-c", "read -P 98 0 4k", image)


def test_one_in_a_transaction_that_fails_is_gone(client: RawClient, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    internal = action("blockdev-snapshot-internal-sync", device="d", name="s")
    assert client.execute("transaction", actions=[internal, action("abort")]).startswith("Transaction aborted")
    assert names(client) == []
    assert client.execute("transaction", actions=[internal]) == {}
    disk.write(98, "0")
    told = client.execute("blockdev-snapshot-delete-internal-sync", device="d", id="1")
    assert (told["id"], told["name"], told["vm-state-size"]) == ("1", "s", 0)
    disk.write(99, "64k")
    client.execute("nbd-server-stop")
    assert client.execute("blockdev-del", node_name="d") == {}
    output("qemu-img", "check", "-q", images / "a.qcow2")
    assert "verification failed" not in output("qemu-io", "-c", "read -P 99 64k 64k", images / "a.qcow2")


def test_not_while_a_job_works_on_the_disk(client: RawClient, control: Control, images: Path, tmp_path: Path) -> None:
    disk = Disk(client, images, tmp_path)
    disk.new("target")
    assert client.execute("blockdev-mirror", job_id="m", device="d", target="target", sync="full") == {}
    wait_for(client, "m", "ready")
    busy = "Node 'd' is busy: block device is in use by block job: mirror"
    assert client.execute("blockdev-snapshot-internal-sync", device="d", name="s") == busy
    client.execute("block-job-cancel", device="m", force=True)
    client.execute("nbd-server-stop")
