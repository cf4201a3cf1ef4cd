from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.image.helpers import image, qemu_img
from tests.formats.qcow2.engine import mark_in_use
from tests.support.images import needs_qemu, run

pytestmark = needs_qemu


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "base", "40M")
    run("qemu-io", "-c", "write 1M 100k", "-c", "write 3000k 4k", "-c", "write -z 5M 1M", "base")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "80M")
    run("qemu-io", "-c", "write 1M 1k", "-c", "write 70M 3M", "top")
    run("qemu-img", "snapshot", "-c", "one", "top")
    run("qemu-io", "-c", "write 10M 3M", "top")
    run("qemu-img", "convert", "-O", "vdi", "top", "vdi")
    run("qemu-img", "convert", "-O", "qcow2", "top", "marked")
    run("qemu-img", "bitmap", "--add", "-g", "512", "marked", "one")
    run("qemu-img", "bitmap", "--add", "marked", "another")
    (tmp_path / "left").write_bytes((tmp_path / "marked").read_bytes())
    mark_in_use(tmp_path / "left", "one")
    return tmp_path


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--size", "1G"],
        ["--size", "1000"],
        ["-O", "qcow2", "--size", "1G"],
        ["-O", "qcow2", "--size", "0"],
        ["-O", "qcow2", "--size", "7T", "-o", "cluster_size=2M,refcount_bits=1"],
        ["-O", "qcow2", "--size", "100M", "-o", "cluster_size=512,refcount_bits=64"],
        ["-O", "qcow2", "--size", "5G", "-o", "extended_l2=on"],
        ["-O", "qcow2", "--size", "5G", "-o", "preallocation=full"],
        ["-O", "qcow2", "--size", "5G", "-o", "data_file=absent"],
        ["-O", "qcow2", "-o", "data_file=absent,data_file_raw=on", "base"],
        ["-O", "qcow2", "-o", "backing_file=base,backing_fmt=qcow2", "top"],
        ["-O", "qcow2", "top"],
        ["-O", "qcow2", "-o", "cluster_size=4k", "top"],
        ["-O", "qcow2", "-l", "one", "top"],
        ["-O", "qcow2", "-f", "vdi", "vdi"],
        ["-O", "raw", "top"],
        ["-O", "qcow2", "marked"],
        ["-O", "qcow2", "-o", "cluster_size=512", "marked"],
        ["-O", "qcow2", "-o", "compat=0.10", "marked"],
        ["-O", "qcow2", "left"],
    ],
)
def test_what_qemu_img_says(images: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], output: str) -> None:
    ours = image(monkeypatch, "measure", "--output", output, *arguments)
    stock = qemu_img("measure", "--output", output, *arguments)
    assert (ours.out, ours.code, ours.err) == (stock.out, 0, "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-O", "qcow2"], 2, "Either --size N or one filename must be specified."),
        (["-O", "qcow2", "--size", "1G", "base"], 2, "--size N cannot be used together with a filename."),
        (["--size", "1G", "-f", "raw"], 2, "--image-opts, -f, and -l require a filename argument."),
        (["--size", "1G", "-l", "one"], 2, "--image-opts, -f, and -l require a filename argument."),
        (["-O", "vdi", "base"], 1, "Block driver 'vdi' does not support size measurement"),
        (["--size", "much"], 1, "Invalid image size specified"),
        (["absent"], 1, "absent"),
    ],
)
def test_what_is_refused(
    images: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    ran = image(monkeypatch, "measure", *arguments)
    assert (ran.code, message in ran.err) == (code, True)
