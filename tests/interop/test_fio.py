"""fio's nbd engine with verification."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import Serve
from tests.interop.tools import make_disk, tool

VERIFY = (
    *("fio", "--name=verify", "--ioengine=nbd", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1"),
    *("--verify_state_save=0", "--serialize_overlap=1", "--size=16m", "--fsync=64", "--randseed=11"),
)


@pytest.mark.parametrize("kind", ["raw", "qcow2", "chain"])
def test_mixed_sizes(serve: Serve, tmp_path: Path, content: bytes, kind: str) -> None:
    image, image_format = make_disk(tmp_path, kind, content)
    job = ("--rw=randwrite", "--bsrange=512-256k", "--blockalign=512", "--do_verify=1")
    with serve(image, image_format) as server:
        tool(*VERIFY, *job, f"--uri={server.uri()}")
    if image_format == "qcow2":
        tool("qemu-img", "check", "-q", image)


def test_several_jobs_at_once(serve: Serve, tmp_path: Path, content: bytes) -> None:
    image, image_format = make_disk(tmp_path, "chain", content)
    job = ("--rw=randrw", "--bs=4k", "--numjobs=4", "--size=4m", "--offset_increment=4m", "--group_reporting")
    with serve(image, image_format) as server:
        tool(*VERIFY, *job, f"--uri={server.uri()}")
    tool("qemu-img", "check", "-q", image)


def test_a_changed_byte_is_found(serve: Serve, tmp_path: Path) -> None:
    """The control: fio's verification does see a difference."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(16 << 20))
    job = ("--rw=randwrite", "--bs=4k")
    with serve(image) as server:
        tool(*VERIFY, *job, "--do_verify=0", f"--uri={server.uri()}")
    with image.open("r+b") as file:
        file.seek(5 << 20)
        byte = file.read(1)
        file.seek(5 << 20)
        file.write(bytes([byte[0] ^ 1]))
    with serve(image) as server:
        tool(*VERIFY, *job, "--verify_only", f"--uri={server.uri()}", code=1)
