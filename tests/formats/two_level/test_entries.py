"""What a word in memory means."""

from __future__ import annotations

import numpy as np

from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdserve.formats.two_level.entries import BAD_ENTRY, FLAG, ZERO_ENTRY, are_data, kinds_of

WORDS = np.array([0, ZERO_ENTRY, 4096, 48, FLAG - 1, FLAG, FLAG | 48, (1 << 64) - 1], np.uint64)


def test_kinds() -> None:
    assert kinds_of(WORDS).tolist() == [UNALLOCATED, ZERO, DATA, DATA, DATA, COMPRESSED, COMPRESSED, COMPRESSED]


def test_data() -> None:
    assert are_data(WORDS).tolist() == [False, False, True, True, True, False, False, False]
    assert not are_data(np.array([BAD_ENTRY], np.uint64)).any()
