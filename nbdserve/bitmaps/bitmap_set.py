"""The dirty bitmaps of one disk: their names, and who records in whose place."""

from __future__ import annotations

from collections.abc import Iterator

from nbdserve.bitmaps.bitmap import DEFAULT_GRANULARITY, DirtyBitmap
from nbdserve.errors import ConfigError


class BitmapSet:
    """Named and anonymous bitmaps of a disk of ``size`` bytes. Error texts are QEMU's."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._bitmaps: list[DirtyBitmap] = []
        """All of them, successors too."""

    def __iter__(self) -> Iterator[DirtyBitmap]:
        """The named ones, in the order of adding."""
        return (bitmap for bitmap in self._bitmaps if bitmap.name is not None)

    def __bool__(self) -> bool:
        """Whether there is any bitmap, named or not."""
        return bool(self._bitmaps)

    # --- names -------------------------------------------------------------------------------------------------------

    def find(self, name: str) -> DirtyBitmap | None:
        """The bitmap of that name."""
        return next((bitmap for bitmap in self._bitmaps if bitmap.name == name), None)

    def get(self, name: str) -> DirtyBitmap:
        """The bitmap of that name; ConfigError when there is none."""
        bitmap = self.find(name)
        if bitmap is None:
            raise ConfigError(f"Dirty bitmap '{name}' not found")
        return bitmap

    def add(self, name: str | None, granularity: int = DEFAULT_GRANULARITY) -> DirtyBitmap:
        """A new bitmap, clean and recording. ConfigError for a name that is taken, or as ``DirtyBitmap`` raises."""
        if name is not None and self.find(name) is not None:
            raise ConfigError(f"Bitmap already exists: {name}")
        return self.adopt(DirtyBitmap(name, self.size, granularity))

    def adopt(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        """Take in a bitmap that is there already, of this size and a name that is free."""
        self._bitmaps.append(bitmap)
        return bitmap

    def discard(self, bitmap: DirtyBitmap) -> None:
        """Forget the bitmap, whatever state it is in."""
        self._bitmaps = [other for other in self._bitmaps if other is not bitmap]

    # --- recording ---------------------------------------------------------------------------------------------------

    def changed(self, offset: int, length: int) -> None:
        """The range of the disk, inside it, has changed."""
        if length:
            for bitmap in self._bitmaps:
                if not bitmap.disabled:
                    bitmap.set(offset, length)

    def resize(self, size: int) -> None:
        """The disk has ``size`` bytes now: what is new is dirty in every bitmap, disabled or not."""
        self.size = size
        for bitmap in self._bitmaps:
            bitmap.resize(size)

    # --- successors --------------------------------------------------------------------------------------------------

    def create_successor(self, bitmap: DirtyBitmap) -> None:
        """Freeze ``bitmap`` for a job; a successor records from now on if it did, and it is busy.

        ConfigError when it cannot be read.
        """
        bitmap.check_usable(reading=True)
        successor = self.adopt(DirtyBitmap(None, bitmap.size, bitmap.granularity))
        successor.disabled, bitmap.disabled = bitmap.disabled, True
        bitmap.successor, bitmap.busy = successor, True

    def abdicate(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        """The job succeeded: the successor, which is returned, takes the name and place of ``bitmap``."""
        successor = bitmap.successor
        assert successor is not None
        successor.name, successor.persistent = bitmap.name, bitmap.persistent
        bitmap.name, bitmap.persistent, bitmap.busy, bitmap.successor = None, False, False, None
        # the successor keeps the place in the order of names
        self._bitmaps = [successor if other is bitmap else other for other in self._bitmaps if other is not successor]
        return successor

    def reclaim(self, bitmap: DirtyBitmap) -> None:
        """The job failed: what the successor recorded is merged into ``bitmap``, which records again if it did."""
        successor = bitmap.successor
        assert successor is not None
        bitmap.absorb(successor)
        bitmap.disabled, bitmap.busy, bitmap.successor = successor.disabled, False, None
        self.discard(successor)
