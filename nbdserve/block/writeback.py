"""When new data starts on its way to the disk: before a flush asks for it, so that the flush has less to wait for."""

from __future__ import annotations

from typing import Final

from nbdserve.storage.base import Storage
from nbdserve.units import KIB, MIB

_BEGIN_AFTER: Final = MIB
_SMALLEST: Final = 64 * KIB


class Writeback:
    """Of one storage of guest data.

    Space that was just allocated is written once, mostly, and all over the file; what is overwritten may be
    overwritten again before the next flush. So only allocations count.
    """

    __slots__ = ("_allocated", "_data")

    def __init__(self, data: Storage) -> None:
        self._data = data
        self._allocated = 0

    def allocated(self, length: int) -> None:
        """Begin after every 1 MiB, or 16 allocations if they are shorter than 64 KiB."""
        self._allocated += length if length > _SMALLEST else _SMALLEST
        if self._allocated >= _BEGIN_AFTER:
            self._allocated = 0
            self._data.begin_writeback()
