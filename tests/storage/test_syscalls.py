from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nbdserve.storage import syscalls
from nbdserve.storage.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    RESOLVE_BENEATH,
    TMPFS_MAGIC,
    direct_io_alignment,
    fallocate,
    file_system_type,
    logical_block_size,
    openat2,
)
from tests.conformance.test_storage import loop_device, tmpfs_directory


def test_fallocate_reaches_beyond_4_gib(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    fallocate(fd, 0, 5 << 30, 4096)
    assert os.fstat(fd).st_size == (5 << 30) + 4096
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.pwrite(fd, b"a", 5 << 30)
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 5 << 30, 4096)
    assert os.pread(fd, 1, 5 << 30) == b"\0"
    os.close(fd)


def test_errors_carry_the_errno(tmp_path: Path) -> None:
    for call, number in (
        (lambda: fallocate(-1, 0, 0, 1), errno.EBADF),
        (lambda: file_system_type(-1), errno.EBADF),
        (lambda: openat2(-1, "x", os.O_RDONLY, 0), errno.EBADF),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == number


def test_file_system_type() -> None:
    with tmpfs_directory() as directory:
        fd = os.open(directory, os.O_RDONLY)
        assert file_system_type(fd) == TMPFS_MAGIC
        os.close(fd)


def test_direct_io_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    alignment = direct_io_alignment(fd)
    assert alignment >= 512
    assert alignment & (alignment - 1) == 0
    os.close(fd)
    assert direct_io_alignment(-1) == 4096


def test_openat2_is_close_on_exec_and_stays_beneath(tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("x")
    directory = os.open(tmp_path, os.O_PATH)
    try:
        fd = openat2(directory, "inside", os.O_RDONLY, RESOLVE_BENEATH)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip("no openat2 here")
        raise
    assert not os.get_inheritable(fd)
    os.close(fd)
    with pytest.raises(OSError) as caught:
        openat2(directory, "..", os.O_RDONLY, RESOLVE_BENEATH)
    assert caught.value.errno == errno.EXDEV
    os.close(directory)


def test_block_device_calls() -> None:
    with loop_device(1 << 20) as device:
        fd = os.open(device, os.O_RDWR)
        assert logical_block_size(fd) in (512, 4096)
        os.pwrite(fd, b"a" * 8192, 0)
        syscalls.block_zero_out(fd, 0, 4096)
        assert os.pread(fd, 4097, 0) == bytes(4096) + b"a"
        syscalls.block_discard(fd, 4096, 4096)
        os.close(fd)


def test_writeback_begins_on_a_file_and_not_on_a_pipe(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * 4096)
        file.flush()
        syscalls.begin_writeback(file.fileno())
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="Illegal seek"):
        syscalls.begin_writeback(write_end)
    os.close(read_end)
    os.close(write_end)
