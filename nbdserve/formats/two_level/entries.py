"""What a word of an L2 table means once it is in memory, the same for every two-level format. Pure."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdserve.formats.tables import Words

ZERO_ENTRY: Final = 1
"""The cluster reads as zeroes (QED). 0: this layer does not decide."""
BAD_ENTRY: Final = 2
"""Stands for an entry that is invalid. No format has a cluster at host offset 2."""
FLAG: Final = 1 << 63
"""The cluster is compressed (qcow). What is above BAD_ENTRY and below this is the host offset of a data cluster."""

Flags: TypeAlias = npt.NDArray[np.bool_]
Kinds: TypeAlias = npt.NDArray[np.uint8]


def kinds_of(words: Words) -> Kinds:
    """The kind of each entry; BAD_ENTRY counts as ZERO."""
    kinds = np.full(len(words), DATA, np.uint8)
    kinds[words <= BAD_ENTRY] = ZERO
    kinds[words == 0] = UNALLOCATED
    kinds[words >= np.uint64(FLAG)] = COMPRESSED
    return kinds


def are_data(words: Words) -> Flags:
    """Which entries are host offsets of data clusters."""
    data: Flags = (words > BAD_ENTRY) & (words < np.uint64(FLAG))
    return data


def count_before(flags: Flags) -> int:
    """How many are not set before the first that is."""
    return int(flags.argmax()) if flags.any() else len(flags)
