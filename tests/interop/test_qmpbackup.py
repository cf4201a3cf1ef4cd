"""Unmodified qmpbackup (github.com/abbbi/qmpbackup, which is in no package registry), where it is installed."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.admin.clients import RawClient
from tests.cli.processes import NBDSERVE, SECONDS, greets, needs, output, started, until

pytestmark = needs("qmpbackup", "qmprestore", "qemu-img", "qemu-io")


class Backups:
    """A served disk, and the tool."""

    def __init__(self, directory: Path, format_name: str) -> None:
        self.disk, self.target, self.admin = directory / "disk.img", directory / "backups", directory / "admin"
        self.format, self.directory = format_name, directory
        self.uri = f"nbd+unix:///disk?socket={directory}/nbd"
        output("qemu-img", "create", "-q", "-f", format_name, self.disk, "64M")
        output("qemu-io", "-f", format_name, "-c", "write -P 17 0 8M", "-c", "write -P 34 30M 4M", self.disk)

    def argv(self, level: str, *more: str) -> list[str | Path]:
        raw = ["--include-raw"] if self.format == "raw" else []
        to = ["--target", str(self.target)]
        return ["qmpbackup", "--socket", self.admin, "backup", *to, "--level", level, *raw, *more]

    def backup(self, level: str, *more: str) -> None:
        """The files are named by the second they were made in, so two of them need two."""
        begun = int(time.time())
        output(*self.argv(level, *more))
        until(lambda: int(time.time()) > begun, "the next second")

    def change(self, *commands: str) -> None:
        output("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), self.uri)

    def assert_equal(self, image: Path) -> None:
        compared = output("qemu-img", "compare", "-f", self.format, "-F", "raw", image, self.uri)
        assert "identical" in compared

    def files(self, level: str) -> list[Path]:
        return sorted(self.target.rglob(f"{level}-*"))


@pytest.fixture(params=["qcow2", "raw"])
def backups(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backups]:
    made = Backups(tmp_path, request.param)
    socket = tmp_path / "nbd"
    serve: list[str | Path] = ["serve", "--admin", made.admin, "-k", socket, "-f", made.format, f"disk={made.disk}"]
    with started(*NBDSERVE, *serve):
        until(lambda: greets(made.admin), "it answers")
        yield made


def test_a_chain_of_backups_restores_the_disk(backups: Backups) -> None:
    backups.backup("full")
    backups.change("write -P 51 4M 1M")
    if backups.format != "raw":  # an increment of a raw disk is a raw file: what is zero in it does not count
        backups.change("write -z 30M 1M")
    backups.backup("inc")
    backups.change("write -P 68 50M 2M")
    backups.backup("inc")
    assert len(backups.files("INC")) == 2
    shown = ["qmpbackup", "--socket", str(backups.admin), "info", "--show"]
    assert "disk" in output(*shown, "blockdev")
    output(*shown, "bitmaps")
    restored = backups.directory / "restored"
    (full,) = backups.files("FULL")
    if backups.format == "raw":
        for part in (full, *backups.files("INC")):
            output("dd", f"if={part}", f"of={restored}", "bs=64k", "conv=sparse,notrunc")
    else:
        output("qmprestore", "merge", "--dir", full.parent, "--targetfile", restored)
    backups.assert_equal(restored)


def test_a_copy(backups: Backups) -> None:
    backups.backup("copy")
    (copy,) = backups.files("COPY")
    backups.assert_equal(copy)


def test_an_abort_leaves_nothing_behind(backups: Backups) -> None:
    admin = RawClient(str(backups.admin)).negotiate()
    command = backups.argv("full", "--speed-limit", "262144")
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as tool:
        until(lambda: bool(admin.execute("query-block-jobs")), "the backup runs")
        backups.change("write -P 85 1M 64k")
        tool.send_signal(signal.SIGINT)
        assert tool.wait(SECONDS) != 0
    assert admin.execute("query-block-jobs") == []
    names = {node["node-name"] for node in admin.execute("query-named-block-nodes")}
    assert not any(name.startswith("qmpbackup") for name in names), names
    admin.close()
    backups.change("read -P 85 1M 64k", "read -P 17 2M 64k")
