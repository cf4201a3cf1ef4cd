"""What ``image convert`` leaves behind when it is refused, interrupted, or cannot read or write."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdserve.storage.file import FileStorage
from tests.cli.image.helpers import Ran, converted, image, interrupted, marked
from tests.support.images import needs_qemu, run

pytestmark = needs_qemu


def _source(directory: Path) -> Path:
    path = directory / "source"
    path.write_bytes(random.Random(1).randbytes(3 << 20))
    return path


def test_the_target_is_there_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _source(tmp_path)
    target = tmp_path / "target"
    target.write_text("precious")
    target.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(target)
    write = FileStorage.write_all
    written = 0

    async def full(self: FileStorage, pieces: Any) -> None:
        nonlocal written
        written += sum(len(data) for _, data in pieces)
        if written > 1 << 20:
            raise OSError(28, os.strerror(28), self.path)
        await write(self, pieces)

    with monkeypatch.context() as patched:
        patched.setattr(FileStorage, "write_all", full)
        ran = image(patched, "convert", "-f", "raw", "-O", "qcow2", "-S", "0", made, link)
    assert ran.code == 1
    assert "No space left on device" in ran.err
    assert target.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["link", "source", "target"]
    converted(monkeypatch, "-f", "raw", "-O", "qcow2", made, link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", made, target)


def test_what_cannot_be_read_becomes_zeroes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _source(tmp_path)
    content = bytearray(made.read_bytes())
    content[65536:131072] = b"\x01" * 65536
    made.write_bytes(content)
    read = FileStorage.read_all

    async def broken(self: FileStorage, pieces: Sequence[tuple[int, memoryview]]) -> None:
        if self.path == str(made) and any(at < 70144 and at + len(buffer) > 69632 for at, buffer in pieces):
            raise OSError(5, os.strerror(5))
        await read(self, pieces)

    monkeypatch.setattr(FileStorage, "read_all", broken)
    ran = image(monkeypatch, "convert", "-f", "raw", made, tmp_path / "target")
    assert (ran.code, "Input/output error" in ran.err) == (1, True)
    ran = image(monkeypatch, "convert", "--salvage", "-f", "raw", made, tmp_path / "target")
    assert ran.code == 0
    assert ran.err == "nbdserve: warning: error while reading offset 69632: Input/output error\n"
    content[69632:70144] = bytes(512)
    assert (tmp_path / "target").read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target-is-zero", "source", "new"], 2, "--target-is-zero requires use of -n flag"),
        (["--target-image-opts", "source", "new"], 2, "--target-image-opts requires use of -n flag"),
        (["-m", "17", "source", "new"], 2, "Allowed number of coroutines is between 1 and 16"),
        (["source"], 2, "Must specify image file name"),
        (["-O", "nonsense", "source", "new"], 1, "unknown image format 'nonsense'"),
        (["-c", "-O", "vdi", "source", "new"], 1, "Compression not supported for this file format"),
        (["-B", "source", "-O", "qcow2", "source", "new"], 1, "requires explicit backing format (-F)"),
        (["-B", "source", "-F", "raw", "-O", "vdi", "source", "new"], 1, "the parent of a VDI image is one too"),
        (["-t", "often", "source", "new"], 1, "Invalid output cache option: often"),
        (["-T", "often", "source", "new"], 1, "Invalid source cache option: often"),
        (["--bitmaps", "source", "new"], 1, "Source lacks bitmap support"),
        (["--skip-broken-bitmaps", "source", "new"], 2, "Use of --skip-broken-bitmaps requires --bitmaps"),
        (["--bitmaps", "source", "source", "new"], 1, "Copying bitmaps only possible with single source"),
        (["-r", "quick", "source", "new"], 1, "Invalid rate limit specified"),
        (["-O", "qcow2", "-o", "nonsense=1", "source", "new"], 1, "unknown qcow2 option 'nonsense'"),
        (["-O", "qcow2", "missing", "new"], 1, "missing"),
        (["source", "source"], 1, "is in use"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    _source(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = image(monkeypatch, "convert", *arguments)
    assert (ran.code, message in ran.err) == (code, True), ran
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(("target", "by"), [("raw", signal.SIGINT), ("vmdk", signal.SIGINT), ("vmdk", signal.SIGTERM)])
def test_interrupted(tmp_path: Path, target: str, by: signal.Signals) -> None:
    made = marked(tmp_path / "source")
    before = made.read_bytes()
    (tmp_path / "kept").write_text("precious")
    for name in ("new", "kept"):
        ended = interrupted("convert", "-m", "1", "-S", "0", "-O", target, made, tmp_path / name, by=by)
        assert ended == Ran(128 + by, "", "")
    assert sorted(os.listdir(tmp_path)) == ["kept", "source"]
    assert (tmp_path / "kept").read_text() == "precious"
    assert made.read_bytes() == before


@pytest.mark.parametrize("target", ["qed", "qcow2"])
def test_a_full_disk(tmp_path: Path, target: str) -> None:
    """The kernel refuses to let the file grow past a limit, in the middle of the copy."""
    made = marked(tmp_path / "source")
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20)); from nbdserve.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "image",
        "convert",
        "-S",
        "0",
        "-O",
        target,
        str(made),
        str(tmp_path / "new"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    assert ran.stderr.endswith("/new: File too large\n")
    assert os.listdir(tmp_path) == ["source"]
