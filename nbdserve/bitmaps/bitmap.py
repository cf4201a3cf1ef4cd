"""A dirty bitmap: which parts of a disk have changed since it was made or cleared.

States and error texts are QEMU's (docs/interop/bitmaps.rst), because tools look for them. Offsets and lengths are
bytes of the disk; one bit stands for ``granularity`` of them, the last one for less where the disk ends inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdserve.bitmaps.bits import Bits
from nbdserve.errors import ConfigError
from nbdserve.extents import Int64Array
from nbdserve.units import GIB, KIB, is_power_of_two

MIN_GRANULARITY: Final = 512
MAX_GRANULARITY: Final = 2 * GIB
DEFAULT_GRANULARITY: Final = 64 * KIB
MAX_NAME: Final = 1023
"""Bytes, as in qcow2."""
MAX_BITS: Final = 1 << 33
"""1 GiB of memory; a disk of 16 TiB at 4 KiB needs half of it."""


class DirtyBitmap:
    """One bitmap. ``name`` is None for one that only its maker knows.

    It may have a **successor**, which records in its place while a backup reads what was dirty at the beginning:
    see ``BitmapSet``.
    """

    __slots__ = (
        "_octets",
        "_shift",
        "bits",
        "busy",
        "disabled",
        "granularity",
        "inconsistent",
        "name",
        "persistent",
        "read_only",
        "size",
        "successor",
    )

    def __init__(self, name: str | None, size: int, granularity: int = DEFAULT_GRANULARITY) -> None:
        """All clean, and recording. ConfigError for a granularity or a name a bitmap cannot have."""
        if not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY or not is_power_of_two(granularity):
            raise ConfigError("Granularity must be power of 2 and at least 512")
        if name is not None:
            if not name:
                raise ConfigError("Bitmap name cannot be empty")
            if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME or "\0" in name:
                raise ConfigError(f"Bitmap name too long: at most {MAX_NAME} bytes, without NUL")
        self.name = name
        self.size = size
        self.granularity = granularity
        self._shift = granularity.bit_length() - 1
        self._use(Bits(self._bits_of(size)))
        self.disabled = False
        """Does not record."""
        self.busy = False
        """In use by a job: nobody else may change it."""
        self.read_only = False
        """Stored in an image that is open read-only."""
        self.persistent = False
        """Stored in the image when that is closed."""
        self.inconsistent = False
        """Its image was not closed cleanly: what it holds means nothing, it can only be removed."""
        self.successor: DirtyBitmap | None = None

    def _bits_of(self, size: int) -> int:
        bits = -(-size // self.granularity)
        if bits > MAX_BITS:
            raise ConfigError(
                f"a bitmap of a disk of {size} bytes needs a granularity of {-(-size // MAX_BITS)} bytes or more"
            )
        return bits

    def _use(self, bits: Bits) -> None:
        self.bits = bits
        self._octets = bits.octets

    @property
    def recording(self) -> bool:
        """Whether changes of the disk are noted, here or in the successor."""
        return not self.disabled or (self.successor is not None and not self.successor.disabled)

    # --- recording ---------------------------------------------------------------------------------------------------

    def set(self, offset: int, length: int) -> None:
        """The range, not empty and inside the disk, is dirty."""
        first = offset >> self._shift
        last = offset + length - 1 >> self._shift
        if first == last:
            self._octets[first >> 3] |= 1 << (first & 7)
        else:
            self.bits.set(first, last + 1)

    def clear_range(self, offset: int, length: int) -> None:
        """The range, whole granules (the last of the disk may be less), is clean."""
        self.bits.clear(offset >> self._shift, -(-(offset + length) >> self._shift))

    def clear(self) -> Bits:
        """Everything is clean; what it held before, for ``restore``."""
        before = self.bits
        self._use(Bits(before.size))
        return before

    def restore(self, bits: Bits) -> None:
        """Hold what ``clear`` or ``snapshot`` gave."""
        self._use(bits)

    def snapshot(self) -> Bits:
        """A copy of what it holds."""
        return self.bits.copy()

    def resize(self, size: int) -> None:
        """The disk has ``size`` bytes now. What is new is dirty; what is cut off is forgotten."""
        before, grown = self.size, Bits(self._bits_of(size))
        kept = (min(self.bits.size, grown.size) + 7) // 8
        grown.load(0, memoryview(self.bits.octets)[:kept])
        self.size = size
        self._use(grown)
        if size > before:
            self.set(before, size - before)

    # --- asking ------------------------------------------------------------------------------------------------------

    def is_dirty(self, offset: int) -> bool:
        """Whether the granule at ``offset`` is."""
        return self.bits[offset >> self._shift]

    def count(self) -> int:
        """Bytes that are dirty, in whole granules (as QEMU counts: the last one is counted whole)."""
        return self.bits.count() << self._shift

    def next_dirty(self, offset: int, end: int | None = None) -> int | None:
        """The first dirty byte of ``[offset, end)``; ``end`` is the end of the disk by default."""
        return self._next(self.bits.next_set, offset, end)

    def next_clean(self, offset: int, end: int | None = None) -> int | None:
        """The first clean byte of ``[offset, end)``."""
        return self._next(self.bits.next_clear, offset, end)

    def _next(self, search: Callable[[int, int], int | None], offset: int, end: int | None) -> int | None:
        end = self.size if end is None else min(end, self.size)
        if offset >= end:
            return None
        found = search(offset >> self._shift, (end - 1 >> self._shift) + 1)
        return None if found is None else max(offset, found << self._shift)

    def next_dirty_area(self, offset: int, end: int, longest: int) -> tuple[int, int] | None:
        """``(offset, length)`` of the first dirty area of ``[offset, end)``, at most ``longest`` bytes of it."""
        start = self.next_dirty(offset, end)
        if start is None:
            return None
        end = min(end, self.size, start + longest)
        stop = self.next_clean(start, end)
        return start, (end if stop is None else stop) - start

    def runs(self, start: int, end: int, most: int) -> tuple[Int64Array, npt.NDArray[np.bool_], int]:
        """The dirty and clean runs of ``[start, end)``: where each begins, whether it is dirty, where the last ends.

        At most ``most`` of them; the range is not empty and inside the disk.
        """
        first, last = start >> self._shift, (end - 1 >> self._shift) + 1
        starts, dirty, stop = self.bits.runs(first, last, most)
        starts <<= self._shift
        starts[0] = start
        return starts, dirty, min(end, stop << self._shift)

    # --- states ------------------------------------------------------------------------------------------------------

    def check_usable(self, *, reading: bool = False) -> None:
        """ConfigError when it cannot be changed now, or not even be read from (``reading``)."""
        if self.busy:
            raise ConfigError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")
        if self.read_only and not reading:
            raise ConfigError(f"Bitmap '{self.name}' is readonly and cannot be modified")
        if self.inconsistent:
            raise ConfigError(
                f"Bitmap '{self.name}' is inconsistent and cannot be used\n"
                "Try block-dirty-bitmap-remove to delete this bitmap from disk"
            )

    def merge(self, source: DirtyBitmap) -> None:
        """Whatever is dirty in ``source`` is dirty here; where its granularity is coarser, in its whole granules.

        ConfigError when one of them is not usable, or they are of disks of different sizes.
        """
        self.check_usable()
        source.check_usable(reading=True)
        if source.size != self.size:
            raise ConfigError(
                f"Bitmaps are of different sizes (destination size is {self.size}, source size is {source.size}) "
                "and can't be merged"
            )
        self.absorb(source)

    def absorb(self, source: DirtyBitmap) -> None:
        """``merge`` of a bitmap of the same disk, whatever states they are in."""
        shift = self._shift - source._shift
        if shift == 0:
            self.bits.merge(source.bits)
        elif shift > 0:
            self.bits.merge_finer(source.bits, 1 << shift)
        else:
            self.bits.merge_coarser(source.bits, 1 << -shift)
