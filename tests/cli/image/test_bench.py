from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from nbdserve.storage.file import FileStorage
from tests.cli.image.helpers import image, qemu_img
from tests.support.images import needs_qemu

pytestmark = needs_qemu


def without_seconds(text: str) -> str:
    return re.sub(r"\d+\.\d{3}", "N", text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "300"],
        ["-c", "50", "-d", "4", "-s", "64k", "-S", "1M", "-o", "3M"],
        ["-c", "100", "-w", "-d", "4", "--flush-interval", "10", "--pattern", "65"],
        ["-c", "100", "-w", "-d", "4", "--flush-interval", "10", "--no-drain", "-t", "none"],
    ],
)
def test_what_qemu_img_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"z" * (4 << 20))
    ours = image(monkeypatch, "bench", "-f", "raw", *arguments, disk)
    written = disk.read_bytes()
    disk.write_bytes(b"z" * (4 << 20))
    stock = qemu_img("bench", "-f", "raw", *arguments, disk)
    assert (without_seconds(ours.out), ours.code, ours.err) == (without_seconds(stock.out), 0, "")
    assert written == disk.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--flush-interval", "70"], 2, "--flush-interval is only available in write tests"),
        (["-w", "--flush-interval", "7"], 2, "Flush interval can't be smaller than depth"),
        (["-s", "8M"], 1, "is longer than the disk"),
        (["-s", "0"], 1, "Invalid buffer size specified"),
        (["-o", "there"], 1, "Invalid offset specified"),
        (["-t", "never"], 1, "Invalid image cache option"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    ran = image(monkeypatch, "bench", "-f", "raw", *arguments, tmp_path / "disk")
    assert (ran.code, message in ran.err) == (code, True), ran


def test_a_request_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))

    async def broken(self: FileStorage, offset: int, data: object) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(FileStorage, "write", broken)
    ran = image(monkeypatch, "bench", "-w", "-c", "9", "-f", "raw", tmp_path / "disk")
    assert (ran.code, ran.err) == (1, f"nbdserve: {tmp_path / 'disk'}: Input/output error\n")
