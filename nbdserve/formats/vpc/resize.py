"""Making a VHD larger. The file ends with a right footer at every moment, of the old size or the new one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.formats.vpc import layout
from nbdserve.formats.vpc.bitmaps import BitmapCache
from nbdserve.formats.vpc.geometry import MAX_GEOMETRY, fitting_geometry, image_size
from nbdserve.formats.vpc.image import BAD
from nbdserve.formats.vpc.layout import ENTRY_SIZE, FOOTER_SIZE, UNUSED, DynamicHeader, Footer
from nbdserve.formats.vpc.space import BlockSpace
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil

if TYPE_CHECKING:
    from nbdserve.formats.vpc.driver import VpcDriver


def resized_footer(footer: Footer, size: int) -> Footer:
    """The footer of the same image with ``size`` bytes; ConfigError when it cannot have that size.

    Where the geometry tells the size and has none for this one, the image becomes one whose creator tells it exactly.
    """
    if size % SECTOR_SIZE:
        raise ConfigError(f"size={size}: a VHD has whole sectors of 512 bytes")
    if size < footer.size:
        raise ConfigError(f"size={size}: a VHD cannot be made smaller than it is ({footer.size} bytes)")
    if size == footer.size:
        return footer
    creator, geometry = footer.creator_app, fitting_geometry(size)
    if creator not in layout.EXACT_CREATORS and image_size(size, exact=False)[0] != size:
        creator, geometry = b"qem2", MAX_GEOMETRY
    cylinders, heads, sectors = geometry
    larger = replace(
        footer,
        current_size=size,
        cylinders=cylinders,
        heads=heads,
        sectors_per_track=sectors,
        creator_app=creator,
    )
    image_size(size, exact=True)
    return larger


async def resize_fixed(storage: Storage, footer: Footer, larger: Footer) -> None:
    """Move the footer of a fixed image, then let it tell the new size.

    Each step is stable before the next. First the old footer stands at the new end; then zeroes where it stood, which
    is outside the disk still; then the new one.
    """
    old, new = footer.size, larger.size
    await storage.write_stable([(new, footer.build())])
    await storage.zero(old, min(new - old, storage.size - FOOTER_SIZE - old))
    await storage.flush()
    await storage.write_stable([(new, larger.build())])


async def resize_blocks(driver: VpcDriver, space: BlockSpace, larger: Footer, parent_size: int = 0) -> None:
    """Give an image a table for more blocks, then the new size to both footers. Nothing else is under way.

    What the parent of a differencing image, of ``parent_size`` bytes, has behind the old end does not appear: there are
    zeroes over it before the footers change. Until they do, all of this is outside the disk.
    """
    storage, header, old_size = driver.storage, driver.header, driver.size
    needed = div_ceil(larger.size, header.block_size)
    if needed * ENTRY_SIZE > layout.MAX_TABLE_BYTES:
        raise ConfigError(f"size={larger.size}: too many blocks of {header.block_size} bytes")
    await space.tidy()
    if needed > header.max_entries:
        header = await _enlarge_table(driver, space, replace(header, max_entries=needed))
        await space.tidy()
    await _clear_last_block(driver)
    hidden = min(parent_size, larger.size)
    for index in range(old_size // header.block_size, div_ceil(hidden, header.block_size)):
        start = index * header.block_size
        first, last = max(old_size - start, 0), min(hidden - start, header.block_size)
        if first < last:
            await _put_zeroes(storage, header, space, index, first // SECTOR_SIZE, div_ceil(last, SECTOR_SIZE))
    await space.tidy()
    await _barrier_size(storage, larger)
    await storage.write_stable([(space.end, larger.build())])


async def _barrier_size(storage: Storage, larger: Footer) -> None:
    """The copy at the beginning has the new size before the footer has it.

    Crash before the barrier: the old size or the new one for us and for stock tools, who go by the copy. Crash after
    it: whoever goes by the footer sees the old size still, and so cannot write where others do not look; the footer is
    written anew with the next block.
    """
    await storage.write_stable([(0, larger.build())])


async def _enlarge_table(driver: VpcDriver, space: BlockSpace, header: DynamicHeader) -> DynamicHeader:
    """The header that names the table with the entries ``header`` has.

    A table that has to move goes where the footer is, and the footer behind it; the header names it, in one sector,
    when it is stable there.
    """
    storage, words = driver.storage, driver.table.words
    old_bytes = driver.header.max_entries * ENTRY_SIZE
    new_bytes = header.max_entries * ENTRY_SIZE
    if new_bytes <= align_up(old_bytes, SECTOR_SIZE):
        # The rest of the table's last sector belongs to nothing else.
        await storage.write_stable([(header.table_offset + old_bytes, b"\xff" * (new_bytes - old_bytes))])
    else:
        table = np.full(align_up(header.max_entries, SECTOR_SIZE // ENTRY_SIZE), UNUSED, np.uint32)
        table[: len(words)] = words
        place, space.end = space.end, space.end + table.nbytes
        await storage.write_stable([(space.end, driver.footer.build())])
        await storage.write_stable([(place, table.astype(">u4").tobytes())])
        header = replace(header, table_offset=place)
    await storage.write_stable([(driver.footer.data_offset, header.build())])
    return header


async def _clear_last_block(driver: VpcDriver) -> None:
    """What the last block has behind the end of the disk is not to appear when the disk grows."""
    header = driver.header
    index, inside = divmod(driver.size, header.block_size)
    if inside and driver.table.entries[index] < BAD:
        start = driver.table.entries[index] * SECTOR_SIZE + header.bitmap_size
        await driver.storage.zero(start + inside, header.block_size - inside)
        await driver.storage.flush()


async def _put_zeroes(
    storage: Storage, header: DynamicHeader, space: BlockSpace, index: int, first: int, last: int
) -> None:
    """Let the sectors ``[first, last)`` of a block be here, as zeroes: data first, then bits, then the table entry."""
    at = header.table_offset + index * ENTRY_SIZE
    entry = int.from_bytes(await storage.read(at, ENTRY_SIZE), "big")
    if entry == UNUSED:
        (place,) = await space.take(1)
    else:
        place = entry * SECTOR_SIZE
        await storage.zero(place + header.bitmap_size + first * SECTOR_SIZE, (last - first) * SECTOR_SIZE)
        await storage.flush()
    bitmap = BitmapCache(header.bitmap_size).add(index, place, await storage.read(place, header.bitmap_size))
    bitmap.set(first, last - first)
    await storage.write_stable(bitmap.pieces(bitmap.dirty))
    if entry == UNUSED:
        await storage.write_stable([(at, (place // SECTOR_SIZE).to_bytes(ENTRY_SIZE, "big"))])
