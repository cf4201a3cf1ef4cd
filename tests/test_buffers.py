"""Reused memory: what is kept is not handed out again before it is given back."""

from __future__ import annotations

import mmap

import pytest

from nbdserve.buffers import BufferPool, ReusedBuffer, fill_zeroes
from nbdserve.units import GIB, KIB, MIB


def test_detached_bytes_are_not_overwritten() -> None:
    buffer = ReusedBuffer(16)
    buffer.view[:] = b"a" * 16
    kept = buffer.detach()
    assert buffer.data is not kept
    assert buffer.view.obj is buffer.data
    buffer.view[:] = b"b" * 16
    assert kept == b"a" * 16


def test_recycled_buffers_come_back_and_few_are_kept() -> None:
    buffer = ReusedBuffer(16)
    kept = [buffer.detach() for _ in range(9)]
    for data in kept:
        buffer.recycle(data)
    again = [buffer.detach() for _ in range(9)]
    reused = sum(any(data is old for old in kept) for data in again)
    assert reused == 4
    assert len({id(data) for data in again}) == 9


@pytest.mark.parametrize(
    ("length", "size"),
    [
        (0, 64 * KIB),
        (1, 64 * KIB),
        (64 * KIB, 64 * KIB),
        (64 * KIB + 32, 64 * KIB),
        (64 * KIB + BufferPool.HEAD_ROOM + 1, 128 * KIB),
        (3 * MIB, 4 * MIB),
        (4 * MIB + 32, 4 * MIB),
    ],
)
def test_a_power_of_two_and_its_head_fit_without_waste(length: int, size: int) -> None:
    data = BufferPool(MIB).take(length)
    assert isinstance(data, bytearray)
    assert len(data) == size + BufferPool.HEAD_ROOM


def test_a_claimed_length_takes_no_memory_before_it_is_used() -> None:
    data = BufferPool(MIB).take(4 * GIB)
    assert isinstance(data, mmap.mmap)
    assert len(data) == 4 * GIB
    data.close()


def test_a_given_buffer_is_taken_again_once() -> None:
    pool = BufferPool(MIB)
    data = pool.take(100 * KIB)
    pool.give(data)
    assert pool.take(128 * KIB) is data
    assert pool.take(128 * KIB) is not data


def test_the_pool_keeps_no_more_than_its_limit() -> None:
    pool = BufferPool(272 * KIB)
    taken = [pool.take(128 * KIB) for _ in range(5)]
    for data in taken:
        pool.give(data)
    again = [pool.take(128 * KIB) for _ in range(5)]
    assert sum(any(data is old for old in taken) for data in again) == 2


def test_long_buffers_are_not_kept() -> None:
    pool = BufferPool(64 * MIB)
    data = pool.take(5 * MIB)
    pool.give(data)
    assert pool.take(5 * MIB) is not data


def test_long_buffers_are_zeroed_to_the_last_byte() -> None:
    buffer = memoryview(bytearray(b"\xee" * (2 * MIB + 5)))
    fill_zeroes(buffer)
    assert not any(buffer)
