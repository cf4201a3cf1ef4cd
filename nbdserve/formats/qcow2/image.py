"""An open qcow2 image, apart from what its L2 entries mean: opening, tables, free clusters, stability, closing."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final, NoReturn, Self

import numpy as np

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.errors import ConfigError, CorruptImageError, ImageError, RequestError, UnsupportedImageError
from nbdserve.formats.base import (
    BackingReference,
    BitmapInfo,
    CheckResult,
    Companion,
    FormatDriver,
)
from nbdserve.formats.qcow2 import bitmap_changes, layout
from nbdserve.formats.qcow2.allocator import Allocator
from nbdserve.formats.qcow2.backing import set_backing
from nbdserve.formats.qcow2.bitmap_directory import read_bitmap_directory
from nbdserve.formats.qcow2.commit import Committer, HeaderSector
from nbdserve.formats.qcow2.compressed import CompressedClusters
from nbdserve.formats.qcow2.encryption import open_encryption
from nbdserve.formats.qcow2.format import Qcow2Format
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.header_change import change_header
from nbdserve.formats.qcow2.layout import (
    COPIED,
    OFFSET_MASK,
)
from nbdserve.formats.qcow2.metadata import metadata_clusters
from nbdserve.formats.qcow2.refcounts import Refcounts
from nbdserve.formats.qcow2.snapshots import find_snapshot, read_snapshots
from nbdserve.formats.qcow2.stored_bitmaps import read_stored_bitmap
from nbdserve.formats.tables import L2Cache, L2Table, Table, decode_words
from nbdserve.storage.base import Storage
from nbdserve.storage.draft import Draft
from nbdserve.units import KIB, SECTOR_SIZE, align_up

ALL_BITS: Final = (1 << 64) - 1
MAX_QUARANTINE: Final = 1 << 16
"""Ranges of freed clusters (8 MiB of tuples) after which a commit releases them, flush or not."""
_HEADER_READ: Final = 64 * KIB


async def read_header(storage: Storage) -> tuple[Header, bytes]:
    """The header of the image on ``storage``, and its first sector as stored."""
    data = await storage.read(0, min(storage.size, _HEADER_READ))
    bits = int.from_bytes(data[20:24], "big")
    if layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS and len(data) < 1 << bits:
        data = await storage.read(0, min(storage.size, 1 << bits))
    return Header.parse(data, storage.path, storage.size), bytes(data[:SECTOR_SIZE].ljust(SECTOR_SIZE, b"\0"))


def _reference(header: Header) -> BackingReference | None:
    return None if header.backing_name is None else BackingReference(header.backing_name, header.backing_format)


class Qcow2Image(Qcow2Format):
    """The parts of an open qcow2 image that do not depend on the form of L2 entries."""

    def __init__(self, storage: Storage, data: Storage, header: Header, l1: Table, options: Mapping[str, Any]) -> None:
        self.storage, self.data, self.path = storage, data, storage.path
        self.header = header
        self.read_only = True
        self.size = header.size
        self.cluster_size = self.granularity = header.cluster_size
        self.l1 = l1
        self.cache = L2Cache(header.cluster_size)
        self.backing = _reference(header)
        self.data_file = data
        """What ``data`` is in: where that encrypts, the file under it."""
        self.has_backing = self.backing is not None or bool(options.get("has_backing", False))
        """Something below may show where this layer does not decide."""
        self.backing_end = 1 << 63 if self.has_backing else 0
        """Bytes of the disk below: from there on it shows zeroes."""
        self.zeroes_fast = header.version >= 3 and not header.data_file_raw
        self.external = header.has_data_file
        # Everything lookup needs is one attribute away.
        self._recent = self.cache.recent
        self._bits = header.cluster_bits
        self._cluster_mask = header.cluster_size - 1
        self._l1_shift = header.cluster_bits + header.l2_entries.bit_length() - 1
        self._l2_entries = header.l2_entries
        self._l2_mask = header.l2_entries - 1
        self.not_plain = ALL_BITS & ~(COPIED | OFFSET_MASK & ~self._cluster_mask)
        """An entry with any of these bits is not an ordinary data cluster."""
        self._form = self.not_plain | COPIED
        """Of these bits an ordinary data cluster that may be overwritten has COPIED alone."""
        self.host_limit = 1 << 62 if self.external else storage.size
        """Host offset before which every data cluster must begin."""
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._compressed = CompressedClusters(storage, header.cluster_bits, header.compression_type)
        # Only of a writable image:
        self._punch = options.get("discard") == "unmap"
        self.keeps_bitmaps = bool(options.get("keep_bitmaps", False))
        """Its stored bitmaps are right: nothing else of the disk is changed."""
        self._protected: set[int] = set()
        """Clusters with metadata, which no data may be written to. Empty when data is in a file of its own."""
        self._broken = ""
        """Why nothing may be changed any more."""
        self._starved = False
        """A synchronous method found no free clusters in memory, or too many changes waiting for a commit."""

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image.

        Options: ``companions``, the external data file; ``snapshot``, an internal snapshot's id or name (read-only);
        ``discard``, where ``unmap`` punches freed clusters out of the file; ``has_backing`` when a layer is put below
        an image whose header names none; ``secret``, the passphrase of an encrypted image; ``keep_bitmaps`` when
        bitmaps and the size are all that is changed, so that stored bitmaps stay right.
        """
        read_only = read_only or "snapshot" in options
        header, sector = await read_header(storage)
        snapshots, snapshot_table_bytes = await read_snapshots(storage, header)
        data_file = cls._data_storage(storage, header, options)
        if not read_only:
            cls._refuse_writing(storage, header)
        l1_offset, l1_entries = header.l1_offset, header.l1_entries
        wanted: str | None = options.get("snapshot")
        snapshot = None if wanted is None else find_snapshot(snapshots, wanted, header, storage.path)
        if snapshot is not None:
            l1_offset, l1_entries = snapshot.l1_offset, snapshot.l1_entries
        l1 = Table(l1_offset, decode_words(await storage.read(l1_offset, l1_entries * 8)))
        data, luks_header = await open_encryption(storage, data_file, header, options)
        driver = cls._class_for(header)(storage, data, header, l1, options)
        driver.data_file = data_file
        driver._luks_header, driver._changing_keys = luks_header, asyncio.Lock()
        driver.snapshots = snapshots
        if snapshot is not None and snapshot.disk_size is not None:
            driver.size = snapshot.disk_size
        if not read_only:
            if header.incompatible & layout.INCOMPATIBLE_DIRTY:
                await cls._repair_dirty(storage, header, options)
                return await cls.open(storage, options, read_only=False)
            await driver._open_writable(sector, snapshot_table_bytes)
        return driver

    @classmethod
    def _class_for(cls, header: Header) -> type[Self]:
        """The class that knows the form of the L2 entries."""
        return cls

    @staticmethod
    def _data_storage(storage: Storage, header: Header, options: Mapping[str, Any]) -> Storage:
        companions: Sequence[Storage] = options.get("companions", ())
        if header.has_data_file:
            if len(companions) != 1:
                raise ImageError(
                    storage.path, "the external data file is not given", field="data file", value=header.data_file_name
                )
            return companions[0]
        if companions:
            raise ImageError(
                storage.path, "the image holds its data itself", field="data file", value=companions[0].path
            )
        return storage

    @staticmethod
    def _refuse_writing(storage: Storage, header: Header) -> None:
        if header.incompatible & layout.INCOMPATIBLE_CORRUPT:
            raise CorruptImageError(
                storage.path,
                "the image is marked corrupt, it can only be read",
                field="incompatible_features",
                value=header.incompatible,
                hint="image check -r all",
            )
        if storage.read_only:
            raise ImageError(storage.path, "the file is open read-only")

    @classmethod
    async def companions(cls, storage: Storage) -> Sequence[Companion]:
        """The external data file, if the data is not in the image."""
        header, _ = await read_header(storage)
        if not header.has_data_file:
            return ()
        if header.data_file_name is None:
            raise UnsupportedImageError(
                storage.path,
                "the header does not name the external data file",
                field="incompatible_features",
                value=header.incompatible,
            )
        return (Companion(header.data_file_name, "data file", guest_data_only=True),)

    def accept_backing(self, backing: FormatDriver) -> None:
        """Any will do; how long it is says how far it shows."""
        self.backing_end = backing.size

    @classmethod
    async def _repair_dirty(cls, storage: Storage, header: Header, options: Mapping[str, Any]) -> None:
        """Rebuild the refcounts of an image whose writer kept them lazily and did not close it.

        All or nothing: the repair is made once the image it makes is known to open.
        """
        from nbdserve.formats.qcow2.check_repair import repair  # noqa: PLC0415  (check works on drivers)

        draft = Draft(storage)
        result = await repair(draft, errors=True)
        if result.corruptions or result.check_errors:
            raise CorruptImageError(
                storage.path,
                f"not closed cleanly, and {result.corruptions} errors remain",
                field="incompatible_features",
                value=header.incompatible,
                hint="image check -r all",
            )
        repaired, sector = await read_header(draft)
        value = repaired.incompatible & ~layout.INCOMPATIBLE_DIRTY
        await HeaderSector(draft, sector).patch(layout.INCOMPATIBLE_AT, value.to_bytes(8, "big"))
        await cls.open(draft, options, read_only=False)
        await draft.apply()

    async def _open_writable(self, sector: bytes, snapshot_table_bytes: int) -> None:
        self.read_only = False
        self.header_sector = HeaderSector(self.storage, sector)
        self.refcounts = await Refcounts.open(self.storage, self.header)
        metadata = metadata_clusters(
            self.header, self.l1, self.refcounts.table, self.snapshots, snapshot_table_bytes, self.path
        )
        if not self.external:
            self._protected = metadata
        self.allocator = Allocator(self.storage, self.refcounts, self._bits, metadata, self._corruption)
        self.allocator.punch = self._punch
        self.committer = Committer(
            self.storage, self.data_file, self.header_sector, self.l1, self.cache, self.refcounts, self.allocator
        )
        self._data_virgin = self.data.size
        # What an unknown bit stands for is not kept up to date: the bits are cleared, so that others do not trust it.
        if not self.keeps_bitmaps:
            await bitmap_changes.mark_in_use(self.storage, self.header)
        if self.header.autoclear & ~layout.AUTOCLEAR_KNOWN:
            autoclear = self.header.autoclear & layout.AUTOCLEAR_KNOWN
            await self.header_sector.patch(layout.AUTOCLEAR_AT, autoclear.to_bytes(8, "big"))
            self.header = replace(self.header, autoclear=autoclear)

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Compare refcounts, tables and COPIED flags. What was written before is flushed first.

        After a repair the tables in memory are not those on disk: nothing is written before the image is opened anew.
        """
        from nbdserve.formats.qcow2.check import check_qcow2  # noqa: PLC0415  (check works on drivers)

        if not self.read_only:
            await self.committer.settle()
            if repair_leaks or repair_errors:
                self._stop_writing(f"{self.path}: repaired since it was opened, open it anew")
        return await check_qcow2(self, repair_leaks=repair_leaks, repair_errors=repair_errors)

    # --- stored bitmaps --------------------------------------------------------------------------------------------

    async def stored_bitmaps(self) -> Sequence[BitmapInfo] | None:
        """Those of the bitmaps extension, which version 3 has."""
        if self.header.version < 3:
            return None
        entries = await read_bitmap_directory(self.storage, self.header)
        return [BitmapInfo(entry.name, entry.granularity, entry.in_use, entry.auto) for entry in entries]

    async def stored_bitmap(self, name: str) -> DirtyBitmap | None:
        """One of these."""
        bitmap = await read_stored_bitmap(self.storage, self.header, name)
        if bitmap is not None:
            bitmap.read_only = self.read_only
        return bitmap

    async def check_new_bitmap(self, bitmap: DirtyBitmap) -> None:
        """Version 2 has none, and QEMU's limits are kept."""
        await bitmap_changes.check_new_bitmap(self, bitmap)

    async def store_bitmaps(self, changes: Mapping[str, DirtyBitmap | None]) -> None:
        """In one step; what else there is stays where it is."""
        await bitmap_changes.store_bitmaps(self, changes)

    # --- tables and free clusters ----------------------------------------------------------------------------------

    async def load(self, offset: int) -> None:
        """Bring the L2 table of ``offset`` into memory; if it is there already, make room, for that was missing.

        Not before: who reads must not fail because nothing can be written.
        """
        l1_index = offset >> self._l1_shift
        if self.l1.entries[l1_index] and self.cache.find(l1_index) is None:
            task = self._loading.get(l1_index)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._load_table(l1_index))
                self._loading[l1_index] = task
                task.add_done_callback(lambda _: self._loading.pop(l1_index, None))
            await asyncio.shield(task)
        elif self._starved:
            await self._make_room()

    async def _load_table(self, l1_index: int) -> None:
        cache, host_offset = self.cache, self.l2_offset(l1_index)
        words = decode_words(await self.storage.read(host_offset, self.cluster_size))
        if cache.find(l1_index) is None:  # which may be another by now: then this is a table that was replaced
            cache.create(l1_index, host_offset, words)

    def l2_offset(self, l1_index: int) -> int:
        """Host offset of an L2 table; 0 when there is none. RequestError(EIO) when the L1 entry is invalid."""
        entry = self.l1.entries[l1_index]
        host_offset = entry & OFFSET_MASK
        if entry and (
            entry & layout.L1_RESERVED or host_offset & self._cluster_mask or not 0 < host_offset < self.storage.size
        ):
            problem = f"{self.path}: invalid L1 entry {entry:#x} at index {l1_index}"
            raise RequestError(errno.EIO, self._broken or problem)
        return host_offset

    def data_place(self, host_offset: int, guest_offset: int) -> int:
        """Where ``data`` has the guest bytes that are at ``host_offset`` of the file."""
        return host_offset

    def _take(self, wanted: int) -> tuple[int, int] | None:
        taken = self.allocator.take(wanted)
        self._starved = taken is None
        if taken is not None and not self.external:
            end = (taken[0] + taken[1]) << self._bits
            if end > self.host_limit:
                self.host_limit = end
        return taken

    def _writable_table(self, offset: int) -> L2Table | None:
        """The L2 table of ``offset`` as this image's own: made if there is none, copied if a snapshot shares it."""
        if self._broken:
            raise RequestError(errno.EIO, self._broken)
        if self.is_crowded():
            self._starved = True
            return None
        l1_index = offset >> self._l1_shift
        table = self._recent.get(l1_index) or self.cache.find(l1_index)
        entry = self.l1.entries[l1_index]
        if table is not None and entry & COPIED:
            return table
        if table is None and entry:
            return None
        taken = self._take(1)
        if taken is None:
            return None
        host_offset = taken[0] << self._bits
        if table is None:
            table = self.cache.create(l1_index, host_offset, np.zeros(self.cluster_size // 8, np.uint64))
        else:
            self.allocator.retire_metadata((table.host_offset >> self._bits, 1))
        self.allocator.metadata.add(taken[0])
        table.relocate(host_offset)
        self.l1.store(l1_index, host_offset | COPIED)
        return table

    async def prepare(self, offset: int, length: int) -> None:
        """The L2 table in memory, free clusters at hand, and not too many changes waiting."""
        await self._make_room()
        await self.load(offset)

    def is_crowded(self) -> bool:
        """So much waits for a commit that one should be made before more is changed."""
        return self.cache.crowded or len(self.allocator.quarantine) > MAX_QUARANTINE

    async def _make_room(self) -> None:
        if self.is_crowded():
            await self.committer.commit()
        await self.allocator.ready()
        self._starved = False

    # --- size ------------------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """RequestError where nothing can be changed."""
        if self._broken:
            raise RequestError(errno.EIO, self._broken)
        if self.read_only:
            raise RequestError(errno.EPERM, f"{self.path}: the image is open read-only")

    @asynccontextmanager
    async def replaced_tables(self) -> AsyncIterator[None]:
        """Inside, somebody changes the tables on disk; nothing waits in memory, and afterwards they are read anew."""
        if not self.read_only or self._broken:
            self.check_writable()
            await self.committer.settle()
        try:
            yield
        finally:
            await self.reload()

    async def reload(self) -> None:
        """Take everything from the disk anew, where the tables were replaced. Nothing in memory was to be written.

        If that fails the image is neither read nor written any more: the tables known so far may be free space by now.
        """
        known = self.l1
        try:
            header, sector = await read_header(self.storage)
            self.snapshots, table_bytes = await read_snapshots(self.storage, header)
            words = decode_words(await self.storage.read(header.l1_offset, header.l1_entries * 8))
            self.header, self.size, self.l1 = header, header.size, Table(header.l1_offset, words)
            self.cache = L2Cache(header.cluster_size)
            self._recent = self.cache.recent
            self._compressed = CompressedClusters(self.storage, header.cluster_bits, header.compression_type)
            self.zeroes_fast = header.version >= 3 and not header.data_file_raw
            if _reference(header) != self.backing:
                self.backing = _reference(header)
                self.has_backing = self.has_backing or self.backing is not None
                self.backing_end = 1 << 63 if self.has_backing else 0
            if not self.external:
                self.host_limit = self.storage.size
            if not self.read_only:
                await self._open_writable(sector, table_bytes)
        except BaseException as error:
            self._stop_writing(f"{self.path}: its tables were replaced, and cannot be read: {error}")
            if self.l1 is known:
                self.l1 = Table(known.host_offset, np.full(len(known.entries), layout.L1_RESERVED, np.uint64))
                self.cache = L2Cache(self.cluster_size)
                self._recent = self.cache.recent
            raise

    def put_l1(self, table: Table) -> None:
        """From now on this is the L1 table; the header follows."""
        self.l1 = self.committer.l1 = table

    async def patch_header(self, at: int, value: bytes) -> None:
        """Change the header's first sector, durably. After a failure nobody knows what it is, and nothing is changed.

        ``header`` is the caller's to replace.
        """
        try:
            await self.header_sector.patch(at, value)
        except BaseException as error:
            self._stop_writing(f"{self.path}: the header could not be written: {error}")
            raise

    async def replace_header(self, header: Header) -> None:
        """Turn the header into ``header``: ConfigError as of ``change_header``, other errors as of ``patch_header``."""
        try:
            await change_header(self.storage, self.header_sector, self.header, header)
        except ConfigError:
            raise
        except BaseException as error:
            self._stop_writing(f"{self.path}: the header could not be written: {error}")
            raise
        self.header = header

    async def cut_data_file(self, size: int) -> None:
        """Make the external data file shorter."""
        await self.data_file.truncate(size)
        await self.data_file.flush()
        self._data_virgin = min(self._data_virgin, align_up(size, self.cluster_size))

    # --- stability -------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Commit everything published so far; see ``commit``."""
        if not self.read_only or self._broken:
            await self.committer.commit()

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """Name another backing file in the header."""
        await self.flush()
        await set_backing(self, reference)

    def _corruption(self, problem: str) -> NoReturn:
        """The image contradicts itself in a way that writing would make worse: mark it corrupt, write no more."""
        if not self._broken:
            self._stop_writing(f"{self.path}: {problem}; the image is corrupt and can only be read from now on")
            if self.header.version >= 3:
                value = self.header_sector.read_u64(layout.INCOMPATIBLE_AT) | layout.INCOMPATIBLE_CORRUPT
                patch = self.header_sector.patch(layout.INCOMPATIBLE_AT, value.to_bytes(8, "big"))
                self._marking = asyncio.get_running_loop().create_task(patch)
        raise RequestError(errno.EIO, self._broken)

    def _stop_writing(self, reason: str) -> None:
        self._broken = reason
        self.read_only = True
        self._form = 0  # no entry looks like one that may be overwritten

    async def close(self) -> None:
        """Write everything back, and close the storages whether that succeeded or not."""
        try:
            if not self.read_only or self._broken:
                await self.committer.settle()
            if self._marking is not None:
                await self._marking
        finally:
            await self.data.close()
            if self.storage is not self.data:
                await self.storage.close()
