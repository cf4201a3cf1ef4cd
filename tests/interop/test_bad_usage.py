"""Bad command lines, places that cannot be used, a full disk and Ctrl-C, as `test_bad_input`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.processes import greets, until
from tests.interop.hostile import (
    NBDSERVE,
    OPENING,
    PROGRAMS,
    QEMU_NBD,
    command,
    needs_root,
    qemu_io,
    refused,
    run,
    unchanged,
    url,
    without_privilege,
)
from tests.interop.tools import running_server, tool

# --- the command line, addresses, permissions --------------------------------------------------------------------


def test_unknown_export(image: Path) -> None:
    with running_server(image.parent, image, "qcow2"):
        for argv in (["nbdinfo", url(image.parent, "nope")], ["qemu-io", "-f", "raw", url(image.parent, "nope")]):
            done = run(argv)
            assert done.returncode != 0
            assert "nope" in done.stderr, done
        assert qemu_io(url(image.parent), "read -P 1 0 64k").returncode == 0


def test_address_in_use(image: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for program in PROGRAMS:
            argv = [*program, "-b", "127.0.0.1", "-p", port, image]
            refused(image.parent, argv, f"127.0.0.1:{port}", "in use")
    path = image.parent / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        for name in ("serve", "qemu-nbd"):
            refused(image.parent, command(name, image), path, "another server listens there")
    path.unlink()
    path.write_text("a file")
    for name in ("serve", "qemu-nbd"):
        refused(image.parent, command(name, image), path, "no socket")


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "socket", "device"])
def test_what_is_no_image(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    bound = socket.socket(socket.AF_UNIX)
    if kind == "socket":
        bound.bind(str(path))
    names = OPENING if kind != "device" else ("info", "check", "map")
    for name in names:
        refused(tmp_path, command(name, path), path)
    bound.close()
    if kind == "directory":
        refused(tmp_path, [NBDSERVE, "image", "create", "-q", "-f", "raw", path, "1M"], path)


def test_missing_permission(image: Path) -> None:
    locked = image.parent / "locked"
    locked.mkdir()
    (locked / "x").write_bytes(bytes(512))
    image.chmod(0)
    for name in OPENING:
        refused(image.parent, without_privilege(command(name, image)), image, "Permission denied")
    image.chmod(0o444)
    for name in ("serve", "qemu-nbd"):
        refused(image.parent, without_privilege(command(name, image)), image, "Permission denied")
    assert run(without_privilege(command("map", image))).returncode == 0
    locked.chmod(0o555)
    argv: list[str | Path] = [NBDSERVE, "image", "create", "-q", locked / "new", "1M"]
    refused(image.parent, without_privilege(argv), locked / "new", "Permission denied")
    for program in PROGRAMS:
        argv = [*program, "-r", "-k", locked / "s", image]
        refused(image.parent, without_privilege(argv), locked / "s", "ermission denied")


def test_usage(image: Path) -> None:
    usages: list[list[str | Path]] = [
        ["serve", "--nonsense", image],
        ["serve"],
        ["serve", "-e", "many", image],
        ["image", "info"],
        ["image", "info", "--nonsense", image],
        ["image", "map", "--output=xml", image],
        ["image", "create"],
        ["nonsense"],
    ]
    for argv in usages:
        with unchanged(image.parent):
            done = run([NBDSERVE, *argv])
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr
        assert 1 <= len(done.stderr.splitlines()) <= 2, done
    done = run([QEMU_NBD, "--nonsense", image])
    assert (done.returncode, "--nonsense" in done.stderr) == (1, True), done


def test_wrong_format(image: Path) -> None:
    for name in ("serve", "qemu-nbd", "info", "check", "map"):
        refused(image.parent, command(name, image, "-f", "qcow9"), image, "'qcow9'")
        refused(image.parent, command(name, image.parent / "base.raw", "-f", "qcow2"), "base.raw", "magic = ")
    refused(image.parent, [NBDSERVE, "image", "create", "-f", "qcow9", image.parent / "new", "1M"], "'qcow9'")
    for option in ("cluster_size=3", "cluster_size=4M", "refcount_bits=3", "compat=9", "nonsense=1"):
        name, _, value = option.partition("=")
        argv = [NBDSERVE, "image", "create", "-f", "qcow2", "-o", option, image.parent / "new", "1M"]
        refused(image.parent, argv, name, {"4M": 4 << 20, "1": ""}.get(value, value))
    for size in ("-1", "1Q", "9E"):
        argv = [NBDSERVE, "image", "create", "-f", "qcow2", "--", image.parent / "new", size]
        refused(image.parent, argv)
    unknown = image.parent / "other"
    unknown.write_bytes(b"KDMV" + bytes(508))
    for name in ("serve", "qemu-nbd", "info", "check", "map"):
        refused(image.parent, command(name, unknown), unknown, "version = 0")


# --- a full disk, Ctrl-C -----------------------------------------------------------------------------------------


@contextmanager
def small_file_system(directory: Path, kind: str) -> Iterator[Path]:
    """6 MiB of space."""
    place = directory / "small"
    place.mkdir()
    if kind == "tmpfs":
        tool("mount", "-t", "tmpfs", "-o", "size=6m", "none", place)
    else:
        disk = directory / "small.ext4"
        disk.touch()
        os.truncate(disk, 8 << 20)
        tool("mkfs.ext4", "-q", "-O", "^has_journal", disk)
        tool("mount", "-o", "loop", disk, place)
    try:
        yield place
    finally:
        tool("umount", place)


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_full_disk(tmp_path: Path, kind: str, image_format: str) -> None:
    with small_file_system(tmp_path, kind) as place:
        for preallocation in ("full", "falloc"):
            argv = [NBDSERVE, "image", "create", "-q", "-f", image_format, "-o", f"preallocation={preallocation}"]
            refused(place, [*argv, place / "new", "32M"], "No space left on device")
        disk = place / "disk"
        tool("qemu-img", "create", "-q", "-f", image_format, disk, "32M")
        with running_server(tmp_path, disk, image_format):
            assert qemu_io(url(tmp_path), "write -P 1 0 1M", "flush").returncode == 0
            done = qemu_io(url(tmp_path), *(f"write -P 2 {number}M 1M" for number in range(1, 12)))
            assert "No space left on device" in done.stdout, done
            done = qemu_io(url(tmp_path), "read -P 1 0 1M", "write -P 3 0 512k", "flush", "read -P 3 0 512k")
            assert done.returncode == 0, done
        assert "Traceback" not in (tmp_path / "server.log").read_text()
        if image_format == "qcow2":
            assert run(["qemu-img", "check", "-q", disk]).returncode in {0, 3}
        done = qemu_io(disk, "read -P 3 0 512k", "read -P 1 512k 512k", form=image_format)
        assert done.returncode == 0, done


@pytest.mark.parametrize("program", ["serve", "qemu-nbd"])
def test_interrupted_server(image: Path, program: str) -> None:
    """Ctrl-C with a client that writes all the time: the server ends in order, and so is the image."""
    argv = list(map(str, command(program, image)))
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    client = None
    try:
        until(lambda: greets(image.parent / "nbd.sock"), "it answers")
        writes = ["write -q -P 9 0 1M", "write -q -z 0 1M"] * 2000
        words = [word for each in writes for word in ("-c", each)]
        begun = image.stat().st_mtime_ns
        client = subprocess.Popen(
            ["qemu-io", "-f", "raw", *words, url(image.parent)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(lambda: image.stat().st_mtime_ns != begun, "the first write is done")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        for each in (process, client):
            if each is not None and each.poll() is None:
                each.kill()
                each.wait()
    assert (process.returncode, said) == (0, "")
    assert not (image.parent / "nbd.sock").exists()
    tool("qemu-img", "check", "-q", image)
