"""Sector bitmaps of a differencing image: a bit for each logical sector, 1 where it is here ([MS-VHDX] 2.4).

Bit 0 of byte 0 is the first sector, so in a little-endian word the sectors follow the powers of two. The bits of a
block never cross the parts in which the bitmap is cached, nor a word.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from nbdserve.extents import Int64Array
from nbdserve.formats.tables import L2Table

PART_BITS: Final = 19
"""log2 of the sectors that a cached part (64 KiB) stands for."""
WORD: Final = 64
ALL: Final = (1 << WORD) - 1


def run_at(table: L2Table, bit: int, limit: int) -> tuple[bool, int]:
    """Whether ``bit`` is set, and how many bits from it on are the same, at most ``limit``."""
    entries = table.entries
    index, shift = bit >> 6, bit & 63
    word = entries[index]
    if shift + limit <= WORD:
        mask = (1 << limit) - 1
        inside = word >> shift & mask
        if inside == mask:
            return True, limit
        if not inside:
            return False, limit
    value = bool(word >> shift & 1)
    flip = ALL if value else 0
    # Bits that differ from the first one, from here on.
    differing = (word ^ flip) >> shift
    count = WORD - shift
    while not differing and count < limit:
        index += 1
        differing = entries[index] ^ flip
        if differing:
            break
        count += WORD
    else:
        if not differing:
            return value, min(count, limit)
        count = 0
    return value, min(limit, count + (differing & -differing).bit_length() - 1)


def set_bits(table: L2Table, first: int, end: int) -> None:
    """Set ``[first, end)``, at least one bit."""
    entries = table.entries
    low, high = first // WORD, (end - 1) // WORD
    head, tail = ALL << first % WORD & ALL, ALL >> (-end % WORD)
    if low == high:
        entries[low] |= head & tail
    else:
        entries[low] |= head
        table.words[low + 1 : high] = ALL
        entries[high] |= tail
    table.touch(low, high + 1)


def clear_words(table: L2Table, first: int, end: int) -> None:
    """Clear ``[first, end)``, whole words."""
    table.words[first // WORD : end // WORD] = 0
    table.touch(first // WORD, end // WORD)


def all_set(table: L2Table, first: int, end: int) -> bool:
    """Whether every bit of ``[first, end)``, whole words, is set."""
    return bool((table.words[first // WORD : end // WORD] == ALL).all())


def runs_of(table: L2Table, first: int, end: int) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """Where the runs of equal bits in ``[first, end)`` begin, counted from ``first``, and the bit of each."""
    low, high = first // WORD, -(-end // WORD)
    stored = table.words[low:high].astype("<u8").view(np.uint8)
    bits = np.unpackbits(stored, bitorder="little")[first - low * WORD : end - low * WORD].astype(np.bool_)
    begins = np.flatnonzero(np.concatenate(([True], bits[1:] != bits[:-1])))
    return begins, bits[begins]
