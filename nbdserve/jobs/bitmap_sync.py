"""What a backup does with a dirty bitmap: take its work from it, and have it hold the changes since, at the end.

The rules and error texts are QEMU's (``blockdev-backup``, ``bitmap-mode``). While the job runs the bitmap is busy, and
its successor records.
"""

from __future__ import annotations

from typing import Final

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.bitmaps.bitmap_set import BitmapSet
from nbdserve.errors import ConfigError

ON_SUCCESS: Final = "on-success"
NEVER: Final = "never"
ALWAYS: Final = "always"
_FROM_BITMAP: Final = ("bitmap", "incremental")
"""Sync modes that copy what is dirty."""


def check_modes(sync: str, bitmap: str | None, mode: str | None) -> str | None:
    """The bitmap mode to use for a backup of mode ``sync`` with the bitmap of this name; None without a bitmap.

    ConfigError for what does not go together.
    """
    if sync in _FROM_BITMAP and bitmap is None:
        raise ConfigError(f"must provide a valid bitmap name for '{sync}' sync mode")
    if sync == "incremental":
        if mode not in (None, ON_SUCCESS):
            raise ConfigError(f"Bitmap sync mode must be '{ON_SUCCESS}' when using sync mode '{sync}'")
        return ON_SUCCESS
    if bitmap is None:
        if mode is not None:
            raise ConfigError("Cannot specify bitmap sync mode without a bitmap")
        return None
    if mode is None:
        raise ConfigError("Bitmap sync mode must be given when providing a bitmap")
    if sync == "none":
        raise ConfigError(f"sync mode '{sync}' does not produce meaningful bitmap outputs")
    if mode == NEVER and sync not in _FROM_BITMAP:
        raise ConfigError(f"Bitmap sync mode '{mode}' has no meaningful effect when combined with sync mode '{sync}'")
    return mode


def find_bitmap(bitmaps: BitmapSet, name: str) -> DirtyBitmap:
    """The bitmap a backup of this disk is to use; ConfigError when there is none."""
    bitmap = bitmaps.find(name)
    if bitmap is None:
        raise ConfigError(f"Bitmap '{name}' could not be found")
    return bitmap


class BitmapSync:
    """The bitmap of one running backup, frozen from here on until ``finish``.

    Make it at the moment that the backup keeps, inside ``drained`` of the node.
    """

    def __init__(self, bitmaps: BitmapSet, bitmap: DirtyBitmap, mode: str) -> None:
        """``mode``: when the bitmap is to hold what has changed since this moment: ``on-success`` of the job,
        ``never`` (then it is as if there had been no job), or ``always``: it holds what could not be copied, too.

        ConfigError when the bitmap cannot be used; nothing has changed then.
        """
        bitmap.check_usable(reading=mode == NEVER)
        self.bitmap = bitmap
        """What was dirty at the moment."""
        self._bitmaps = bitmaps
        self._mode = mode
        bitmaps.create_successor(bitmap)

    def finish(self, succeeded: bool, not_copied: DirtyBitmap | None = None) -> None:
        """The job has ended. ``not_copied``: the part of its work that it has not done."""
        if self._mode == NEVER or (self._mode == ON_SUCCESS and not succeeded):
            self._bitmaps.reclaim(self.bitmap)
            return
        after = self._bitmaps.abdicate(self.bitmap)
        if not succeeded:
            after.absorb(self.bitmap if not_copied is None else not_copied)
