from __future__ import annotations

import itertools
import random

import pytest

from nbdserve.jobs.zeroes import data_runs, zero_units


def test_units() -> None:
    data = bytearray(64)
    data[9] = 1
    data[47] = 1
    assert zero_units(memoryview(data), 8).tolist() == [True, False, True, True, True, False, True, True]
    assert zero_units(memoryview(data), 16).tolist() == [False, True, False, True]
    assert zero_units(memoryview(data)[:20], 8).tolist() == [True, False]


@pytest.mark.parametrize("seed", range(30))
def test_runs_are_those_of_a_plain_search(seed: int) -> None:
    choose = random.Random(seed)
    unit = choose.choice([8, 16, 64])
    offset, length = choose.randrange(200), choose.randrange(1, 700)
    data = bytearray(length)
    for _ in range(choose.randrange(6)):
        data[choose.randrange(length)] = 1
    bounds = sorted({0, length, *(at - offset for at in range(0, offset + length, unit) if offset < at)})
    expected: list[tuple[bool, int, int]] = []
    for start, end in itertools.pairwise(bounds):
        zero = not any(data[start:end])
        begin = expected.pop()[1] if expected and expected[-1][0] == zero else start
        expected.append((zero, begin, end))
    assert data_runs(memoryview(data), offset, unit, 1) == expected


def test_short_runs_between_data_are_data() -> None:
    data = bytearray(b"x" * 32 + bytes(16) + b"x" * 16 + bytes(64) + b"x" * 16 + bytes(16))
    assert data_runs(memoryview(data), 0, 16, 32) == [
        (False, 0, 64),
        (True, 64, 128),
        (False, 128, 144),
        (True, 144, 160),
    ]
    assert data_runs(memoryview(bytes(16)), 0, 16, 32) == [(True, 0, 16)]
