"""Writing compressed clusters: many are compressed at once, on a worker thread, and packed byte by byte."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from nbdserve.errors import RequestError
from nbdserve.extents import DATA
from nbdserve.formats.deflate import deflate_all
from nbdserve.formats.new_cluster import write_new
from nbdserve.formats.qcow.layout import CRYPT_NONE
from nbdserve.formats.two_level.entries import FLAG
from nbdserve.storage.pool import worker_pool
from nbdserve.units import MIB, align_up, div_ceil

if TYPE_CHECKING:
    from nbdserve.formats.qcow.driver import QcowDriver

_BATCH: Final = MIB
"""Guest bytes compressed in one job, which share host clusters: half of one is left over, on the average."""


async def write_compressed(driver: QcowDriver, offset: int, data: memoryview) -> None:
    """``FormatDriver.write_compressed``; the caller holds the clusters exclusively."""
    size = driver.cluster_size
    if driver.header.crypt_method != CRYPT_NONE:
        raise RequestError(errno.ENOTSUP, f"{driver.path}: no compressed clusters can be written: it is encrypted")
    if offset % size or (len(data) % size and offset + len(data) != driver.size):
        raise RequestError(errno.EINVAL, f"{driver.path}: compressed clusters are written whole")
    for start in range(0, len(data), _BATCH):
        part = data[start : start + _BATCH]
        if len(part) % size:
            part = memoryview(bytes(part).ljust(align_up(len(part), size), b"\0"))
        stored = await worker_pool().run(deflate_all, part, size)
        packed: list[tuple[int, bytes]] = []
        for number, unit in enumerate(stored):
            at = offset + start + number * size
            if unit is None or await _has_data(driver, at):
                await _write_plain(driver, at, part[number * size : (number + 1) * size])
            else:
                packed.append((at, unit))
        if packed:
            await _store(driver, packed)


async def _has_data(driver: QcowDriver, offset: int) -> bool:
    """Whether the cluster is stored plainly already, and is best overwritten there."""
    while (run := driver.lookup(offset, driver.cluster_size)) is None:
        await driver.load(offset)
    return run[0] == DATA


async def _write_plain(driver: QcowDriver, offset: int, data: memoryview) -> None:
    while (run := driver.lookup_writable(offset, len(data))) is None:
        await driver.prepare(offset, len(data))
    if run[0] == DATA:
        await driver.data.write(run[2], data)
        return
    await write_new(driver, offset, data)


async def _store(driver: QcowDriver, packed: list[tuple[int, bytes]]) -> None:
    """Put the stored forms one behind the other into new space, and then point the entries at them."""
    total = sum(len(unit) for _, unit in packed)
    count = div_ceil(total, driver.cluster_size)
    while (host_offset := driver.take_clusters(packed[0][0], count)) is None:
        await driver.prepare(packed[0][0], count * driver.cluster_size)
    try:
        await driver.data.write(host_offset, b"".join(unit for _, unit in packed))
    except BaseException:
        driver.give_clusters(host_offset, count)
        raise
    length_shift = 63 - driver.geometry.cluster_bits
    for offset, unit in packed:
        entry = FLAG | len(unit) << length_shift | host_offset
        while not driver.publish_compressed(offset, entry):
            await driver.prepare(offset, driver.cluster_size)
        host_offset += len(unit)
