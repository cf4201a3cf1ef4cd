"""The two places of a VDI image's map, of which the header names one.

QEMU takes the number of allocated blocks from the header: its next block goes there, and its check wants just as many
map entries that refer to a block. Count and entries are in different sectors, so whichever is written first, a crash in
between leaves an image that its check calls corrupt (the entries first: whose next block would be put over data). But
the header also has the offset of the map, and the number of its entries. So a commit brings the place that the header
does *not* name up to date, and then one sector changes offset, number and count at once.

A block that was handed out and has no entry (it is being written, or the write failed) lies before others that have
one. The count is behind those, so it needs an entry as well: a *placeholder* behind the entries of the disk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from nbdserve.formats.ordered_commit import Piece
from nbdserve.formats.vdi.layout import FREE, Header
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import SECTOR_SIZE, align_down, align_up

_WORD = 4
_SECTOR_WORDS = SECTOR_SIZE // _WORD


def placeholder_words(disk_blocks: int, blocks: Collection[int]) -> tuple[bytes, int]:
    """What is written behind the entries of the disk, up to the end of a sector, and how many entries that makes.

    Placeholders begin with a sector of their own; the entries before them are free.
    """
    first = align_up(disk_blocks, _SECTOR_WORDS)
    words = np.full(align_up(first + len(blocks), _SECTOR_WORDS) - disk_blocks, FREE, "<u4")
    words[first - disk_blocks : first - disk_blocks + len(blocks)] = list(blocks)
    return words.tobytes(), first + len(blocks)


@dataclass(slots=True)
class TwoMaps:
    """Which place is which, and what the other one lacks."""

    active: int
    """Host offset of the map that the header names."""
    other: int
    """Host offset of the place that is written next."""
    disk_blocks: int
    most: int
    """Placeholders there is room for behind either."""
    synced: bool = False
    """The other place was made a copy."""
    uncertain: bool = False
    """Writing the header failed: it may name either."""
    _stale: dict[int, ReadBuffer] = field(default_factory=dict)
    """Sectors of the map (by number) that the other place does not have."""

    @classmethod
    def of(cls, header: Header) -> Self | None:
        """None if there is no room for a second map between the header and the data."""
        length = align_up(header.disk_blocks * _WORD, SECTOR_SIZE)
        need, low, active = length + SECTOR_SIZE, header.end, header.map_offset
        middle = low + align_down(max(0, header.data_offset - low) // 2, SECTOR_SIZE)
        for other in (low, middle):
            first, second = sorted((active, other))
            room = min(second - first, header.data_offset - second)
            # what the map has now may be longer: entries that are not the disk's
            if room >= need and (other < active or other >= active + header.blocks * _WORD):
                return cls(active, other, header.disk_blocks, (room - length) // _WORD)
        return None

    def note(self, pieces: Sequence[Piece]) -> None:
        """These were written, offsets counted from the beginning of the map, to the active place alone."""
        for at, data in pieces:
            view = memoryview(data).cast("B")
            for start in range(0, len(view), SECTOR_SIZE):
                self._stale[(at + start) // SECTOR_SIZE] = view[start : start + SECTOR_SIZE]

    def missing(self, pieces: Sequence[Piece]) -> list[Piece]:
        """What has to be written to the other place besides ``pieces``, offsets in the file."""
        written: set[int] = set()
        for at, data in pieces:
            written.update(range(at // SECTOR_SIZE, (at + memoryview(data).nbytes - 1) // SECTOR_SIZE + 1))
        return [(self.other + at * SECTOR_SIZE, data) for at, data in self._stale.items() if at not in written]

    def placeholders(self, blocks: Collection[int]) -> tuple[list[Piece], int]:
        """What makes entries of ``blocks`` at the other place, and the number of entries it then has.

        None are made when there are more than there is room for: to QEMU's check the count is then too high.
        """
        if not blocks or len(blocks) > self.most:
            return [], self.disk_blocks
        words, count = placeholder_words(self.disk_blocks, blocks)
        return [(self.other + self.disk_blocks * _WORD, words)], count

    def switched(self, pieces: Sequence[Piece]) -> None:
        """The header names the other place now, and only that has ``pieces``."""
        self.active, self.other = self.other, self.active
        self.uncertain = False
        self._stale.clear()
        self.note(pieces)
