"""To and from what stock tools have in place of raw-cow: qcow2 with a backing file and an external data file.

Both describe the same raw file and the same backing file, and map a guest offset to the same offset of the raw file, so
that only metadata is made. From then on one of the two may be written to: the other does not learn of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nbdserve.errors import ConfigError, ImageError, UnsupportedImageError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdserve.formats.qcow2.create import create_qcow2
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.raw_cow.bitmap import Bitmap
from nbdserve.formats.raw_cow.create import plan_header, write_image
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.formats.raw_cow.layout import stored_time
from nbdserve.storage.base import Storage
from nbdserve.storage.memory import MemoryStorage


async def export_to_qcow2(source: RawCowDriver, target: Storage, *, raw_file: str, backing_file: str | None) -> None:
    """Make ``target`` a qcow2 image of the same disk; the names are those its header gets. Neither file is opened.

    What ``target`` held is lost, and it is complete only on return. ConfigError when a name is too long for a header.
    """
    options = {"data_file": raw_file, "cluster_size": str(source.cluster_size)}
    if backing_file is not None:
        assert source.backing is not None
        if source.backing.format is None:
            raise ImageError(
                source.path, "the header declares no format for it", field="backing file", value=source.backing.name
            )
        options |= {"backing_file": backing_file, "backing_fmt": source.backing.format}
        _refuse_resized(source)
    # Stands for the raw file, of which neither making the image nor changing its mapping reads or writes a byte.
    await create_qcow2(target, source.size, options, data_file_storage=MemoryStorage(path=raw_file))
    image = await Qcow2Driver.open(target, {"companions": [MemoryStorage(path=raw_file)]}, read_only=False)
    async for runs in source.iter_runs(0, source.size):
        for start, length, kind in zip(runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), strict=True):
            if kind == DATA:
                await _map(image, start, start + length)
            elif kind == ZERO and backing_file is not None:
                await _zero(image, start, start + length)
    await image.flush()


def _refuse_resized(source: RawCowDriver) -> None:
    """A backing file that ends, for the disk, inside a cluster that is not in the raw file."""
    limit, unit = source.header.backing_limit, source.cluster_size
    if limit < source.size and limit % unit and source.lookup_writable(limit, 1)[0] != DATA:
        raise UnsupportedImageError(
            source.path,
            f"the disk was resized inside the cluster at {limit // unit * unit:#x}, which is not in the raw file yet: "
            "a qcow2 image cannot say where in a cluster the backing file ends",
            field="backing_limit",
            value=limit,
            hint="write something there",
        )


async def _map(image: Qcow2Driver, start: int, end: int) -> None:
    while start < end:
        while (allocation := image.allocate(start, end - start)) is None:
            await image.prepare(start, end - start)
        assert allocation.host_offset == start
        image.publish(allocation)
        start += allocation.length


async def _zero(image: Qcow2Driver, start: int, end: int) -> None:
    while start < end:
        while (done := image.zero(start, end - start, unmap=True)) is None:
            await image.prepare(start, end - start)
        assert done
        start += done


async def import_from_qcow2(
    source: Qcow2Driver,
    raw: Storage,
    target: Storage,
    *,
    raw_file: str,
    backing_file: str | None,
    backing_changed_at: float = 0,
) -> int:
    """Make ``target`` a raw-cow image of the same disk over ``raw``, the qcow2 image's data file, open for writing.

    Ranges that the qcow2 image says are zeroes, over a backing file, become zeroes in the raw file, where they are not
    visible through the qcow2 image; the bytes of these are returned. What ``target`` held is lost.
    ``backing_changed_at``: seconds since 1970, 0 if it is not known. ImageError naming what a raw-cow image cannot
    express, before anything is changed.
    """
    backing = source.backing if backing_file is not None else None
    _refuse(source)
    options = {"raw_file": raw_file, "cluster_size": str(source.granularity)}
    if backing is not None and backing_file is not None:
        if backing.format is None:
            raise ImageError(
                source.path, "the header declares no format for it", field="backing file", value=backing.name
            )
        options |= {"backing_file": backing_file, "backing_fmt": backing.format}
    header = replace(plan_header(source.size, options), mtime=stored_time(backing_changed_at))
    bitmap = Bitmap(header.bitmap_offset, header.clusters, bytearray())
    zeroes: list[tuple[int, int]] = []
    async for runs in source.iter_runs(0, source.size):
        if bool(np.any(runs.kind == COMPRESSED)):
            raise UnsupportedImageError(source.path, "compressed clusters are in the image itself")
        moved = (runs.kind == DATA) & (runs.host_offset != runs.start)
        if bool(np.any(moved)):
            at = int(runs.start[int(np.argmax(moved))])
            raise UnsupportedImageError(source.path, f"guest offset {at:#x} is at another offset of the data file")
        for start, length, kind in zip(runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), strict=True):
            if kind == UNALLOCATED or (kind == ZERO and backing is None):
                continue
            if kind == ZERO:
                zeroes.append((start, length))
            bitmap.set(start // header.cluster_size, -(-(start + length) // header.cluster_size))
    if source.header.data_file_raw and header.clusters:
        bitmap.set(0, header.clusters)  # it reads as the disk does, by definition
        zeroes.clear()
    for start, length in zeroes:
        await raw.zero(start, length)
    await write_image(target, raw, header, bytes(bitmap.bits))
    return sum(length for _, length in zeroes)


def _refuse(source: Qcow2Driver) -> None:
    if not source.header.has_data_file:
        raise UnsupportedImageError(
            source.path,
            "the guest's data are in the image itself, a raw-cow image needs them in a data file",
            hint="qemu-img convert -O qcow2 -o data_file=NAME",
        )
    if source.snapshots:
        raise UnsupportedImageError(source.path, "internal snapshots have no place in a raw-cow image")
    if source.info().encrypted:
        raise UnsupportedImageError(source.path, "the data file is encrypted, so it is no raw image")
    if source.size % 512:
        raise ConfigError(f"{source.path}: a disk of {source.size} bytes: raw-cow has whole sectors")
