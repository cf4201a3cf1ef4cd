"""A fixed number of bits, most of them alike: what a dirty bitmap is made of.

Bit ``i`` is bit ``i % 8``, from the lowest, of byte ``i // 8``: as stored in qcow2. A single bit is one operation on a
bytearray; everything about ranges is done on 64-bit words, so that time goes with the bytes of the array
(16 TiB at 64 KiB: 32 MiB) and with what is found, not with the number of bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdserve.extents import Int64Array

_WORD: Final = np.dtype("<u8")
_FULL_WORD: Final = np.uint64((1 << 64) - 1)
_CHUNK_WORDS: Final = 1 << 15
"""Words looked at in one step: 256 KiB."""
_CHUNK_BITS: Final = 1 << 23
"""Bits unpacked, to a byte each, in one step of a merge."""


ALL_CLEAR: Final = 0
ALL_SET: Final = 1
MIXED: Final = 2


class Bits:
    """``size`` bits, clear at first. Ranges are half-open; the caller keeps them inside."""

    __slots__ = ("_octets", "_words", "octets", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.octets = bytearray(-(-size // 64) * 8)
        """The bits, and behind them clear ones up to whole words."""
        self._octets = np.frombuffer(self.octets, np.uint8)
        self._words = np.frombuffer(self.octets, _WORD)

    def copy(self) -> Bits:
        """The same bits, independent of these."""
        copied = Bits(self.size)
        copied._words[:] = self._words
        return copied

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bits) and self.size == other.size and self.octets == other.octets

    __hash__ = None  # type: ignore[assignment]

    # --- changing ----------------------------------------------------------------------------------------------------

    def set(self, first: int, end: int) -> None:
        """Set the bits of ``[first, end)``."""
        self._fill(first, end, 0xFF)

    def clear(self, first: int, end: int) -> None:
        """Clear the bits of ``[first, end)``."""
        self._fill(first, end, 0)

    def _fill(self, first: int, end: int, value: int) -> None:
        if first >= end:
            return
        octets, head, tail = self.octets, first >> 3, end - 1 >> 3
        head_mask, tail_mask = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (end - 1 & 7))
        if head == tail:
            head_mask &= tail_mask
        octets[head] = octets[head] & ~head_mask | value & head_mask
        if head != tail:
            self._octets[head + 1 : tail] = value
            octets[tail] = octets[tail] & ~tail_mask | value & tail_mask

    def merge(self, other: Bits) -> None:
        """Set what is set in ``other``, which has as many bits."""
        np.bitwise_or(self._words, other._words, out=self._words)

    def merge_finer(self, other: Bits, factor: int) -> None:
        """Set every bit of whose ``factor`` bits in ``other`` one is set. ``factor`` is a power of two."""
        octets = max(1, _CHUNK_BITS // (8 * factor))
        for at in range(0, len(self._octets), octets):
            part = other._octets[at * factor : (at + octets) * factor]
            if part.any():
                units = part != 0 if factor >= 8 else np.unpackbits(part, bitorder="little")
                group = factor // 8 if factor >= 8 else factor
                units = np.pad(units, (0, -len(units) % (8 * group))).reshape(-1, group)
                merged = np.packbits(units.any(axis=1), bitorder="little")
                room = self._octets[at : at + len(merged)]
                room |= merged[: len(room)]

    def merge_coarser(self, other: Bits, factor: int) -> None:
        """Set the ``factor`` bits of every bit that is set in ``other``. ``factor`` is a power of two."""
        octets = max(1, _CHUNK_BITS // (8 * factor))
        for at in range(0, len(other._octets), octets):
            part = other._octets[at : at + octets]
            if part.any():
                if factor >= 8:
                    filled = np.repeat(np.unpackbits(part, bitorder="little") * np.uint8(0xFF), factor // 8)
                else:
                    filled = _SPREAD[factor][part].ravel()
                room = self._octets[at * factor : (at + octets) * factor]
                room |= filled[: len(room)]
        self._clear_padding()

    def load(self, at_octet: int, data: bytes | bytearray | memoryview) -> None:
        """Take the bits from ``at_octet`` on as stored in ``data``; what lies behind the last bit is ignored."""
        room = self._octets[at_octet : at_octet + len(data)]
        room[:] = np.frombuffer(data, np.uint8)[: len(room)]
        self._clear_padding()

    def _clear_padding(self) -> None:
        self.clear(self.size, len(self.octets) * 8)

    # --- asking ------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> bool:
        return bool(self.octets[index >> 3] >> (index & 7) & 1)

    def count(self, first: int = 0, end: int | None = None) -> int:
        """How many bits of ``[first, end)`` are set."""
        end = self.size if end is None else end
        if first >= end:
            return 0
        head, tail = first >> 3, end + 7 >> 3
        total = 0
        with memoryview(self.octets) as view:
            for at in range(head, tail, _CHUNK_WORDS * 8):
                part = int.from_bytes(view[at : min(at + _CHUNK_WORDS * 8, tail)], "little")
                if part:
                    if at == head:
                        part = part >> (first & 7) << (first & 7)
                    if at + _CHUNK_WORDS * 8 >= tail:
                        part &= (1 << end - at * 8) - 1
                    total += part.bit_count()
        return total

    def uniform(self, unit: int) -> npt.NDArray[np.uint8]:
        """For every ``unit`` octets, a multiple of 8 (the last ones may be fewer): ALL_CLEAR, ALL_SET or MIXED."""
        whole = len(self.octets) // unit
        rows = self._words[: whole * unit // 8].reshape(whole, unit // 8)
        found = np.full(-(-len(self.octets) // unit), MIXED, np.uint8)
        found[:whole][~rows.any(axis=1)] = ALL_CLEAR
        found[:whole][np.bitwise_and.reduce(rows, axis=1) == _FULL_WORD] = ALL_SET
        if len(found):
            first = (len(found) - 1) * unit * 8
            found[-1] = {0: ALL_CLEAR, self.size - first: ALL_SET}.get(self.count(first), MIXED)
        return found

    def next_set(self, first: int, end: int) -> int | None:
        """The first bit of ``[first, end)`` that is set."""
        return self._next(first, end, True)

    def next_clear(self, first: int, end: int) -> int | None:
        """The first bit of ``[first, end)`` that is clear."""
        return self._next(first, end, False)

    def _next(self, first: int, end: int, wanted: bool) -> int | None:
        if first >= end:
            return None
        if self[first] is wanted:
            return first
        return next((int(found[0]) for found in self.changes(first, end)), None)

    def changes(self, first: int, end: int) -> Iterator[Int64Array]:
        """The positions inside ``[first, end)`` where a bit differs from the one before, ascending, in pieces."""
        stop = end + 63 >> 6
        for at in range(first >> 6, stop, _CHUNK_WORDS):
            words = self._words[at : min(at + _CHUNK_WORDS, stop)]
            edges = words ^ words << np.uint64(1)
            edges[1:] ^= words[:-1] >> np.uint64(63)
            if at:
                edges[0] ^= self._words[at - 1] >> np.uint64(63)
            with_edges = np.flatnonzero(edges)
            if not len(with_edges):
                continue
            rows, columns = np.nonzero(_unpacked(edges[with_edges]))
            found: Int64Array = (at + with_edges[rows].astype(np.int64) << 6) + columns
            found = found[(found > first) & (found < end)]
            if len(found):
                yield found

    def runs(self, first: int, end: int, most: int) -> tuple[Int64Array, npt.NDArray[np.bool_], int]:
        """The runs of equal bits from ``first``: where each begins, whether it is set, and the end of the last one.

        At most ``most`` runs, else up to ``end``.
        """
        found = [np.array([first], np.int64)]
        runs = 1
        for positions in self.changes(first, end):
            found.append(positions)
            runs += len(positions)
            if runs > most:
                break
        starts = np.concatenate(found)
        if len(starts) > most:
            starts, end = starts[:most], int(starts[most])
        values = (np.arange(len(starts)) & 1).astype(np.bool_) ^ self[first]
        return starts, values, end


def _unpacked(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """The bits of each word in a row."""
    return np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")


def _spread(factor: int) -> npt.NDArray[np.uint8]:
    """For every octet its bits repeated ``factor`` times, as octets."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little")
    return np.packbits(np.repeat(bits, factor, axis=1), axis=1, bitorder="little")


_SPREAD: Final = {factor: _spread(factor) for factor in (2, 4)}
