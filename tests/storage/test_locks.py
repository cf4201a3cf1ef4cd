"""The locks, among ourselves and against QEMU's tools in both directions."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.errors import ImageError
from nbdserve.storage.file import FileStorage
from nbdserve.storage.locks import lock_image

needs_qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils are not installed")


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"a" * (1 << 20))
    return str(path)


def qemu(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@contextlib.contextmanager
def qemu_io_holding(image: str, *options: str) -> Iterator[None]:
    """A qemu-io that has ``image`` open."""
    with subprocess.Popen(
        ["qemu-io", *options, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "1 MiB" not in (line := process.stdout.readline()):
            assert line, "qemu-io ended early"
        try:
            yield
        finally:
            process.stdin.close()
            process.wait(60)


# --- among ourselves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_reads", "second_reads", "allowed"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
)
async def test_one_writer_or_many_readers(image: str, first_reads: bool, second_reads: bool, allowed: bool) -> None:
    first = await FileStorage.open(image, read_only=first_reads)
    if allowed:
        second = await FileStorage.open(image, read_only=second_reads)
        await second.close()
    else:
        with pytest.raises(ImageError, match=r"in use by another process \((write|resize) lock\).*stop that process"):
            await FileStorage.open(image, read_only=second_reads)
    await first.close()
    again = await FileStorage.open(image)
    await again.close()


async def test_force_share_looks_at_an_image_in_use(image: str) -> None:
    writer = await FileStorage.open(image)
    look = await FileStorage.open(image, read_only=True, force_share=True)
    await writer.close()
    second_writer = await FileStorage.open(image)
    await look.close()
    await second_writer.close()


async def test_without_locking_nobody_is_refused(image: str) -> None:
    first = await FileStorage.open(image, locking=False)
    second = await FileStorage.open(image)
    await first.close()
    await second.close()


def test_the_bytes_are_qemus(image: str) -> None:
    expected = {True: {100, 101, 103, 201, 203}, False: {100, 201, 203}}
    for write, held in expected.items():
        fd = os.open(image, os.O_RDWR)
        other = os.open(image, os.O_RDWR)
        lock_image(fd, image, write)
        taken = set()
        for byte in range(300):
            try:
                fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError:
                taken.add(byte)
        assert taken == held
        os.close(fd)
        os.close(other)


def test_a_refused_user_holds_nothing(image: str) -> None:
    first, second, third = (os.open(image, os.O_RDWR) for _ in range(3))
    lock_image(first, image, False)
    with pytest.raises(ImageError):
        lock_image(second, image, True)
    lock_image(third, image, False)
    for fd in (first, second, third):
        os.close(fd)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(
    image: str, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with caplog.at_level(logging.WARNING):
        lock_image(0, image, True)
    assert image in caplog.text
    assert "no OFD locks" in caplog.text


def test_another_error_of_the_kernel_is_named(image: str) -> None:
    with pytest.raises(ImageError, match="cannot be locked: Bad file descriptor"):
        lock_image(9999, image, True)


# --- against QEMU ----------------------------------------------------------------------------------------------------
#
# A raw image that QEMU opens shares writing with others, so that QEMU's readers of raw images get along with a writer.


@pytest.fixture
def qcow2(tmp_path: Path) -> str:
    path = str(tmp_path / "disk.qcow2")
    assert qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "1M").returncode == 0
    return path


def assert_refused(*command: str) -> None:
    answer = qemu(*command)
    assert answer.returncode == 1, command
    assert " lock" in answer.stderr
    assert "Is another process using the image" in answer.stderr


def assert_allowed(*command: str) -> None:
    answer = qemu(*command)
    assert answer.returncode == 0, answer.stderr


@needs_qemu
async def test_qemu_refuses_a_raw_image_that_we_write(image: str) -> None:
    storage = await FileStorage.open(image)
    assert_refused("qemu-io", "-f", "raw", "-c", "write 0 512", image)
    assert_refused("qemu-img", "convert", "-f", "raw", "-O", "raw", image, image + ".copy")
    assert_refused("qemu-img", "resize", "-f", "raw", image, "2M")
    assert_refused("qemu-nbd", "-f", "raw", "-k", image + ".socket", image)
    assert_refused("qemu-nbd", "-r", "-f", "raw", "-k", image + ".socket", image)
    assert_allowed("qemu-img", "info", "-U", "-f", "raw", image)
    await storage.close()
    assert_allowed("qemu-io", "-f", "raw", "-c", "write 0 512", image)


@needs_qemu
async def test_qemu_refuses_a_qcow2_image_that_we_write(qcow2: str) -> None:
    storage = await FileStorage.open(qcow2)
    assert_refused("qemu-io", "-f", "qcow2", "-c", "write 0 512", qcow2)
    assert_refused("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", qcow2)
    assert_refused("qemu-img", "info", qcow2)
    assert_refused("qemu-img", "check", qcow2)
    assert_refused("qemu-nbd", "-r", "-f", "qcow2", "-k", qcow2 + ".socket", qcow2)
    assert_allowed("qemu-img", "info", "-U", qcow2)
    await storage.close()
    assert_allowed("qemu-img", "check", qcow2)


@needs_qemu
async def test_qemu_reads_but_does_not_write_what_we_read(qcow2: str) -> None:
    storage = await FileStorage.open(qcow2, read_only=True)
    assert_allowed("qemu-img", "info", qcow2)
    assert_allowed("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", qcow2)
    assert_refused("qemu-io", "-f", "qcow2", "-c", "write 0 512", qcow2)
    await storage.close()


@needs_qemu
@pytest.mark.parametrize("format_name", ["raw", "qcow2"])
async def test_we_refuse_what_qemu_writes(image: str, qcow2: str, format_name: str) -> None:
    path = image if format_name == "raw" else qcow2
    with qemu_io_holding(path, "-f", format_name):
        for read_only in (True, False):
            with pytest.raises(ImageError, match=r"is in use by another process \(write lock\)"):
                await FileStorage.open(path, read_only=read_only)
        look = await FileStorage.open(path, read_only=True, force_share=True)
        await look.close()
    storage = await FileStorage.open(path)
    await storage.close()


@needs_qemu
async def test_we_share_what_qemu_reads(qcow2: str) -> None:
    with qemu_io_holding(qcow2, "-r", "-f", "qcow2"):
        storage = await FileStorage.open(qcow2, read_only=True)
        await storage.close()
        with pytest.raises(ImageError, match=r"is in use by another process \(write lock\)"):
            await FileStorage.open(qcow2)
