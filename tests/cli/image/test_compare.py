from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nbdserve.storage import blocking
from nbdserve.storage.file import FileStorage
from tests.cli.image.helpers import Ran, image, qemu_img
from tests.support.images import needs_qemu, run

pytestmark = needs_qemu


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, form, size, *commands in (
        ("a.raw", "raw", "2M", "write -P 1 64k 64k", "write -P 2 1M 4k"),
        ("a.qcow2", "qcow2", "2M", "write -P 1 64k 64k", "write -P 2 1M 4k"),
        ("zeroes.qcow2", "qcow2", "2M", "write -P 1 64k 64k", "write -P 2 1M 4k", "write -z 1536k 64k"),
        ("other.qcow2", "qcow2", "2M", "write -P 1 64k 64k", "write -P 3 1026k 1k"),
        ("longer.vdi", "vdi", "3M", "write -P 1 64k 64k", "write -P 2 1M 4k"),
        ("more.vmdk", "vmdk", "3M", "write -P 1 64k 64k", "write -P 2 1M 4k", "write -P 7 2500k 1k"),
    ):
        run("qemu-img", "create", "-q", "-f", form, tmp_path / name, size)
        run("qemu-io", "-f", form, *(part for command in commands for part in ("-c", command)), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.raw", "a.qcow2"],
        ["-f", "raw", "-F", "qcow2", "a.raw", "a.qcow2"],
        ["-s", "a.qcow2", "a.qcow2"],
        ["-q", "a.raw", "a.qcow2"],
        ["a.raw", "other.qcow2"],
        ["-q", "a.raw", "other.qcow2"],
        ["a.raw", "longer.vdi"],
        ["longer.vdi", "a.qcow2"],
        ["a.raw", "more.vmdk"],
        ["more.vmdk", "other.qcow2"],
        ["-s", "a.raw", "longer.vdi"],
        ["a.qcow2", "zeroes.qcow2"],
        ["-s", "a.qcow2", "zeroes.qcow2"],
        ["-s", "a.qcow2", "other.qcow2"],
        ["--image-opts", "driver=raw,file.filename=a.raw", "driver=qcow2,file.filename=a.qcow2"],
    ],
)
def test_what_qemu_img_says(images: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    stock, ours = qemu_img("compare", *arguments, cwd=images), image(monkeypatch, "compare", *arguments)
    assert (ours.out, ours.code, ours.err) == (stock.out, stock.code, "")


def test_progress(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = image(monkeypatch, "compare", "-p", "a.raw", "a.qcow2")
    assert (ran.code, ran.out, "100%" in ran.err) == (0, "Images are identical.\n", True)


def test_exit_codes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*arguments: str) -> Ran:
        ran = image(monkeypatch, "compare", *arguments)
        assert ran.err.startswith("nbdserve: ")
        return ran

    assert ended("a.raw", "absent").code == 2
    assert ended("-F", "vdi", "a.raw", "a.qcow2").code == 2
    for options in (["-T", "fast"], ["--object", "secret,id=x"], ["--secret-file", "absent"], ["--image-opts"]):
        assert ended(*options, "a.raw", "a.qcow2").code == 2

    async def broken(self: FileStorage, *_: Any) -> Any:
        raise OSError(5, os.strerror(5), self.path)

    def unreadable(fd: int, offset: int, buffer: memoryview) -> None:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patched:
        patched.setattr(blocking, "read_fully", unreadable)
        ran = ended("-f", "raw", "-F", "raw", "a.raw", "longer.vdi")
        assert ran.code == 4
        assert ran.err in ("nbdserve: a.raw: Input/output error\n", "nbdserve: longer.vdi: Input/output error\n")
    with monkeypatch.context() as patched:
        patched.setattr(FileStorage, "host_map", broken)
        assert ended("-s", "-f", "raw", "-F", "raw", "a.raw", "a.raw").code == 3
