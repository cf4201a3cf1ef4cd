"""Bits against a plain set, with steps so small that every boundary is crossed."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.bitmaps import bits as module
from nbdserve.bitmaps.bits import ALL_CLEAR, ALL_SET, MIXED, Bits

SIZES = st.sampled_from([1, 7, 8, 63, 64, 65, 128, 200, 777])


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_WORDS", 2)
    monkeypatch.setattr(module, "_CHUNK_BITS", 64)


def made(size: int, positions: set[int]) -> Bits:
    bits = Bits(size)
    for position in positions:
        bits.set(position, position + 1)
    return bits


def content(bits: Bits) -> set[int]:
    return {position for position in range(bits.size) if bits[position]}


@st.composite
def some_bits(draw: st.DrawFn) -> tuple[Bits, set[int]]:
    """Bits as runs leave them, and the same as a set."""
    size = draw(SIZES)
    bits, model = Bits(size), set[int]()
    for _ in range(draw(st.integers(0, 6))):
        first = draw(st.integers(0, size))
        end = draw(st.integers(first, min(size, first + draw(st.sampled_from([1, 3, 70, 777])))))
        if draw(st.booleans()):
            bits.set(first, end)
            model |= set(range(first, end))
        else:
            bits.clear(first, end)
            model -= set(range(first, end))
    return bits, model


@given(some_bits(), st.data())
@settings(max_examples=60, deadline=None)
def test_as_a_set(made_bits: tuple[Bits, set[int]], data: st.DataObject) -> None:
    bits, model = made_bits
    assert content(bits) == model
    assert bits.copy() == bits
    first = data.draw(st.integers(0, bits.size))
    end = data.draw(st.integers(first, bits.size))
    inside = [position for position in range(first, end) if position in model]
    outside = [position for position in range(first, end) if position not in model]
    assert bits.count(first, end) == len(inside)
    assert bits.count() == len(model)
    assert bits.next_set(first, end) == (inside[0] if inside else None)
    assert bits.next_clear(first, end) == (outside[0] if outside else None)
    if first == end:
        return
    most = data.draw(st.integers(1, 5))
    starts, values, stop = bits.runs(first, end, most)
    expected = [first, *(at for at in range(first + 1, end) if (at in model) != (at - 1 in model)), end]
    assert [*starts.tolist(), stop] == expected[: most + 1]
    assert values.tolist() == [at in model for at in expected[: len(starts)]]
    assert all(not bits.octets[at >> 3] >> (at & 7) & 1 for at in range(bits.size, len(bits.octets) * 8))


@given(st.sampled_from([2, 4, 8, 16, 128]), st.integers(1, 500), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_merge_of_other_granularities(factor: int, fine_size: int, source: random.Random) -> None:
    coarse_size = -(-fine_size // factor)
    fine = {at for at in range(fine_size) if source.random() < 0.1}
    coarse = {at for at in range(coarse_size) if source.random() < 0.3}
    into_coarse = made(coarse_size, coarse)
    into_coarse.merge_finer(made(fine_size, fine), factor)
    assert content(into_coarse) == coarse | {at // factor for at in fine}
    into_fine = made(fine_size, fine)
    into_fine.merge_coarser(made(coarse_size, coarse), factor)
    assert content(into_fine) == fine | {at for at in range(fine_size) if at // factor in coarse}
    assert into_fine.count() == len(content(into_fine))


def test_merge_of_one_granularity() -> None:
    bits = made(100, {1, 99})
    bits.merge(made(100, {2, 99}))
    assert content(bits) == {1, 2, 99}


def test_stored_bits_are_taken_without_what_lies_behind_the_last() -> None:
    bits = Bits(20)
    bits.load(1, b"\xff\xff\xff\xff")
    assert content(bits) == set(range(8, 20))
    assert bits.count() == 12
    bits.load(0, b"\x02")
    assert content(bits) == {1, *range(8, 20)}


def test_sixteen_tebibytes_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second for all of it, where a walk over 2^28 bits takes half a minute."""
    monkeypatch.undo()
    size = 1 << 28
    bits = Bits(size)
    begin = time.process_time()
    for at in range(0, size, size // 1000):
        bits.set(at, at + 1)
    assert bits.count() == 1001 - (size % (size // 1000) == 0)
    starts, _, end = bits.runs(0, size, 1 << 17)
    assert end == size
    assert len(starts) == 2 * bits.count()
    bits.set(5, size)
    assert bits.next_clear(5, size) is None
    assert time.process_time() - begin < 5


@given(some_bits(), st.sampled_from([8, 16, 64]))
@settings(max_examples=150, deadline=None)
def test_units_that_are_all_alike(drawn: tuple[Bits, set[int]], unit: int) -> None:
    bits, model = drawn
    expected = []
    for first in range(0, bits.size, unit * 8):
        positions = set(range(first, min(first + unit * 8, bits.size)))
        expected.append(ALL_CLEAR if not model & positions else ALL_SET if positions <= model else MIXED)
    assert bits.uniform(unit).tolist() == expected
