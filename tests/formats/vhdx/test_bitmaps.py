"""Bits of sector bitmaps, against a list of booleans."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nbdserve.formats.tables import L2Cache, L2Table
from nbdserve.formats.vhdx.bitmaps import all_set, clear_words, run_at, runs_of, set_bits

BITS = 1 << 12


def _table() -> L2Table:
    return L2Cache(BITS // 8, stored="<u8").create(0, 0, np.zeros(BITS // 64, np.uint64))


@pytest.mark.parametrize("seed", range(6))
def test_against_a_list(seed: int) -> None:
    rng = random.Random(seed)
    table, model = _table(), [False] * BITS
    for _ in range(60):
        first = rng.randrange(BITS)
        end = min(BITS, first + rng.choice((1, 2, 63, 64, 65, 128, 1000)))
        if rng.random() < 0.7:
            set_bits(table, first, end)
            model[first:end] = [True] * (end - first)
        else:
            first, end = first // 64 * 64, -(-end // 64) * 64
            clear_words(table, first, end)
            model[first:end] = [False] * (end - first)
        for _ in range(20):
            at = rng.randrange(BITS)
            limit = rng.randrange(1, BITS - at + 1)
            same = next((n for n in range(limit) if model[at + n] != model[at]), limit)
            assert run_at(table, at, limit) == (model[at], same)
        low, high = sorted(rng.sample(range(BITS + 1), 2))
        begins, here = runs_of(table, low, high)
        expected = [low, *(n for n in range(low + 1, high) if model[n] != model[n - 1])]
        assert (begins + low).tolist() == expected
        assert here.tolist() == [model[n] for n in expected]
        low, high = low // 64 * 64, low // 64 * 64 + 64
        if high <= BITS:
            assert all_set(table, low, high) == all(model[low:high])


def test_the_first_sector_is_the_lowest_bit_of_the_first_byte() -> None:
    table = _table()
    set_bits(table, 0, 1)
    set_bits(table, 9, 11)
    assert table.encode()[:3] == b"\x01\x06\x00"


def test_what_was_changed_is_known() -> None:
    table = _table()
    set_bits(table, 0, 1)
    assert table.dirty == {0}
    clear_words(table, BITS - 64, BITS)
    assert table.dirty == {0}
    big = L2Cache(4096, stored="<u8").create(0, 0, np.zeros(512, np.uint64))
    set_bits(big, 512 * 8 * 2, 512 * 8 * 2 + 1)
    assert big.dirty == {2}


def test_a_run_ends_at_the_limit_even_where_the_table_ends() -> None:
    table = _table()
    assert run_at(table, 0, BITS) == (False, BITS)
    set_bits(table, 0, BITS)
    assert run_at(table, 5, BITS - 5) == (True, BITS - 5)
    assert all_set(table, 0, BITS)
