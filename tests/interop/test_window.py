"""A window of an image, and an image in a window, as qemu-nbd serves them."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.processes import greets, until
from tests.interop.conftest import Serve
from tests.interop.tools import make_disk, tool

OFFSET = 512 * 1024 + 512


@contextmanager
def qemu_nbd(sock: Path, *argv: str | Path) -> Iterator[str]:
    """A qemu-nbd that ends with its last client or with the block; its URI."""
    with subprocess.Popen(["qemu-nbd", "-r", "-t", "-e", "8", "-k", sock, *argv]) as process:
        try:
            until(lambda: greets(sock), "qemu-nbd answers")
            yield f"nbd+unix:///?socket={sock}"
        finally:
            process.terminate()


def _depth(uri: str) -> list[dict[str, int]]:
    extents: list[dict[str, int]] = json.loads(tool("nbdinfo", "--json", "--map=qemu:allocation-depth", uri))
    return extents


def test_a_window_of_a_chain_is_what_qemu_nbd_serves(serve: Serve, tmp_path: Path, content: bytes) -> None:
    image, image_format = make_disk(tmp_path, "chain", content)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with serve(image, image_format, "-r", "-A", "--offset", str(OFFSET)) as server:
        tool("nbdcopy", server.uri(), ours)
        our_depth = _depth(server.uri())
    with qemu_nbd(tmp_path / "qemu.sock", "-A", "-f", image_format, "--offset", str(OFFSET), image) as uri:
        tool("nbdcopy", uri, theirs)
        their_depth = _depth(uri)
    assert ours.read_bytes() == theirs.read_bytes() == content[OFFSET:]
    assert our_depth == their_depth


def test_a_window_of_a_chain_is_written(serve: Serve, tmp_path: Path, content: bytes) -> None:
    image, image_format = make_disk(tmp_path, "chain", content)
    new = bytes(reversed(content[OFFSET:]))
    source, expected = tmp_path / "source.raw", tmp_path / "expected.raw"
    source.write_bytes(new)
    expected.write_bytes(content[:OFFSET] + new)
    with serve(image, image_format, "--offset", str(OFFSET)) as server:
        tool("nbdcopy", "--flush", source, server.uri())
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", source, server.uri())
    tool("qemu-img", "compare", "-f", "raw", "-F", image_format, expected, image)
    tool("qemu-img", "check", "-q", image)


def test_an_image_in_a_tar_archive(serve: Serve, tmp_path: Path, content: bytes) -> None:
    image, _ = make_disk(tmp_path, "qcow2", content)
    archive = tmp_path / "appliance.ova"
    with tarfile.open(archive, "w") as tar:
        tar.add(image, "disk.qcow2")
    with tarfile.open(archive) as tar:
        member = tar.getmember("disk.qcow2")
    window = {"driver": "raw", "offset": member.offset_data, "size": member.size}
    file = {"driver": "file", "filename": str(archive)}
    tree = "json:" + json.dumps({"driver": "qcow2", "file": window | {"file": file}})
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with serve(Path(tree), "qcow2", "-r") as server:
        tool("nbdcopy", server.uri(), ours)
    with qemu_nbd(tmp_path / "qemu.sock", tree) as uri:
        tool("nbdcopy", uri, theirs)
    assert ours.read_bytes() == theirs.read_bytes() == content
