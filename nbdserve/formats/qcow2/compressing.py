"""Writing compressed clusters: many are compressed at once, on the worker threads, and packed byte by byte."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Final

import zstandard

from nbdserve.errors import RequestError
from nbdserve.formats.deflate import deflate
from nbdserve.formats.new_cluster import write_new
from nbdserve.formats.qcow2.layout import COMPRESSION_ZSTD, compressed_entry
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.pool import worker_pool
from nbdserve.units import align_up

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.driver import Qcow2Driver

_ZSTD_LEVEL: Final = 1
"""Two thirds of the time of level 3, which is QEMU's, for 5 % more space (programs and libraries)."""
_BATCH: Final = 16
"""Clusters compressed in one job of a worker thread."""

_threads: Final = threading.local()


def compress(cluster: ReadBuffer, compression_type: int) -> bytes | None:
    """The stored form of a cluster; None where it is not smaller."""
    if compression_type != COMPRESSION_ZSTD:
        return deflate(cluster)
    compressor = getattr(_threads, "zstd", None)
    if compressor is None:
        compressor = _threads.zstd = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    stored: bytes = compressor.compress(cluster)
    return stored if len(stored) < len(cluster) else None


def _compress_all(data: memoryview, cluster_size: int, compression_type: int) -> list[bytes | None]:
    units = [data[start : start + cluster_size] for start in range(0, len(data), cluster_size)]
    return [compress(unit, compression_type) for unit in units]


async def write_compressed(driver: Qcow2Driver, offset: int, data: memoryview) -> None:
    """``FormatDriver.write_compressed``; the caller holds the clusters exclusively."""
    size = driver.cluster_size
    if driver.read_only or driver.external or driver.data is not driver.storage:
        why = "its data is in a file of its own" if driver.external else "it is encrypted, or open read-only"
        raise RequestError(errno.ENOTSUP, f"{driver.path}: no compressed clusters can be written: {why}")
    if offset % size or (len(data) % size and offset + len(data) != driver.size):
        raise RequestError(errno.EINVAL, f"{driver.path}: compressed clusters are written whole")
    for start in range(0, len(data), _BATCH * size):
        part = data[start : start + _BATCH * size]
        if len(part) % size:
            part = memoryview(bytes(part).ljust(align_up(len(part), size), b"\0"))
        stored = await worker_pool().run(_compress_all, part, size, driver.header.compression_type)
        await _store(driver, offset + start, part, stored)


async def _store(driver: Qcow2Driver, offset: int, data: memoryview, stored: list[bytes | None]) -> None:
    size, bits = driver.cluster_size, driver.header.cluster_bits
    placed: list[tuple[int, int, bytes]] = []
    try:
        for number, unit in enumerate(stored):
            at = offset + number * size
            if unit is None:
                # It does not get smaller.
                await write_new(driver, at, data[number * size : (number + 1) * size])
                continue
            while (host_offset := driver.take_bytes(len(unit))) is None:
                await driver.prepare(at, size)
            placed.append((at, host_offset, unit))
        await driver.data.write_all(_joined(placed))
        while placed:
            at, host_offset, unit = placed[-1]
            while not driver.publish_compressed(at, compressed_entry(host_offset, len(unit), bits)):
                await driver.prepare(at, size)
            placed.pop()
    except BaseException:
        for _, host_offset, unit in placed:
            driver.release_bytes(compressed_entry(host_offset, len(unit), bits))
        raise


def _joined(placed: list[tuple[int, int, bytes]]) -> list[tuple[int, ReadBuffer]]:
    """What lies side by side is written at once."""
    runs: list[tuple[int, list[bytes]]] = []
    end = -1
    for _, host_offset, unit in placed:
        if host_offset == end:
            runs[-1][1].append(unit)
        else:
            runs.append((host_offset, [unit]))
        end = host_offset + len(unit)
    return [(host_offset, b"".join(units)) for host_offset, units in runs]
