"""The parts whose faults the conformance suite and the tests of ``file`` cannot reach."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserve.extents import DATA, ZERO
from nbdserve.storage import blocking
from nbdserve.storage.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from nbdserve.units import MIB

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def file_system_with(*modes: int) -> Callable[[int, int, int, int], None]:
    """A fallocate that knows only ``modes``, and records what was done."""

    def call(fd: int, mode: int, offset: int, length: int) -> None:
        if mode not in modes:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        done.append((mode, offset, length))

    done: list[tuple[int, int, int]] = []
    call.done = done  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize(
    ("modes", "unmap", "expected"),
    [
        ((0, PUNCH, FALLOC_FL_ZERO_RANGE), True, [(0, 199, 1), (PUNCH, 100, 100)]),
        ((0, FALLOC_FL_ZERO_RANGE), True, [(0, 199, 1), (FALLOC_FL_ZERO_RANGE, 100, 100)]),
        ((PUNCH, FALLOC_FL_ZERO_RANGE), True, None),
        ((0, PUNCH, FALLOC_FL_ZERO_RANGE), False, [(FALLOC_FL_ZERO_RANGE, 100, 100)]),
        ((0, PUNCH), False, [(PUNCH, 100, 100), (0, 100, 100)]),
        ((PUNCH,), False, None),
        ((), True, None),
        ((), False, None),
    ],
)
def test_zero_uses_what_the_file_system_has(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    modes: tuple[int, ...],
    unmap: bool,
    expected: list[tuple[int, int, int]] | None,
) -> None:
    fake = file_system_with(*modes)
    monkeypatch.setattr(blocking, "fallocate", fake)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert blocking.try_zero_file(fd, 100, 100, unmap) == (expected is not None)
    if expected is not None:
        assert fake.done == expected  # type: ignore[attr-defined]
    os.close(fd)


@pytest.mark.parametrize(
    ("fast", "zero_out", "expected"), [(True, True, False), (False, True, True), (False, False, False)]
)
def test_zero_on_a_device_without_the_command(
    monkeypatch: pytest.MonkeyPatch, fast: bool, zero_out: bool, expected: bool
) -> None:
    called: list[tuple[int, ...]] = []

    def block_zero_out(*arguments: int) -> None:
        called.append(arguments)
        if not zero_out:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(blocking, "fallocate", file_system_with())
    monkeypatch.setattr(blocking, "block_zero_out", block_zero_out)
    assert blocking.try_zero_device(5, 0, 512, True, fast) == expected
    assert called == ([] if fast else [(5, 0, 512)])


def test_discard_on_a_device_takes_whole_blocks_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, ...]] = []
    monkeypatch.setattr(blocking, "block_discard", lambda *arguments: called.append(arguments))
    blocking.discard_device(5, 100, 2000, 512)
    blocking.discard_device(5, 100, 600, 512)
    assert called == [(5, 512, 1536)]

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(blocking, "block_discard", refuse)
    blocking.discard_device(5, 0, 512, 512)


def test_a_write_of_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(OSError) as caught:
        blocking.write_fully(5, 0, b"abc")
    assert caught.value.errno == errno.EIO


def test_seek_map_with_the_size_of_the_caller(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"a" * 8192, 0)
    found = blocking.seek_map(fd, 0, 20_000, 8192, 10)
    assert (found.kind.tolist(), found.length.tolist()) == ([DATA, ZERO], [8192, 11_808])
    os.close(fd)


@pytest.mark.parametrize("modes", [(0,), ()])
def test_extending_makes_longer_and_never_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modes: tuple[int, ...]
) -> None:
    if not modes:
        monkeypatch.setattr(blocking, "fallocate", file_system_with())
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, b"x" * 5000, 0)
        for size, length in ((4096, 5000), (5000, 5000), (3 << 20, 3 << 20)):
            blocking.extend_file(fd, size)
            assert os.fstat(fd).st_size == length
        assert os.pread(fd, 4 << 20, 0) == b"x" * 5000 + bytes((3 << 20) - 5000)
    finally:
        os.close(fd)


def test_a_full_disk_does_not_extend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blocking, "fallocate", full)
    with (tmp_path / "file").open("w+b") as file, pytest.raises(OSError, match="No space left"):
        blocking.extend_file(file.fileno(), 100)


def test_long_writes_take_turns_and_short_ones_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = blocking.InTurn()
    written: list[tuple[int, bool]] = []

    def watched(fd: int, offset: int, data: bytes) -> None:
        written.append((len(data), turns._turn.locked()))
        if len(data) > 1:
            turns.write_fully(fd, offset, b"s")

    monkeypatch.setattr(blocking, "write_fully", watched)
    turns.write_fully(0, 0, bytes(MIB))
    turns.write_fully(0, 0, b"s")
    assert written == [(MIB, True), (1, True), (1, False)]
