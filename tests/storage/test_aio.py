"""Batches of writes: every piece is written once, or its error is raised."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.storage import aio, blocking, syscalls
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import KIB, MIB


class Plain:
    """The plain write, counted."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def __call__(self, fd: int, offset: int, data: ReadBuffer) -> None:
        self.offsets.append(offset)
        blocking.write_fully(fd, offset, data)


class Batches:
    """The real io_submit, counted; ``take`` of each batch, ``error`` instead of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.take: int | None = None
        self.error: int | None = None
        real = syscalls.io_submit

        def submit(context: object, requests: object, count: int) -> int:
            self.sizes.append(count)
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            return real(context, requests, count if self.take is None else min(count, self.take))  # type: ignore[arg-type]

        monkeypatch.setattr(aio, "io_submit", submit)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    if aio._ring() is None:
        pytest.skip("no AIO here")
    return Batches(monkeypatch)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def _pieces(count: int, length: int, gap: int = 512, seed: int = 1) -> list[tuple[int, ReadBuffer]]:
    rng = random.Random(seed)
    pieces: list[tuple[int, ReadBuffer]] = [(i * (length + gap), rng.randbytes(length)) for i in range(count)]
    rng.shuffle(pieces)
    return pieces


def _all_written(fd: int, pieces: list[tuple[int, ReadBuffer]]) -> None:
    for offset, data in pieces:
        assert os.pread(fd, len(data), offset) == bytes(data)
    assert os.fstat(fd).st_size == max(offset + len(data) for offset, data in pieces)


def test_small_pieces_go_in_batches_of_at_most_128(fd: int, batches: Batches) -> None:
    plain, pieces = Plain(), _pieces(300, 512)
    aio.write_all(plain, fd, pieces)
    _all_written(fd, pieces)
    assert batches.sizes == [128, 128, 44]
    assert not plain.offsets


def test_a_batch_is_of_at_most_one_mebibyte(fd: int, batches: Batches) -> None:
    plain, pieces = Plain(), _pieces(40, 60 * KIB)
    aio.write_all(plain, fd, pieces)
    _all_written(fd, pieces)
    assert sum(batches.sizes) == 40
    assert max(batches.sizes) * 60 * KIB <= MIB
    assert not plain.offsets


def test_large_pieces_among_small_ones_are_written_one_by_one(fd: int, batches: Batches) -> None:
    plain = Plain()
    pieces: list[tuple[int, ReadBuffer]] = [
        (0, b"a" * 100),
        (MIB, memoryview(bytearray(b"b" * (64 * KIB + 1)))),
        (2 * MIB, bytearray(b"c" * 64 * KIB)),
    ]
    aio.write_all(plain, fd, pieces)
    _all_written(fd, pieces)
    assert plain.offsets == [MIB]
    assert batches.sizes == [2]


def test_one_piece_or_none_needs_no_batch(fd: int, batches: Batches) -> None:
    plain = Plain()
    aio.write_all(plain, fd, [])
    aio.write_all(plain, fd, [(7, b"x")])
    assert plain.offsets == [7]
    assert not batches.sizes


def test_without_a_context_every_piece_is_written_plainly(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(_: int) -> None:
        asked.append(1)
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(aio, "io_setup", refuse)
    monkeypatch.setattr(aio, "_local", aio._Local())
    plain, pieces = Plain(), _pieces(20, 700)
    for _ in range(3):
        aio.write_all(plain, fd, pieces)
    _all_written(fd, pieces)
    assert len(plain.offsets) == 60
    assert len(asked) == 1, "a thread that was refused does not ask again"


def test_what_was_not_taken_is_written_plainly(fd: int, batches: Batches) -> None:
    plain, pieces = Plain(), _pieces(10, 700)
    batches.take = 4
    aio.write_all(plain, fd, pieces)
    _all_written(fd, pieces)
    assert plain.offsets == [offset for offset, _ in pieces[4:]]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_a_refused_batch_is_written_plainly(fd: int, batches: Batches, number: int) -> None:
    plain, pieces = Plain(), _pieces(10, 700)
    batches.error = number
    aio.write_all(plain, fd, pieces)
    _all_written(fd, pieces)
    assert len(plain.offsets) == 10


def test_any_other_refusal_is_raised(fd: int, batches: Batches) -> None:
    batches.error = errno.EIO
    with pytest.raises(OSError) as caught:
        aio.write_all(Plain(), fd, _pieces(3, 700))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("result", [300, 0, -errno.EAGAIN])
def test_a_short_or_failed_result_is_written_again_in_full(
    fd: int, batches: Batches, monkeypatch: pytest.MonkeyPatch, result: int
) -> None:
    plain, pieces = Plain(), _pieces(5, 700)
    real = syscalls.io_collect

    def collect(context: object, count: int, events: object) -> None:
        real(context, count, events)  # type: ignore[arg-type]
        ring = aio._ring()
        assert ring is not None
        number, address, _, extra = aio._EVENT.unpack_from(ring.events, 2 * aio._EVENT.size)
        aio._EVENT.pack_into(ring.events, 2 * aio._EVENT.size, number, address, result, extra)
        os.pwrite(fd, b"\xdb" * 700, pieces[number][0])

    monkeypatch.setattr(aio, "io_collect", collect)
    aio.write_all(plain, fd, pieces)
    _all_written(fd, pieces)
    assert len(plain.offsets) == 1


def test_the_error_of_a_piece_is_raised(tmp_path: Path, batches: Batches) -> None:
    (tmp_path / "disk").write_bytes(b"a" * 8192)
    fd = os.open(tmp_path / "disk", os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            aio.write_all(Plain(), fd, _pieces(3, 700))
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(fd)
    assert (tmp_path / "disk").read_bytes() == b"a" * 8192


def test_the_memory_of_the_pieces_is_free_on_return(fd: int, batches: Batches) -> None:
    buffers = [bytearray(bytes([number]) * 600) for number in range(20)]
    aio.write_all(Plain(), fd, [(number * 600, buffer) for number, buffer in enumerate(buffers)])
    for buffer in buffers:
        buffer[:] = b"\xdb" * 600
    assert os.pread(fd, 20 * 600, 0) == b"".join(bytes([number]) * 600 for number in range(20))


def test_the_context_of_a_thread_ends_with_it() -> None:
    def contexts() -> set[int]:
        """Their addresses. Threads that other tests have left may end meanwhile."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        return {int(line.partition("-")[0], 16) for line in maps if "[aio]" in line}

    def work() -> None:
        rings.append(aio._ring() is not None)
        during.update(contexts() - before)

    before, rings, during = contexts(), list[bool](), set[int]()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if not rings[0]:
        pytest.skip("no AIO here")
    assert during
    assert not contexts() & during
