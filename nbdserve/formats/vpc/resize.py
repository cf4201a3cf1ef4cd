"""Making a VHD larger. The file ends with a right footer at every moment, of the old size or the new one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.formats.vpc import layout
from nbdserve.formats.vpc.geometry import MAX_GEOMETRY, fitting_geometry, image_size
from nbdserve.formats.vpc.layout import ENTRY_SIZE, FOOTER_SIZE, UNUSED, DynamicHeader, Footer
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


async def resize_dynamic(driver: VpcDriver, larger: Footer) -> None:
    """Give a dynamic image a table for more blocks, then both footers of the new size.

    A table that has to move goes to the end of the file, in front of the footer; the header names it, in one sector,
    when it is stable there. Until the footers change it merely has entries that no block of the disk needs.
    """
    storage, header = driver.storage, driver.header
    needed = div_ceil(larger.size, header.block_size)
    if needed * ENTRY_SIZE > layout.MAX_TABLE_BYTES:
        raise ConfigError(f"size={larger.size}: too many blocks of {header.block_size} bytes")
    if needed > header.max_entries:
        await _enlarge_table(driver, replace(header, max_entries=needed))
    await _clear_last_block(driver)
    await storage.write_stable([(storage.size - FOOTER_SIZE, larger.build())])
    await storage.write_stable([(0, larger.build())])


async def _enlarge_table(driver: VpcDriver, header: DynamicHeader) -> None:
    storage, words = driver.storage, driver.table.words
    old_end = header.table_offset + driver.header.max_entries * ENTRY_SIZE
    room = align_up(old_end, SECTOR_SIZE) - header.table_offset
    if header.max_entries * ENTRY_SIZE <= room:
        # The rest of the table's last sector belongs to nothing else.
        await storage.write_stable(
            [(old_end, b"\xff" * (header.max_entries * ENTRY_SIZE - (old_end - header.table_offset)))]
        )
    else:
        table = np.full(align_up(header.max_entries, SECTOR_SIZE // ENTRY_SIZE), UNUSED, np.uint32)
        table[: len(words)] = words
        place = storage.size - FOOTER_SIZE
        await storage.write_stable([(place + table.nbytes, driver.footer.build())])
        await storage.write_stable([(place, table.astype(">u4").tobytes())])
        header = replace(header, table_offset=place)
    await storage.write_stable([(driver.footer.data_offset, header.build())])


async def _clear_last_block(driver: VpcDriver) -> None:
    """What the last block has behind the end of the disk is not to appear when the disk grows."""
    block = driver.header.block_size
    inside = driver.size % block
    if inside:
        run = driver.lookup(driver.size - SECTOR_SIZE, SECTOR_SIZE)
        if run is not None and run[2] >= 0:
            await driver.storage.zero(run[2] + SECTOR_SIZE, block - inside)
            await driver.storage.flush()
