"""What a word in memory means."""

from __future__ import annotations

import numpy as np

from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdserve.formats.two_level.entries import BAD_ENTRY, FLAG, ZERO_ENTRY, are_data, count_before, kinds_of

WORDS = np.array([0, ZERO_ENTRY, 4096, 48, FLAG - 1, FLAG, FLAG | 48, (1 << 64) - 1], np.uint64)


def test_kinds() -> None:
    assert kinds_of(WORDS).tolist() == [UNALLOCATED, ZERO, DATA, DATA, DATA, COMPRESSED, COMPRESSED, COMPRESSED]


def test_data() -> None:
    assert are_data(WORDS).tolist() == [False, False, True, True, True, False, False, False]
    assert not are_data(np.array([BAD_ENTRY], np.uint64)).any()


def test_what_is_before_the_first() -> None:
    for flags, count in (([False, False, True, False, True], 2), ([True], 0), ([False, False], 2), ([], 0)):
        assert count_before(np.array(flags, np.bool_)) == count
