"""The qcow driver, version 1 (QEMU block/qcow.c): two levels of tables, compressed clusters, no flag for zeroes.

The header has no word for the format of the backing file, so ``backing.format`` is always None: the user gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final, Self, cast

import numpy as np

from nbdserve.errors import ConfigError
from nbdserve.formats.base import BackingReference, CheckResult, CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.inflate import inflate
from nbdserve.formats.qcow import layout
from nbdserve.formats.qcow.check import check_qcow
from nbdserve.formats.qcow.create import CREATE_OPTIONS, create_qcow, plan_header
from nbdserve.formats.qcow.layout import Header
from nbdserve.formats.tables import Table, Words
from nbdserve.formats.two_level.driver import TwoLevelDriver
from nbdserve.formats.two_level.entries import BAD_ENTRY, FLAG
from nbdserve.formats.unit_cache import UnitCache
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_down, align_up, div_ceil

INFLATE_WINDOW: Final = -12
"""Raw deflate data with a window of at most 4 KiB."""


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
        decompress = partial(inflate, size=self.cluster_size, window_bits=INFLATE_WINDOW)
        return align_down(offset, self.cluster_size), await self._units.read(entry, host_offset, length, decompress)

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Without a backing file entries of 0 read as zeroes; data clusters are left to be zeroed where they are.

        With one there is no entry that says so, and zeroes are written.
        """
        return 0 if self.has_backing else self._zero_alone(offset, length)
