"""qmp-shell of QEMU's Python package: tab completion asks query-commands at once, and its requests have no id."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.processes import NBDSERVE, SECONDS, greets, started, until


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[Path]:
    """The admin socket of a server of ``d``."""
    disk, path = tmp_path / "d.raw", tmp_path / "admin"
    disk.write_bytes(bytes(1 << 20))
    with started(*NBDSERVE, "serve", "--admin", path, "-k", tmp_path / "nbd", "-f", "raw", f"d={disk}"):
        until(lambda: greets(path), "it answers")
        yield path


SHELL = [sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()"]


def shell(admin: Path, lines: str, *options: str) -> str:
    program = [*SHELL, *options, str(admin)]
    return subprocess.run(program, input=lines, capture_output=True, text=True, timeout=SECONDS, check=True).stdout


def test_commands_transactions_and_the_human_monitor(admin: Path) -> None:
    transaction = "transaction(\nblock-dirty-bitmap-add node=d name=a\nblock-dirty-bitmap-add node=d name=b\n)\n"
    said = shell(admin, f"{transaction}query-block\nblockdev-del node-name=x\n")
    assert "Connected to QEMU 7.2" in said
    assert '"name": "a"' in said
    assert '"name": "b"' in said
    assert "Failed to find node with node-name='x'" in said
    assert "Used by:          export 'd'" in shell(admin, "info block\n", "-H")


def test_tab_completes_while_another_shell_works(admin: Path) -> None:
    master, slave = pty.openpty()
    first = subprocess.Popen([*SHELL, str(admin)], stdin=slave, stdout=slave, stderr=slave)
    try:
        os.close(slave)
        said = _read(master, rb"\(QEMU\)")
        assert b"Connected to QEMU 7.2" in said
        assert '"running"' in shell(admin, "query-status\n"), "the second is answered while the first is there"
        os.write(master, b"query-stat\t\n")
        # An end of file that comes before the next prompt is lost.
        said = _read(master, rb'(?s)"running".*\(QEMU\)')
        assert b"query-status" in said
        os.write(master, b"\x04")
        first.wait(SECONDS)
    finally:
        first.kill()
        first.wait()
        os.close(master)


def _read(terminal: int, wanted: bytes) -> bytes:
    """What is shown until it contains the expression ``wanted``."""
    said = b""
    while not re.search(wanted, said):
        assert select.select([terminal], [], [], SECONDS)[0], said
        said += os.read(terminal, 4096)
    return said
