"""raw-cow: a raw file as a copy-on-write layer, with its bitmap in a file of its own.

Clusters whose bit is set are in the raw file, at the offset they have in the guest's disk; the others are the backing
file's. When every bit is set the raw file is the disk, and needs neither the backing file nor this image any more.
Beyond its end the raw file reads as zeroes; what it has past the end of the disk is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np

from nbdserve.errors import ConfigError, ImageError
from nbdserve.extents import DATA, UNALLOCATED, ZERO, Run, RunArray, RunStream
from nbdserve.formats.base import (
    Allocation,
    BackingReference,
    CheckResult,
    Companion,
    CreateOption,
    FormatDriver,
    ImageInfo,
)
from nbdserve.formats.ordered_commit import Batch, OrderedCommit, Piece
from nbdserve.formats.raw_cow import layout
from nbdserve.formats.raw_cow.bitmap import Bitmap
from nbdserve.formats.raw_cow.check import BackingSeen, check_raw_cow
from nbdserve.formats.raw_cow.create import CREATE_OPTIONS, create_raw_cow, plan_header
from nbdserve.formats.raw_cow.header import HeaderSector, read_header
from nbdserve.formats.raw_cow.layout import Header
from nbdserve.formats.raw_cow.resize import resize_raw_cow
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil

_BATCH_CLUSTERS = 1 << 19
"""Clusters decoded in one turn of the event loop."""


class RawCowDriver(FormatDriver):
    """One open raw-cow image."""

    name: ClassVar[str] = "raw-cow"
    create_options: ClassVar[tuple[CreateOption, ...]] = CREATE_OPTIONS
    backing_formats: ClassVar[tuple[str, ...] | None] = None
    keeps_companions: ClassVar[bool] = True
    takes_data_file: ClassVar[bool] = True

    def __init__(
        self, storage: Storage, data: Storage, header: Header, stored: bytes, bitmap: Bitmap, *, read_only: bool
    ) -> None:
        self.path, self.storage, self.data = storage.path, storage, data
        self.header = header
        self.bitmap = bitmap
        self.read_only = read_only
        self.size = header.size
        self.cluster_size = self.granularity = header.cluster_size
        # The guest's offset is the raw file's: a place never comes to hold other guest bytes.
        self.keeps_places = True
        if header.backing_file is not None:
            self.backing = BackingReference(header.backing_file, header.backing_format)
        self.stands_alone = not bitmap.missing
        self._backing_seen = BackingSeen()
        self._stored = bitmap.bits
        self._bits = header.cluster_size.bit_length() - 1
        self._virgin = data.size
        """Where the raw file has never held anything: space from here on reads as zeroes until it is allocated."""
        self._limit = header.backing_limit
        self._header_sector = HeaderSector(storage, stored)
        self._commit = OrderedCommit(storage, self._collect, data=[data])

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    async def companions(cls, storage: Storage) -> Sequence[Companion]:
        """The raw file."""
        header, _ = await read_header(storage, any_checksum=True)  # ``open`` says whether it has to be right
        return [Companion(header.raw_file, "raw file", guest_data_only=True)]

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image; a raw file shorter than the disk grows to its size when the image is opened for writing.

        A look at the metadata alone is possible with a damaged header, so that ``check`` can repair its checksum.
        """
        companions: Sequence[Storage] = options.get("companions", ())
        metadata_only = read_only and bool(options.get("metadata_only", False))
        header, stored = await read_header(storage, any_checksum=metadata_only)
        if len(companions) != 1:
            raise ImageError(storage.path, "the raw file is not given", field="raw_file", value=header.raw_file)
        if not read_only and storage.read_only:
            raise ImageError(storage.path, "the file is open read-only")
        bits = await storage.read(header.bitmap_offset, header.end_offset - header.bitmap_offset)
        bitmap = Bitmap(header.bitmap_offset, header.clusters, bits)
        driver = cls(storage, companions[0], header, stored, bitmap, read_only=read_only)
        if not read_only:
            if header.autoclear & ~layout.AUTOCLEAR_KNOWN:
                # What an unknown bit stands for is not kept up to date here, so others must not trust it.
                await driver._header_sector.patch(autoclear_features=header.autoclear & layout.AUTOCLEAR_KNOWN)
            if driver.data.size < header.size:
                await driver.data.truncate(header.size)
        return driver

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError for a bad option, a name that is too long, and a disk too large for its clusters."""
        cls.check_option_names(options)
        plan_header(size, options)

    @classmethod
    def created_size(cls, size: int, options: Mapping[str, str]) -> int:
        """Whole sectors."""
        return align_up(size, SECTOR_SIZE)

    @classmethod
    def created_companions(cls, path: str, size: int, options: Mapping[str, str]) -> Sequence[str]:
        """The raw file."""
        return [options["raw_file"]]

    @classmethod
    async def create(
        cls,
        storage: Storage,
        size: int,
        options: Mapping[str, str],
        *,
        companions: Sequence[Storage] = (),
        backing: FormatDriver | None = None,
        secret: bytes | None = None,
    ) -> None:
        """Make ``storage`` an image with no bit set; the raw file keeps what it holds."""
        await create_raw_cow(storage, companions[0], size, options, backing=backing)

    def info(self) -> ImageInfo:
        """The facts of this layer; ``stands-alone`` when the raw file is all that is needed."""
        header = self.header
        specific: dict[str, Any] = {
            "raw-file": header.raw_file,
            "raw-file-format": header.raw_format,
            "raw-file-clusters": self.bitmap.clusters - self.bitmap.missing,
            "clusters": self.bitmap.clusters,
            "raw-file-stands-alone": not self.bitmap.missing,
        }
        if not self.bitmap.missing:
            specific["advice"] = (
                f"{header.raw_file} is the whole disk, in format raw: "
                "this image and its backing file are no longer needed"
            )
        return ImageInfo(self.name, self.size, self.cluster_size, backing=self.backing, specific=specific)

    # --- reading the mapping ---------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run:
        """DATA where the bit is set; else UNALLOCATED, and ZERO where the backing file is not visible."""
        index = offset >> self._bits
        last = offset + length - 1 >> self._bits
        if index != last:
            bitmap = self.bitmap
            length = min(length, (bitmap.run_end(index, last + 1) << self._bits) - offset) if bitmap.missing else length
        if self._stored[index >> 3] >> (index & 7) & 1:
            return DATA, length, offset
        if offset + length > self._limit:
            if offset >= self._limit:
                return ZERO, length, -1
            length = self._limit - offset
        return UNALLOCATED, length, -1

    def lookup_writable(self, offset: int, length: int) -> Run:
        """What is in the raw file is overwritten there."""
        index = offset >> self._bits
        last = offset + length - 1 >> self._bits
        if index != last:
            bitmap = self.bitmap
            length = min(length, (bitmap.run_end(index, last + 1) << self._bits) - offset) if bitmap.missing else length
        if self._stored[index >> 3] >> (index & 7) & 1:
            return DATA, length, offset
        return UNALLOCATED, length, -1

    async def iter_runs(self, start: int, end: int) -> RunStream:
        """The mapping of ``[start, end)``, half a million clusters at a time."""
        limit = self._limit
        if limit < self.size and self.lookup_writable(limit, 1)[0] == DATA:
            limit = align_up(limit, self.cluster_size)  # not inside a run of data
        while start < end:
            first = start >> self._bits
            part = min(end, limit) if start < limit else end
            stop = min(first + _BATCH_CLUSTERS, div_ceil(part, self.cluster_size))
            bits = self.bitmap.array(first, stop)
            changes = np.flatnonzero(np.diff(bits)) + 1
            starts = np.concatenate(([start], (first + changes) << self._bits)).astype(np.int64)
            until = min(part, stop << self._bits)
            kinds = bits[np.concatenate(([0], changes))]
            kind = np.where(kinds, np.uint8(DATA), np.uint8(UNALLOCATED if start < limit else ZERO))
            yield RunArray(starts, np.diff(np.append(starts, until)), kind, np.where(kinds, starts, -1))
            start = until

    # --- changing it -----------------------------------------------------------------------------------------------

    def allocate(self, offset: int, length: int) -> Allocation:
        """The same place in the raw file, up to the end of the disk: what the raw file has behind it is not ours."""
        length = min(length, self.size - offset)
        zeroed = offset >= self._virgin and self.data.grows_zeroed
        self._virgin = max(self._virgin, offset + length)
        return Allocation(offset, length, offset, zeroed)

    def publish(self, allocation: Allocation) -> None:
        """Set the bits."""
        first = allocation.offset >> self._bits
        self.bitmap.set(first, first + div_ceil(allocation.length, self.cluster_size))

    def abandon(self, allocation: Allocation) -> None:
        """Nothing shows what was written."""

    async def flush(self) -> None:
        """The raw file, then the bits of what is in it."""
        await self._commit.commit()

    def _collect(self, batch: Batch) -> None:
        batch.stage(self._barrier_bits).add_dirty(self.bitmap)

    async def _barrier_bits(self, pieces: list[Piece]) -> None:
        """Bits appear, in any order, after the data they show is stable; at the end all of them are.

        Crash before the barrier: a bit is old or new. Where it is old the backing file shows what the guest had before
        its unflushed write; where it is new the whole cluster is in the raw file, copied parts too. Bits are never
        cleared, so nothing can come back.
        """
        await self.storage.write_stable(pieces)

    async def resize(self, size: int) -> None:
        """Change the size, in bytes, of an idle image; new space reads as zeroes. ConfigError for an impossible one.

        At each point the header names a bitmap that is complete: it grows before the header does, and shrinks after.
        """
        await self._commit.settle()
        self.header = await resize_raw_cow(self.storage, self.data, self._header_sector, self.header, self.bitmap, size)
        self.size, self._limit = size, self.header.backing_limit

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """Name another backing file.

        Its name fills more than a sector: a crash may leave a header with parts of both and a checksum that is wrong.
        Nothing opens that; ``image check -r all`` takes it as it is, ``image rebase -u`` then says what is right.
        """
        await self._commit.settle()
        name, format_name = (None, None) if reference is None else (reference.name or None, reference.format)
        header = replace(self.header, backing_file=name, backing_format=format_name, mtime=0)
        try:
            header.build()
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        await self._header_sector.replace(header)
        self.header, self.backing = header, reference

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Compare the bitmap with the file and, where the raw file is open, with its size.

        Where ``see_backing`` was called, the backing file is compared with what the image remembers of it.
        """
        if not self.read_only:
            await self._commit.settle()
        return await check_raw_cow(
            self.storage,
            None if self.data is self.storage else self.data,
            self.header,
            self._header_sector,
            self.bitmap,
            self._backing_seen,
            repair_leaks=repair_leaks,
            repair_errors=repair_errors,
        )

    def see_backing(self, changed_at: float | None, problem: str) -> None:
        """To be compared by ``check``."""
        self._backing_seen = BackingSeen(changed_at, problem)

    async def close(self) -> None:
        """Write the bits, and close both files whether that succeeded or not."""
        try:
            if not self.read_only:
                await self._commit.settle()
        finally:
            try:
                await self.data.close()
            finally:
                await self.storage.close()
