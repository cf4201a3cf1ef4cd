"""Copying the dirty bitmaps stored in one image to another, which a conversion does after the data."""

from __future__ import annotations

from collections.abc import Callable

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver


async def copyable_bitmaps(source: FormatDriver, skip_broken: Callable[[str], None] | None) -> list[str]:
    """The names of those that can be copied; ``skip_broken`` is told of each inconsistent one.

    ConfigError, with QEMU's texts, when the image cannot hold any, or without ``skip_broken`` one is inconsistent.
    """
    stored = await source.stored_bitmaps()
    if stored is None:
        raise ConfigError("Source lacks bitmap support")
    names: list[str] = []
    for bitmap in reversed(stored):  # as QEMU, whose messages say which was the first
        if not bitmap.in_use:
            names.insert(0, bitmap.name)
        elif skip_broken is None:
            raise ConfigError(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'\n"
                "Try --skip-broken-bitmaps, or use 'nbdserve image bitmap --remove' to delete it"
            )
        else:
            skip_broken(bitmap.name)
    return names


async def check_bitmap_target(target: FormatDriver, names: list[str]) -> None:
    """ConfigError when ``target`` cannot hold bitmaps, or has one of these names already."""
    stored = await target.stored_bitmaps()
    if stored is None:
        raise ConfigError(f"Format driver '{target.name}' does not support bitmaps")
    taken = {bitmap.name for bitmap in stored}
    for name in reversed(names):
        if name in taken:
            raise ConfigError(f"Failed to create bitmap {name}: Bitmap already exists: {name}")


async def copy_bitmaps(source: FormatDriver, target: FormatDriver, names: list[str]) -> None:
    """Store these bitmaps of ``source`` in ``target``, one after the other. ConfigError for those that do not fit."""
    for name in names:
        bitmap = await source.stored_bitmap(name)
        assert bitmap is not None
        copy = DirtyBitmap(name, target.size, bitmap.granularity)
        try:
            await target.check_new_bitmap(copy)
        except ConfigError as error:
            raise ConfigError(f"Failed to create bitmap {name}: {error}") from None
        try:
            copy.merge(bitmap)
        except ConfigError as error:
            raise ConfigError(f"Failed to populate bitmap {name}: {error}") from None
        copy.disabled = bitmap.disabled
        await target.store_bitmaps({name: copy})
