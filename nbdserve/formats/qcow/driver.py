"""The qcow driver, version 1 (QEMU block/qcow.c): two levels of tables, compressed clusters, no flag for zeroes.

The header has no word for the format of the backing file, so ``backing.format`` is always None: the user gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self, cast

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.base import BackingReference, CheckResult, CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.inflate import DEFLATE_4K_WINDOW, inflate
from nbdserve.formats.qcow import layout
from nbdserve.formats.qcow.check import check_qcow
from nbdserve.formats.qcow.create import CREATE_OPTIONS, create_qcow, plan_header
from nbdserve.formats.qcow.layout import Header
from nbdserve.formats.tables import Table, Words
from nbdserve.formats.two_level.driver import TwoLevelDriver
from nbdserve.formats.two_level.entries import BAD_ENTRY, FLAG
from nbdserve.formats.unit_cache import UnitCache
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.units import SECTOR_SIZE, align_down, align_up, div_ceil


async def read_header(storage: Storage) -> Header:
    """The header of the image on ``storage``. ImageError."""
    data = await storage.read(0, min(layout.HEADER_LENGTH, storage.size))
    header = Header.parse(data, storage.path, storage.size)
    if header.backing_offset:
        header = header.with_backing_name(bytes(await storage.read(header.backing_offset, header.backing_length)))
    return header


class QcowDriver(TwoLevelDriver):
    """One open qcow image."""

    name = "qcow"
    create_options: ClassVar[tuple[CreateOption, ...]] = CREATE_OPTIONS
    stored = ">u8"

    def __init__(self, storage: Storage, header: Header, l1: Table, options: Mapping[str, Any]) -> None:
        backing = None if header.backing_name is None else BackingReference(header.backing_name, None)
        super().__init__(storage, header.geometry, l1, backing, options)
        self.header = header
        self._units = UnitCache(storage)
        self._backing_end = 1 << 63
        """Bytes of the disk below: from there on it shows zeroes."""
        self.zeroes_fast = not self.has_backing

    # --- opening and making ------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image. Options: ``secret``, the passphrase of an encrypted one."""
        header = await read_header(storage)
        l1 = await cls._read_l1(storage, header.l1_table_offset, header.l1_entries)
        driver = cls._class_for(header)(storage, header, l1, options)
        if not read_only:
            await driver._open_writable()
        return driver

    @classmethod
    def _class_for(cls, header: Header) -> type[Self]:
        """The class that knows how the data clusters are stored."""
        if header.crypt_method == layout.CRYPT_AES:
            from nbdserve.formats.qcow.aes import AesQcowDriver  # noqa: PLC0415  (a subclass of this class)

            return cast("type[Self]", AesQcowDriver)
        return cls

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError for a bad option, and for a disk of 0 bytes or one that is too large."""
        cls.check_option_names(options)
        plan_header(size, options)

    @classmethod
    async def create(cls, storage: Storage, size: int, options: Mapping[str, str], **resources: Any) -> None:
        """Make ``storage`` an empty image of ``size`` bytes."""
        await create_qcow(storage, size, options)

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """Name another backing file; its format cannot be said.

        The first sector decides. A name that does not fit between its fields and the L1 table is stable first, in space
        of its own: after a crash that is a leak.
        """
        await self.flush()
        name = b"" if reference is None else reference.name.encode("utf-8", "surrogateescape")
        if len(name) > layout.MAX_BACKING_NAME:
            raise ConfigError(
                f"{self.path}: a backing file name of {len(name)} bytes is longer than {layout.MAX_BACKING_NAME}"
            )
        start = layout.HEADER_LENGTH if name else 0
        if start + len(name) <= min(SECTOR_SIZE, self.header.l1_table_offset):
            # One write inside one sector: a disk does not tear it.
            fields = bytearray(await self.storage.read(0, layout.HEADER_LENGTH)) + name
        else:
            start, _ = self._space.take_whole(div_ceil(len(name), self.cluster_size))
            await self.storage.write_stable([(start, name.ljust(align_up(len(name), self.cluster_size), b"\0"))])
            fields = bytearray(await self.storage.read(0, layout.HEADER_LENGTH))
        at = layout.BACKING_FIELDS_AT
        fields[at : at + 12] = start.to_bytes(8, "big") + len(name).to_bytes(4, "big")
        await self.storage.write_stable([(0, fields)])
        self.header = replace(
            self.header,
            backing_offset=start,
            backing_length=len(name),
            backing_name=name.decode("utf-8", "surrogateescape") or None,
        )
        self.geometry = self.header.geometry
        self.backing = None if reference is None else BackingReference(reference.name, None)
        self.has_backing = reference is not None
        self.zeroes_fast = not self.has_backing

    # --- facts -------------------------------------------------------------------------------------------------------

    def info(self) -> ImageInfo:
        """The facts of this layer."""
        return ImageInfo(
            format=self.name,
            virtual_size=self.size,
            cluster_size=self.cluster_size,
            backing=self.backing,
            encrypted=self.header.crypt_method != layout.CRYPT_NONE,
        )

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Follow every entry. What was written before is flushed first; after a repair, open the image anew."""
        await self._settle_for_check(repair=repair_leaks or repair_errors)
        return await check_qcow(
            self.storage, await read_header(self.storage), repair_leaks=repair_leaks, repair_errors=repair_errors
        )

    # --- the mapping -------------------------------------------------------------------------------------------------

    def _valid(self, words: Words) -> Words:
        """0, the places of data clusters, and compressed clusters inside the file are valid."""
        bits = np.uint64(63 - self._bits)
        start = words & np.uint64((1 << 63 - self._bits) - 1)
        length = words >> bits & np.uint64(self._cluster_mask)
        inside = (start + length <= self.storage.size) & (start >= layout.HEADER_LENGTH) & (length > 0)
        valid = np.where(words >= np.uint64(FLAG), inside, self._is_place(words))
        return np.where(valid | (words == 0), words, np.uint64(BAD_ENTRY))

    async def read_compressed(self, offset: int) -> tuple[int, bytes]:
        """The compressed cluster that contains ``offset``."""
        while (table := self.cache.find(offset >> self._slice_shift)) is None:
            await self.load(offset)
        entry = table.entries[(offset >> self._bits) & self._slice_mask]
        host_offset, length = self.geometry.compressed_range(entry)
        decompress = partial(inflate, size=self.cluster_size, window_bits=DEFLATE_4K_WINDOW)
        return align_down(offset, self.cluster_size), await self._units.read(entry, host_offset, length, decompress)

    async def write_compressed(self, offset: int, data: ReadBuffer) -> None:
        """Compress on the worker threads, and pack the results one behind the other."""
        from nbdserve.formats.qcow.compressing import write_compressed  # noqa: PLC0415  (works on drivers)

        await write_compressed(self, offset, memoryview(data))

    def take_clusters(self, offset: int, count: int) -> int | None:
        """Host offset of ``count`` new clusters behind each other; None: ``prepare`` must be awaited first."""
        if self._writable_slice(offset) is None or not self._has_room(count * self.cluster_size):
            return None
        return self._space.take_whole(count)[0]

    def give_clusters(self, host_offset: int, count: int) -> None:
        """Give back what ``take_clusters`` gave."""
        self._space.free(host_offset, count)

    def publish_compressed(self, offset: int, entry: int) -> bool:
        """Let the cluster at ``offset``, no data cluster, be what ``entry`` says; False: ``prepare`` comes first."""
        table = self._writable_slice(offset)
        if table is None:
            return False
        index = (offset >> self._bits) & self._slice_mask
        table.entries[index] = entry
        table.touch(index, index + 1)
        return True

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Without a backing file entries of 0 read as zeroes; data clusters are left to be zeroed where they are.

        With one there is no entry that says so, and zeroes are written.
        """
        return 0 if self.has_backing else self._zero_alone(offset, length)

    # --- size --------------------------------------------------------------------------------------------------------

    def accept_backing(self, backing: FormatDriver) -> None:
        """Any will do; how long it is says how far it shows."""
        self._backing_end = backing.size

    async def resize(self, size: int) -> None:
        """Grow the disk; a longer L1 table is made in new space, and the header's sector decides.

        ConfigError for a size that is smaller, no multiple of 512 or too large for the L1 table. Where the old end is
        inside a cluster that only a longer layer below has, the engine zeroes the rest of it.
        """
        new = replace(self.header, size=size)
        most = layout.MAX_L1_BYTES // 8 << self._l1_shift
        if size < self.size or size % SECTOR_SIZE or size > most:
            raise ConfigError(f"{self.path}: {size} bytes: must be a multiple of 512 from {self.size} to {most}")
        await self._commit.settle()
        if new.l1_entries > self.header.l1_entries:
            words = np.zeros(new.l1_entries, np.uint64)
            words[: len(self.l1.words)] = self.l1.words
            host_offset, _ = self._space.take_whole(div_ceil(len(words) * 8, self.cluster_size))
            table = Table(host_offset, words, self.stored)
            await self.storage.write_stable([(host_offset, table.encode())])
            self.l1, new = table, replace(new, l1_table_offset=host_offset)
        try:
            await self._clear(self.size, size)
            await self._commit.settle()
            # Until here the disk has its old size and its old L1 table; what is mapped past its end is zeroes already.
            fields = bytearray(await self.storage.read(0, layout.HEADER_LENGTH))
            fields[layout.SIZE_AT : layout.SIZE_AT + 8] = size.to_bytes(8, "big")
            fields[layout.L1_OFFSET_AT : layout.L1_OFFSET_AT + 8] = new.l1_table_offset.to_bytes(8, "big")
            await self.storage.write_stable([(0, fields)])
        except BaseException as error:
            # The tables in memory are not those the header on disk names.
            self._stop_writing(f"{self.path}: it could not be resized, open it anew: {error}")
            raise
        self.header, self.geometry, self.size = new, new.geometry, new.disk_size

    async def _clear(self, start: int, end: int) -> None:
        """Make ``[start, end)``, past the end of the disk, read as zeroes when the disk has it."""
        shown = self._backing_end if self.has_backing else 0
        async for runs in self.iter_runs(start, end):
            for first, length, kind in zip(runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), strict=True):
                at, stop = first, first + length
                if kind == UNALLOCATED:
                    at, stop = align_up(at, self.cluster_size), min(stop, shown)
                while at < stop:
                    at += await self._zero_past_the_end(at, stop - at)

    async def _zero_past_the_end(self, offset: int, length: int) -> int:
        """Zero the start of the range in place, or put a cluster of zeroes there; the bytes done."""
        while (run := self.lookup(offset, length)) is None:
            await self.load(offset)
        if run[0] != DATA:
            return await self._write_zeroes(offset)
        await self.data.zero(run[2], run[1])
        return run[1]

    async def _write_zeroes(self, start: int) -> int:
        """A cluster of its own for the one with ``start``, which ends in zeroes from there on; the bytes done."""
        unit = align_down(start, self.cluster_size)
        while (allocation := self.allocate(unit, self.cluster_size)) is None:
            await self.prepare(unit, self.cluster_size)
        content = b""
        if start > unit:
            content = (await self.read_compressed(unit))[1][: start - unit]
        await self.data.write(allocation.host_offset, content.ljust(self.cluster_size, b"\0"))
        self.publish(allocation)
        return unit + self.cluster_size - start
