"""Changing the dirty bitmaps stored in an image, all in one step.

Whatever is new - the bits, tables, the directory - goes to free clusters and is made stable and counted; then one write
of the header's first sector puts it in force. Crash before that: the bitmaps there were, and leaked clusters. After it:
the new ones, with the clusters of the old ones leaked until they are given back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.bitmaps.bits import ALL_SET, MIXED, Bits
from nbdserve.errors import ConfigError, RequestError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.allocator import ClusterRange, Clusters
from nbdserve.formats.qcow2.bitmap_directory import (
    FLAG_AUTO,
    FLAG_IN_USE,
    FLAGS_AT,
    MAX_DIRECTORY_BYTES,
    BitmapEntry,
    build_directory,
    read_bitmap_directory,
)
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.stored_bitmaps import ALL_ONES, MAX_STORED_BITS, check_entry, load_bitmap
from nbdserve.formats.tables import Piece, Words, decode_words, encode_words
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.units import div_ceil

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.image import Qcow2Image

_BATCH_BYTES: Final = 16 << 20
"""Bits written at a time."""


async def check_new_bitmap(image: Qcow2Image, bitmap: DirtyBitmap) -> None:
    """``FormatDriver.check_new_bitmap``."""
    _refuse(image, bitmap, others=len(await read_bitmap_directory(image.storage, image.header)))


def _refuse(image: Qcow2Image, bitmap: DirtyBitmap, others: int) -> None:
    """ConfigError for a bitmap that the image cannot hold besides so many, or QEMU would not open."""
    problem = ""
    if image.header.version < 3:
        problem = "Cannot store dirty bitmaps in qcow2 v2 files"
    elif bitmap.bits.size == 0:
        problem = "The disk has no size, and a bitmap of nothing cannot be stored"
    elif bitmap.bits.size > MAX_STORED_BITS:
        problem = "Too much space will be occupied by the bitmap. Use larger granularity"
    elif others >= layout.MAX_BITMAPS:
        problem = "Maximum number of persistent bitmaps is already reached"
    if problem:
        raise ConfigError(f"Can't make bitmap '{bitmap.name}' persistent in '{image.path}': {problem}")


async def store_bitmaps(image: Qcow2Image, changes: Mapping[str, DirtyBitmap | None]) -> None:
    """``FormatDriver.store_bitmaps``."""
    image.check_writable()
    old = await _sound_entries(image)
    known = {entry.name for entry in old}
    changes = {name: bitmap for name, bitmap in changes.items() if bitmap is not None or name in known}
    if not changes:
        return
    wanted = [changes.get(entry.name, entry) for entry in old]
    wanted += [bitmap for name, bitmap in changes.items() if name not in known]
    async with _written(image, old) as writer:
        for each in wanted:
            if isinstance(each, DirtyBitmap):
                await writer.add(each)
            elif each is not None:
                writer.keep(each)
        await image.replace_header(await writer.complete())


async def mark_in_use(storage: Storage, header: Header) -> None:
    """Before the image is written: bitmaps that record do not count until they are stored again. Stable on return.

    CorruptImageError when the directory cannot be made out.
    """
    pieces: list[Piece] = []
    host_offset = 0 if header.bitmaps is None else header.bitmaps.directory_offset
    for entry in await read_bitmap_directory(storage, header):
        if entry.auto and not entry.in_use:
            flags = entry.flags | FLAG_IN_USE
            pieces.append((host_offset + FLAGS_AT, flags.to_bytes(4, "big")))
        host_offset += len(entry.build())
    if pieces:
        await _barrier_in_use(storage, pieces)


async def _barrier_in_use(storage: Storage, pieces: Sequence[Piece]) -> None:
    """The flags, none of which two sectors share, are stable before the first change of the disk.

    Crash before the barrier: the disk is the one that the bitmaps know. Without it they could miss changes.
    """
    await storage.write_stable(pieces)


@asynccontextmanager
async def resized_bitmaps(image: Qcow2Image, size: int) -> AsyncIterator[Header]:
    """Bitmaps for a disk of ``size`` bytes, in the place of those in force: inside, the caller makes them so.

    Yields the header that names them and has everything else as it is; there is no other one when there are no bitmaps.
    ConfigError, before anything is in force, when one would become too large, or is inconsistent and nobody is writing
    the disk. Of one that is in use by who writes the disk the size is no matter.
    """
    old = await _sound_entries(image)
    if not old:
        yield image.header
        return
    async with _written(image, old) as writer:
        for entry in old:
            if entry.in_use and not image.keeps_bitmaps:
                writer.keep(entry)
                continue
            bitmap = await load_bitmap(image.storage, image.header, entry)
            bitmap.check_usable(reading=True)
            bitmap.resize(size)
            await writer.add(bitmap)
        yield await writer.complete()


async def _sound_entries(image: Qcow2Image) -> list[BitmapEntry]:
    entries = await read_bitmap_directory(image.storage, image.header)
    for entry in entries:
        check_entry(entry, image.storage, image.header)
    return entries


@asynccontextmanager
async def _written(image: Qcow2Image, old: Sequence[BitmapEntry]) -> AsyncIterator[_Writer]:
    """Inside, bitmaps are written and put in force; afterwards the space of those that are not is given back."""
    writer = _Writer(image)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise
    await writer.retire(old)


class _Writer:
    """The bitmaps an image is to have, as far as they are new in clusters that nothing on disk refers to yet."""

    def __init__(self, image: Qcow2Image) -> None:
        self._image = image
        self._before = image.header
        self._entries: list[BitmapEntry] = []
        self._taken: list[ClusterRange] = []

    def keep(self, entry: BitmapEntry) -> None:
        """The next one stays as and where it is."""
        self._entries.append(entry)

    async def add(self, bitmap: DirtyBitmap) -> None:
        """Write the next one."""
        assert bitmap.name is not None
        _refuse(self._image, bitmap, others=len(self._entries))
        words = await self._write_bits(bitmap.bits)
        self._entries.append(
            BitmapEntry(
                name=bitmap.name,
                granularity_bits=bitmap.granularity.bit_length() - 1,
                flags=0 if bitmap.disabled else FLAG_AUTO,
                table_offset=await self._write_table(encode_words(words)),
                table_entries=len(words),
            )
        )

    async def complete(self) -> Header:
        """Write the directory; the header that names it, which may be put in force."""
        image, entries = self._image, self._entries
        data = build_directory(entries)
        if len(data) > MAX_DIRECTORY_BYTES:
            raise ConfigError(f"{image.path}: No space in the bitmap directory")
        host_offset = await self._write_table(data) if entries else 0
        if entries:
            image.allocator.metadata.update(range(self._taken[-1][0], sum(self._taken[-1])))
        await self._barrier_new_bitmaps()
        return _header_with(self._before, len(entries), host_offset, len(data))

    async def _barrier_new_bitmaps(self) -> None:
        """Bits, tables and directory are stable, and their clusters counted, before the header names them.

        The commit that writes the counts makes stable what was written before it. Crash before the barrier: nothing on
        disk refers to any of it. Without it the header could name a directory that was never written, or one in
        clusters that count as free.
        """
        await self._image.committer.settle()

    async def _write_bits(self, bits: Bits) -> Words:
        """Put them in clusters, but for those that are all alike; the table."""
        cluster_size = self._before.cluster_size
        found = bits.uniform(cluster_size)
        words = np.where(found == ALL_SET, np.uint64(ALL_ONES), np.uint64(0))
        mixed = np.flatnonzero(found == MIXED)
        per_batch = max(1, _BATCH_BYTES // cluster_size)
        with memoryview(bits.octets) as octets:
            for start in range(0, len(mixed), per_batch):
                part = mixed[start : start + per_batch]
                words[part] = places = await self._take(len(part))
                pieces: list[Piece] = []
                for index, place in zip(part.tolist(), places.tolist(), strict=True):
                    data = octets[index * cluster_size : (index + 1) * cluster_size]
                    pieces.append((place, data if len(data) == cluster_size else _padded(data, cluster_size)))
                await self._image.storage.write_all(pieces)
        return words

    async def _write_table(self, data: bytes) -> int:
        """Put ``data`` in consecutive clusters; the host offset."""
        allocator, cluster_size = self._image.allocator, self._before.cluster_size
        clusters = div_ceil(len(data), cluster_size)
        if clusters == 1:
            (host_offset,) = (await self._take(1)).tolist()
        else:
            first = await allocator.take_run(clusters)
            self._taken.append((first, clusters))
            host_offset = first * cluster_size
        await self._image.storage.write(host_offset, _padded(data, clusters * cluster_size))
        return int(host_offset)

    async def _take(self, count: int) -> Words:
        """The host offsets of free clusters, counted from now on."""
        allocator, taken = self._image.allocator, []
        while count:
            found = allocator.take(count)
            if found is None:
                await allocator.ready()
                continue
            self._taken.append(found)
            taken.append(np.arange(found[0], sum(found), dtype=np.uint64))
            count -= found[1]
        return np.concatenate(taken) * np.uint64(self._before.cluster_size)

    # --- giving back -----------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Something failed: what is new is free again, unless it is in force, or nobody knows whether it is."""
        image = self._image
        with suppress(RequestError):
            image.check_writable()
            if image.header.bitmaps == self._before.bitmaps:
                for clusters in self._taken:
                    image.allocator.retire_metadata(clusters)

    async def retire(self, old: Sequence[BitmapEntry]) -> None:
        """What only the bitmaps ``old`` used is free."""
        allocator, bits = self._image.allocator, self._before.cluster_bits
        for entry in set(old).difference(self._entries):
            clusters = await self._clusters_of(entry)
            allocator.free(clusters[[cluster not in allocator.metadata for cluster in clusters.tolist()]])
        extension = self._before.bitmaps
        if old and extension is not None:
            count = div_ceil(extension.directory_size, self._before.cluster_size)
            allocator.retire_metadata((extension.directory_offset >> bits, count))
        await self._image.committer.settle()

    async def _clusters_of(self, entry: BitmapEntry) -> Clusters:
        """The clusters of a bitmap: of its table, and those that this names, as far as they can be."""
        storage, header = self._image.storage, self._before
        words = decode_words(await storage.read(entry.table_offset, entry.table_entries * 8))
        offsets = words & np.uint64(layout.OFFSET_MASK)
        named = (offsets != 0) & (offsets % np.uint64(header.cluster_size) == 0) & (offsets < np.uint64(storage.size))
        first = entry.table_offset >> header.cluster_bits
        table = np.arange(first, first + div_ceil(entry.table_entries * 8, header.cluster_size))
        return np.concatenate((table, (offsets[named] >> np.uint64(header.cluster_bits)).astype(np.int64)))


def _padded(data: ReadBuffer, length: int) -> bytes:
    return bytes(data).ljust(length, b"\0")


def _header_with(header: Header, count: int, directory_offset: int, directory_size: int) -> Header:
    """``header`` with this directory, or without bitmaps.

    The extension is the first one, so that it lies in the first sector whatever names of features follow.
    """
    others = [item for item in header.extensions if item[0] != layout.EXTENSION_BITMAPS]
    autoclear = header.autoclear & ~layout.AUTOCLEAR_BITMAPS
    if count:
        data = layout.BITMAPS_EXTENSION.build(
            {"count": count, "reserved": 0, "directory_size": directory_size, "directory_offset": directory_offset}
        )
        others.insert(0, (layout.EXTENSION_BITMAPS, data))
        autoclear |= layout.AUTOCLEAR_BITMAPS
    return replace(header, extensions=tuple(others), autoclear=autoclear)
