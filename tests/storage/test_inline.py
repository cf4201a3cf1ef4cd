"""Buffered writes on the event loop: which are done, which are left to others, and when there is a pause."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.storage import inline
from nbdserve.storage.inline import InlineWrites
from nbdserve.units import KIB

PAGE = 4096
SLOW = 0.003


class Clock:
    """Stands for the monotonic clock; each write takes as long as it is told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cost = 0.0
        self.writes = 0

    def monotonic(self) -> float:
        return self.now

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self.writes += 1
        self.now += self.cost
        return len(data)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(inline, "monotonic", made.monotonic)
    monkeypatch.setattr(os, "pwrite", made.pwrite)
    return made


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    os.pwrite(opened, b"a" * 64 * KIB, 0)
    yield opened
    os.close(opened)


def _paused_for(writes: InlineWrites, clock: Clock) -> float:
    """Seconds until the next write is let through, to a thousandth."""
    clock.cost, begun = 0.0, clock.now
    while not writes.try_write(-1, 0, bytes(PAGE)):
        clock.now += 0.001
    return round(clock.now - begun, 3)


def test_a_slow_write_is_complete_and_the_next_ones_are_left_to_others(clock: Clock) -> None:
    writes = InlineWrites()
    clock.cost = SLOW
    assert writes.try_write(-1, 0, bytes(PAGE))
    assert not writes.try_write(-1, 0, bytes(PAGE))
    assert clock.writes == 1
    assert 0.002 <= _paused_for(writes, clock) <= 0.006


def test_a_write_of_less_than_two_milliseconds_is_no_reason_to_pause(clock: Clock) -> None:
    writes = InlineWrites()
    clock.cost = 0.0019
    assert all(writes.try_write(-1, 0, bytes(PAGE)) for _ in range(10))


def test_the_pause_doubles_while_it_happens_again_and_is_a_minute_at_most(clock: Clock) -> None:
    writes = InlineWrites()
    pauses = []
    for _ in range(16):
        clock.cost = SLOW
        assert writes.try_write(-1, 0, bytes(PAGE))
        pauses.append(_paused_for(writes, clock))
    expected = [min(0.005 * 2**number, 60.0) for number in range(16)]
    assert pauses == pytest.approx(expected, abs=0.005)
    clock.now += 1000
    clock.cost = SLOW
    assert writes.try_write(-1, 0, bytes(PAGE))
    assert _paused_for(writes, clock) == pytest.approx(0.005, abs=0.004), "a long time without: as the first time"


def test_a_page_written_in_part_must_be_in_the_cache(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = InlineWrites()
    asked: list[int] = []

    def cold(_: int, buffers: object, offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        asked.append(offset)
        raise BlockingIOError(errno.EAGAIN, "not cached")

    monkeypatch.setattr(os, "preadv", cold)
    for offset, length in ((1, 10), (0, PAGE - 1), (PAGE - 1, 2), (100, PAGE)):
        assert not writes.try_write(fd, offset, b"b" * length)
    assert len(asked) == 4
    assert os.pread(fd, 3 * PAGE, 0) == b"a" * 3 * PAGE
    assert writes.try_write(fd, PAGE, b"b" * PAGE), "a whole page needs no reading"
    assert len(asked) == 4


def test_both_ends_of_the_range_are_asked_for(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def cached(_: int, buffers: object, offset: int, flags: int) -> int:
        asked.append(offset)
        return 1

    monkeypatch.setattr(os, "preadv", cached)
    assert InlineWrites().try_write(fd, 100, b"b" * 2 * PAGE)
    assert asked == [100, 100 + 2 * PAGE - 1]


def test_two_pages_are_asked_for_at_once(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    cached = 2

    def some(_: int, buffers: tuple[bytearray], offset: int, flags: int) -> int:
        assert len(buffers[0]) == 2
        asked.append(offset)
        return cached

    monkeypatch.setattr(os, "preadv", some)
    for offset, length in ((PAGE + 1, PAGE), (2 * PAGE - 1, PAGE - 1), (PAGE + 5, 2 * PAGE - 5)):
        assert InlineWrites().try_write(fd, offset, b"b" * length)
    assert asked == [2 * PAGE - 1] * 3
    cached = 1
    assert not InlineWrites().try_write(fd, PAGE + 1, b"b" * PAGE)


def test_cached_pages_are_written_at_any_byte(fd: int) -> None:
    os.pread(fd, 64 * KIB, 0)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system has no RWF_NOWAIT")
    assert InlineWrites().try_write(fd, 4000, b"b" * 200)
    assert os.pread(fd, 202, 3999) == b"a" + b"b" * 200 + b"a"


def test_whole_pages_past_the_end_make_the_file_grow_and_parts_of_pages_do_not(fd: int) -> None:
    assert InlineWrites().try_write(fd, 128 * KIB, b"b" * PAGE)
    assert os.fstat(fd).st_size == 128 * KIB + PAGE
    assert not InlineWrites().try_write(fd, 256 * KIB, b"b" * 10)
    assert os.fstat(fd).st_size == 128 * KIB + PAGE


def test_long_writes_closed_files_and_errors_are_left_to_others(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = InlineWrites()
    assert writes.try_write(fd, 0, b"b" * 64 * KIB)
    assert not writes.try_write(fd, 0, b"c" * (68 * KIB))
    assert not writes.try_write(-1, 0, b"c" * PAGE)
    monkeypatch.setattr(os, "pwrite", lambda *_: PAGE - 512)
    assert not writes.try_write(fd, 0, b"c" * PAGE), "a short write is no success"
    assert os.pread(fd, 1, 0) == b"b"
