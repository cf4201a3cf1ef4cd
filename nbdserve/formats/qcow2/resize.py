"""Changing the size of a qcow2 image's disk, in an order in which a crash at any point leaves the old size or the new.

The header's first sector has the size and the place of the L1 table, so one write of it decides. What is past the end
of the disk is not the guest's: it is cleared before the disk grows over it, and after the disk was cut.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.extents import COMPRESSED, DATA
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.bitmap_changes import resized_bitmaps
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.reserve import reserve
from nbdserve.formats.tables import Table
from nbdserve.units import MIB, SECTOR_SIZE, align_down, align_up, div_ceil

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.driver import Qcow2Driver

_STRETCH: Final = 256 * MIB
"""The longest range of the mapping that is changed in one turn of the event loop."""


async def resize_qcow2(driver: Qcow2Driver, size: int) -> None:
    """See ``FormatDriver.resize``. No request is under way."""
    _refuse(driver, size)
    await driver.committer.settle()
    if size == driver.size:
        return
    async with resized_bitmaps(driver, size) as header:
        if size > driver.size:
            await _grow(driver, size, header)
        else:
            await _shrink(driver, size, header)


def _refuse(driver: Qcow2Driver, size: int) -> None:
    """ConfigError for a size that cannot be."""
    driver.check_writable()
    if size % SECTOR_SIZE:
        raise ConfigError(f"{driver.path}: The new size must be a multiple of 512, not {size}")
    if driver.header.version < 3 and driver.snapshots:
        raise ConfigError(f"{driver.path}: Can't resize a v2 image which has snapshots")
    if unsized := [snapshot.id for snapshot in driver.snapshots if snapshot.disk_size is None]:
        raise ConfigError(f"{driver.path}: snapshot {unsized[0]!r} does not say what size its disk has")
    if div_ceil(size, driver.header.l2_coverage) * 8 > layout.MAX_L1_BYTES:
        most = layout.MAX_L1_BYTES // 8 * driver.header.l2_coverage
        raise ConfigError(
            f"{driver.path}: {size} bytes: the L1 table of an image with clusters of {driver.cluster_size} has room "
            f"for {most}"
        )


# --- growing ---------------------------------------------------------------------------------------------------------


async def _grow(driver: Qcow2Driver, size: int, header: Header) -> None:
    """Everything the larger disk needs is stable before the header says so.

    Crash before that: the old disk, and clusters that are counted and not used.
    """
    old_size, old_l1 = driver.size, driver.l1
    await _clear_past_the_end(driver)
    await _grow_data_file(driver, size)
    covered = len(old_l1.words) * driver.header.l2_coverage
    await _map_new(driver, old_size, min(size, covered))
    await driver.committer.settle()
    entries = div_ceil(size, driver.header.l2_coverage)
    if entries > len(old_l1.words):
        await _move_l1(driver, entries)
    try:
        await _map_new(driver, max(old_size, covered), size)
        await driver.committer.settle()
    except BaseException:
        # Nothing on disk knows the new table, so nothing may be committed to it.
        if driver.l1 is not old_l1:
            try:
                await drop_mapping(driver, covered)
            finally:
                _put_back(driver, old_l1)
        raise
    await _set_header(driver, size, header)
    if driver.l1 is not old_l1:
        _retire(driver, old_l1)
        await driver.committer.settle()


async def _move_l1(driver: Qcow2Driver, entries: int) -> None:
    """A longer L1 table in a new place. On disk the old one stays in force until the header names this."""
    clusters = div_ceil(entries * 8, driver.cluster_size)
    first = await driver.allocator.take_run(clusters)
    driver.allocator.metadata.update(range(first, first + clusters))
    words = np.zeros(entries, np.uint64)
    words[: len(driver.l1.words)] = driver.l1.words
    table = Table(first * driver.cluster_size, words)
    table.touch(0, entries)
    driver.put_l1(table)


def _put_back(driver: Qcow2Driver, table: Table) -> None:
    """Back to the L1 table on disk; the clusters of the other one are free."""
    other = driver.l1
    driver.put_l1(table)
    _retire(driver, other)


def _retire(driver: Qcow2Driver, table: Table) -> None:
    clusters = div_ceil(len(table.words) * 8, driver.cluster_size)
    driver.allocator.retire_metadata((table.host_offset // driver.cluster_size, clusters))


async def _map_new(driver: Qcow2Driver, start: int, end: int) -> None:
    """Make whole units of ``[start, end)``, past the end of the disk, what they have to be when the disk has them.

    A data file that is the disk by itself maps everything. Elsewhere what a longer layer below has must not appear;
    the rest of a unit that the disk ended in is the engine's, for it has to read the layer below.
    """
    start = align_up(start, driver.granularity)
    if driver.header.data_file_raw:
        await _allocate(driver, align_up(start, driver.cluster_size), end, "metadata")
    elif driver.has_backing:
        end = min(end, align_up(driver.backing_end, driver.cluster_size))
        if driver.header.version < 3:
            await _allocate(driver, start, end, "metadata")
            return
        while start < end:
            length = min(_STRETCH, align_up(end, driver.cluster_size) - start)
            done = driver.zero(start, length, unmap=True)
            if done is None:
                await driver.prepare(align_down(start, driver.cluster_size), driver.cluster_size)
            else:
                start += done


async def _grow_data_file(driver: Qcow2Driver, size: int) -> None:
    """The external data file is as long as the disk; one that is the disk by itself has zeroes at its new end.

    The commit that comes before the header makes it stable, with the guest data.
    """
    if not driver.external:
        return
    file = driver.data_file
    if driver.header.data_file_raw and file.size > driver.size:
        await file.zero(driver.size, min(file.size, size) - driver.size)
    if file.size < size:
        await file.truncate(size)


async def _set_header(driver: Qcow2Driver, size: int, header: Header) -> None:
    """Size and place of the L1 table, and the bitmaps of ``header``, in one write of one sector."""
    offset, entries = driver.l1.host_offset, len(driver.l1.words)
    resized = replace(header, size=size, l1_offset=offset, l1_entries=entries)
    if header is driver.header:
        fields = struct.pack(">QIIQ", size, driver.header.crypt_method, entries, offset)
        await driver.patch_header(layout.SIZE_AT, fields)
        driver.header = resized
    else:
        await driver.replace_header(resized)
    driver.size = size


# --- shrinking -------------------------------------------------------------------------------------------------------


async def _shrink(driver: Qcow2Driver, size: int, header: Header) -> None:
    """The header says so first: until then the disk has all its content.

    Crash after that: what is past the end is still mapped, until the size changes again.
    """
    await _set_header(driver, size, header)
    punch, driver.allocator.punch = driver.allocator.punch, True
    try:
        await _clear_past_the_end(driver)
        await driver.committer.settle()
    finally:
        driver.allocator.punch = punch
    if driver.external and driver.data_file.grows_zeroed and driver.data_file.size > size:
        await driver.cut_data_file(size)
    end = await driver.allocator.end() * driver.cluster_size
    if driver.storage.grows_zeroed and driver.storage.size > end:
        await driver.storage.truncate(end)
        driver.allocator.virgin = end // driver.cluster_size
        await driver.storage.flush()


async def _clear_past_the_end(driver: Qcow2Driver) -> None:
    """Nothing is mapped past the end of the disk, and the rest of the cluster it ends in holds zeroes."""
    await _zero_cluster_end(driver, driver.size, align_up(driver.size, driver.cluster_size))
    await drop_mapping(driver, align_up(driver.size, driver.granularity))


async def _zero_cluster_end(driver: Qcow2Driver, start: int, end: int) -> None:
    """Zero ``[start, end)`` of one cluster, as far as this layer has something there."""
    while start < end:
        run = driver.lookup_writable(start, end - start)
        found = driver.lookup(start, end - start)
        if run is None or found is None:
            await driver.load(start)
        elif run[0] == DATA:
            await driver.data.zero(run[2], run[1], unmap=False)
            start += run[1]
        elif found[0] in (DATA, COMPRESSED):
            await _copy_unit(driver, start)
        else:
            start += found[1]


async def _copy_unit(driver: Qcow2Driver, start: int) -> None:
    """Give a compressed or shared unit space of its own, with zeroes from ``start`` on."""
    unit = align_down(start, driver.granularity)
    while (allocation := driver.allocate(unit, driver.granularity)) is None:
        await driver.prepare(unit, driver.granularity)
    try:
        content = await _own_content(driver, unit, start - unit)
        await driver.data.write(allocation.host_offset, bytes(content).ljust(allocation.length, b"\0"))
    except BaseException:
        driver.abandon(allocation)
        raise
    driver.publish(allocation)


async def _own_content(driver: Qcow2Driver, offset: int, length: int) -> bytes | bytearray:
    while (run := driver.lookup(offset, length)) is None:
        await driver.load(offset)
    if run[0] == COMPRESSED:
        begin, content = await driver.read_compressed(offset)
        return content[offset - begin : offset - begin + length]
    return await driver.data.read(run[2], length)


async def drop_mapping(driver: Qcow2Driver, start: int) -> None:
    """Unmap everything from ``start``, a multiple of ``granularity``, on."""
    coverage, clusters = driver.header.l2_coverage, driver.cluster_size
    first = start // coverage
    if start % coverage and first < len(driver.l1.words):
        while not driver.cut_table(start):
            await driver.prepare(align_down(start, clusters), clusters)
    first = div_ceil(start, coverage)
    for index in (np.flatnonzero(driver.l1.words[first:]) + first).tolist():
        while driver.cache.find(index) is None or driver.is_crowded():
            await driver.prepare(index * coverage, clusters)
        driver.drop_table(index)


# --- preallocation ---------------------------------------------------------------------------------------------------


async def preallocate_qcow2(driver: Qcow2Driver, start: int, end: int, mode: str) -> None:
    """See ``FormatDriver.preallocate``."""
    driver.check_writable()
    await _allocate(driver, align_up(start, driver.cluster_size), end, mode)
    await driver.committer.settle()


async def _allocate(driver: Qcow2Driver, start: int, end: int, mode: str) -> None:
    """Map ``[start, end)``, whole clusters of which none is mapped to data, to zeroes in the file."""
    end = align_up(end, driver.cluster_size)
    while start < end:
        allocation = driver.allocate(start, min(_STRETCH, end - start))
        if allocation is None:
            await driver.prepare(start, driver.cluster_size)
            continue
        try:
            if not allocation.zeroed and not driver.header.data_file_raw:
                await driver.data.zero(allocation.host_offset, allocation.length)
            await reserve(driver.data, allocation.host_offset, allocation.length, mode)
            end_of_file = allocation.host_offset + align_up(allocation.length, driver.cluster_size)
            if not driver.external and driver.storage.size < end_of_file:
                await driver.storage.truncate(end_of_file)
        except BaseException:
            driver.abandon(allocation)
            raise
        driver.publish(allocation)
        start += allocation.length
