"""A file system on the export, through nbdfuse and a loop device."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.interop.conftest import Serve
from tests.interop.tools import tool

SOURCE = Path(__file__).parents[2] / "nbdserve"
"""Some files to copy."""


@contextmanager
def nbdfuse(directory: Path, uri: str) -> Iterator[Path]:
    """The export as a file."""
    directory.mkdir()
    file = directory / "nbd"
    process = subprocess.Popen(["nbdfuse", str(file), uri])
    try:
        deadline = time.monotonic() + 60
        while not (file.exists() and file.stat().st_size):
            assert process.poll() is None, "nbdfuse ended"
            assert time.monotonic() < deadline, "nbdfuse does not come up"
            time.sleep(0.05)
        yield file
    finally:
        if process.poll() is None:
            tool("fusermount3", "-u", directory)
            process.wait(60)


@contextmanager
def loop_device(file: Path) -> Iterator[str]:
    """A block device over the file."""
    device = tool("losetup", "-f", "--show", file).strip()
    try:
        yield device
    finally:
        tool("losetup", "-d", device)


@contextmanager
def block_device(serve: Serve, image: Path, image_format: str, directory: Path) -> Iterator[str]:
    """The served image as a block device; the server's export is a file in ``directory``."""
    with (
        serve(image, image_format, "--discard=unmap") as server,
        nbdfuse(directory, server.uri()) as file,
        loop_device(file) as device,
    ):
        yield device


@contextmanager
def mounted(device: str, directory: Path) -> Iterator[Path]:
    """The file system on the device."""
    directory.mkdir(exist_ok=True)
    tool("mount", device, directory)
    try:
        yield directory
    finally:
        tool("umount", directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mount need root")
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_ext4(serve: Serve, tmp_path: Path, image_format: str) -> None:
    image = tmp_path / "disk"
    tool("qemu-img", "create", "-q", "-f", image_format, image, "128M")
    with block_device(serve, image, image_format, tmp_path / "fuse") as device:
        tool("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "fs") as tree:
            shutil.copytree(SOURCE, tree / "copy")
            tool("sync", "-f", tree)
        tool("e2fsck", "-fn", device)
    if image_format == "qcow2":
        tool("qemu-img", "check", "-q", image)
    with (
        block_device(serve, image, image_format, tmp_path / "fuse again") as device,
        mounted(device, tmp_path / "fs") as tree,
    ):
        assert_same_tree(SOURCE, tree / "copy")


def assert_same_tree(left: Path, right: Path) -> None:
    """Every file of ``left`` is in ``right`` with the same bytes."""
    for path in left.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert filecmp.cmp(path, right / path.relative_to(left), shallow=False), path
