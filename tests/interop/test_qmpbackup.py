"""Unmodified qmpbackup (github.com/abbbi/qmpbackup), where it is installed: full, twice incremental, restored."""

from __future__ import annotations

from pathlib import Path

from tests.cli.processes import NBDSERVE, connectable, needs, output, started, until


@needs("qmpbackup", "qmprestore", "qemu-img", "qemu-io")
def test_a_chain_of_backups_restores_the_disk(tmp_path: Path) -> None:
    disk, backups, admin = tmp_path / "disk.qcow2", tmp_path / "backups", tmp_path / "admin"
    backups.mkdir()
    output("qemu-img", "create", "-q", "-f", "qcow2", disk, "64M")
    output("qemu-io", "-c", "write -P 17 0 8M", "-c", "write -P 34 30M 4M", disk)
    uri = f"nbd+unix:///disk?socket={tmp_path}/nbd"
    serve: list[str | Path] = [
        *NBDSERVE,
        "serve",
        "--admin",
        admin,
        "-k",
        tmp_path / "nbd",
        "-f",
        "qcow2",
        f"disk={disk}",
    ]
    with started(*serve):
        until(lambda: connectable(admin), "it listens")
        backup: list[str | Path] = ["qmpbackup", "--socket", admin, "backup", "--target", backups, "--level"]
        output(*backup, "full")
        output("qemu-io", "-f", "raw", "-c", "write -P 51 4M 1M", "-c", "write -z 30M 1M", uri)
        output(*backup, "inc")
        output("qemu-io", "-f", "raw", "-c", "write -P 68 50M 2M", uri)
        output(*backup, "inc")
    restored = tmp_path / "restored.qcow2"
    output("qmprestore", "merge", "--dir", next(backups.glob("*/FULL*")).parent, "--targetfile", restored)
    assert "identical" in output("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", disk, restored)
