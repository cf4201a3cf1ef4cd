"""The QED driver (QEMU docs/interop/qed_spec.rst): two levels of tables, and clusters that read as zeroes.

**need_check.** Every cluster that no entry refers to is a leak, so the header says ``need check`` from before the first
change of the mapping until the image is closed. An image that says so is checked when it is next opened to be written:
errors are repaired at once, and what was leaked is used for new clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final, Self

import numpy as np

from nbdserve.errors import ConfigError, CorruptImageError, ImageError
from nbdserve.extents import DATA, UNALLOCATED
from nbdserve.formats.base import BackingReference, CheckResult, CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.qed import layout
from nbdserve.formats.qed.check import Analysis, analyse, check_qed
from nbdserve.formats.qed.create import CREATE_OPTIONS, create_qed, parse_options, plan_header
from nbdserve.formats.qed.layout import Header
from nbdserve.formats.tables import Table, Words
from nbdserve.formats.two_level.driver import TwoLevelDriver
from nbdserve.formats.two_level.entries import BAD_ENTRY, ZERO_ENTRY, are_data, count_before
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, SECTOR_SIZE, align_up

MAX_MOVED_AT_CLOSE: Final = 64 * MIB
"""What closing the gaps may copy."""

ZEROED_AT_ONCE: Final = 64 * MIB
"""How much of the guest's disk over a backing file is zeroed in one turn of the event loop."""


async def read_header(storage: Storage) -> tuple[Header, bytes]:
    """The header of the image on ``storage``, and its first sector as stored. ImageError."""
    sector = bytes(await storage.read(0, min(SECTOR_SIZE, storage.size)))
    header = Header.parse(sector, storage.path, storage.size)
    place = layout.backing_name_range(sector, header, storage.path)
    if place is not None:
        header = header.with_backing_name(bytes(await storage.read(*place)))
    return header, sector


class QedDriver(TwoLevelDriver):
    """One open QED image."""

    name = "qed"
    create_options: ClassVar[tuple[CreateOption, ...]] = CREATE_OPTIONS
    stored = "<u8"

    def __init__(self, storage: Storage, header: Header, sector: bytes, l1: Table, options: Mapping[str, Any]) -> None:
        name = header.backing_name
        backing = None if name is None else BackingReference(name, header.backing_format)
        super().__init__(storage, header.geometry, l1, backing, options)
        self.header = header
        self._sector = bytearray(sector)
        self.zeroes_fast = True

    # --- opening and closing -----------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image. One that was not closed by its last writer is repaired first, unless ``read_only``."""
        header, sector = await read_header(storage)
        if not read_only and storage.read_only:
            raise ImageError(storage.path, "the file is open read-only")
        found = None
        if not read_only and header.features & layout.FEATURE_NEED_CHECK:
            found = await cls._look_at(storage, header, sector)
        l1 = await cls._read_l1(storage, header.l1_table_offset, header.l1_used)
        driver = cls(storage, header, sector, l1, options)
        size = header.cluster_size
        if not read_only:
            await driver._open_writable(None if found is None else found.used_end)
            if found is not None:
                driver._unclosed = True
                await driver._space.release([(first * size, count * size) for first, count in found.inner_holes])
            # What autoclear features stand for is not known, so no write may pass them by.
            driver._held = header.autoclear_features != 0
        return driver

    @staticmethod
    async def _look_at(storage: Storage, header: Header, sector: bytes) -> Analysis:
        """Check an image that was not closed. Errors are repaired, leaks are left to be used and cut off later."""
        found = await analyse(storage, header)
        if found.result.corruptions:
            result = await check_qed(storage, header, sector, repair_errors=True, all_or_nothing=True)
            if result.corruptions:
                raise CorruptImageError(
                    storage.path,
                    f"not closed cleanly, and {result.corruptions} errors remain",
                    field="features",
                    value=header.features,
                    hint="it can be read; image check -r all",
                )
            found = await analyse(storage, header)
        return found

    async def _before_first_change(self) -> None:
        """Set ``need check``, clear unknown features. Stable before anything is taken at the end of the file.

        Crash before: nothing has changed. After: whoever opens the image to write it looks for leaks first.
        """
        self._sector[layout.AUTOCLEAR_AT : layout.AUTOCLEAR_AT + 8] = bytes(8)
        await self._patch(layout.FEATURES_AT, self.header.features | layout.FEATURE_NEED_CHECK)

    async def _after_last_change(self) -> None:
        """Clear ``need check``: every table is stable, and the file ends with its last cluster in use.

        Gaps are closed first: those that a writer before left and this one did not fill, and those of writes that were
        cancelled or failed while others took the space behind theirs.
        """
        if self._space.free_ranges:
            header, sector = await read_header(self.storage)
            await check_qed(self.storage, header, sector, repair_leaks=True, most_moved=MAX_MOVED_AT_CLOSE)
        await self._patch(layout.FEATURES_AT, self.header.features & ~layout.FEATURE_NEED_CHECK)

    async def _patch(self, at: int, value: int) -> None:
        """Change 8 bytes of the first sector, which a disk does not tear. Stable on return."""
        self._sector[at : at + 8] = value.to_bytes(8, "little")
        await self.storage.write_stable([(0, bytes(self._sector))])

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """Name another backing file; the header can say of its format that it is raw, or that it is not.

        The first sector decides. A name that does not fit in it is stable first, where no name is.
        """
        await self.flush()
        name = b"" if reference is None else reference.name.encode("utf-8", "surrogateescape")
        room = self.header.header_size * self.cluster_size
        start = layout.HEADER_LENGTH
        if start + len(name) > SECTOR_SIZE:
            old = layout.backing_name_range(self._sector, self.header, self.path) or (0, 0)
            start = SECTOR_SIZE
            if start < sum(old) and old[0] < start + len(name):
                start = align_up(sum(old), 8)
        if len(name) > layout.MAX_BACKING_NAME or start + len(name) > room:
            raise ConfigError(f"{self.path}: a backing file name of {len(name)} bytes does not fit into the header")
        flags = layout.FEATURE_BACKING | layout.FEATURE_RAW_BACKING
        features = self.header.features & ~flags
        if reference is not None:
            features |= flags if reference.format == "raw" else layout.FEATURE_BACKING
        if start >= SECTOR_SIZE:
            await self.storage.write_stable([(start, name)])
        else:
            self._sector[start : start + len(name)] = name
        place = (start if name else 0).to_bytes(4, "little") + len(name).to_bytes(4, "little")
        self._sector[layout.BACKING_NAME_AT : layout.BACKING_NAME_AT + 8] = place
        stored = int.from_bytes(self._sector[layout.FEATURES_AT : layout.FEATURES_AT + 8], "little")
        await self._patch(layout.FEATURES_AT, stored & ~flags | features)
        self.header = replace(
            self.header, features=features, backing_name=name.decode("utf-8", "surrogateescape") or None
        )
        self.backing = None if reference is None else BackingReference(reference.name, self.header.backing_format)
        self.has_backing = reference is not None

    # --- making one --------------------------------------------------------------------------------------------------

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError for a bad option, and for a disk that is too large for the tables."""
        cls.check_option_names(options)
        plan_header(size, parse_options(options))

    @classmethod
    async def create(cls, storage: Storage, size: int, options: Mapping[str, str], **resources: Any) -> None:
        """Make ``storage`` an empty image of ``size`` bytes."""
        await create_qed(storage, size, options)

    # --- facts -------------------------------------------------------------------------------------------------------

    def info(self) -> ImageInfo:
        """The facts of this layer."""
        return ImageInfo(
            format=self.name,
            virtual_size=self.size,
            cluster_size=self.cluster_size,
            backing=self.backing,
            dirty=bool(self._sector[layout.FEATURES_AT] & layout.FEATURE_NEED_CHECK),
        )

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Follow every entry. What was written before is flushed first; after a repair, open the image anew."""
        await self._settle_for_check(repair=repair_leaks or repair_errors)
        header, sector = await read_header(self.storage)
        return await check_qed(
            self.storage,
            header,
            sector,
            repair_leaks=repair_leaks,
            repair_errors=repair_errors,
            open_end=None if self.read_only else self._space.end,
        )

    # --- the mapping -------------------------------------------------------------------------------------------------

    def _valid(self, words: Words) -> Words:
        """0, ZERO_ENTRY and the places of data clusters are valid."""
        checked = np.where(self._is_place(words), words, np.uint64(BAD_ENTRY))
        special = words <= ZERO_ENTRY
        checked[special] = words[special]
        return checked

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Data clusters are left to be zeroed where they are: to unmap one would make a leak of it.

        Over a backing file the others become data clusters too, in space that reads as zeroes and was never written. An
        entry of ZERO_ENTRY would say the same, but QEMU fills the rest of such a cluster from the backing file when it
        writes a part of it.
        """
        if not self.has_backing:
            return self._zero_alone(offset, length)
        length = min(length, max(ZEROED_AT_ONCE, self.cluster_size))
        table = self._writable_slice(offset)
        if table is None:
            return None
        first, words = self._words_at(table, offset, length)
        absent = np.flatnonzero(words == 0)
        if self.flags_zeroes and len(absent):
            words[absent] = ZERO_ENTRY
            table.touch(first + int(absent[0]), first + int(absent[-1]) + 1)
            absent = absent[:0]
        if self._space.free_ranges:
            absent = absent[:0]  # the space of writes that failed holds junk: it is for those who fill it
        if not self._has_room(len(absent) << self._bits):
            return None
        data = are_data(words)
        if len(absent):
            host_offset, count, zeroed = self._space.take(len(absent))
            if zeroed:
                places = np.arange(count, dtype=np.uint64) << np.uint64(self._bits)
                words[absent[:count]] = places + np.uint64(host_offset)
                table.touch(first + int(absent[0]), first + int(absent[count - 1]) + 1)
            else:
                self._space.end = host_offset  # they were the last ones: given back
        data |= words == 0
        return min(length, count_before(data) << self._bits)

    async def resize(self, size: int) -> None:
        """Grow the disk; the tables have their full size from the start, so that only the header changes.

        ConfigError for a size that is smaller, no multiple of 512 or too large for the tables; and for an image with a
        backing file that shows in the last cluster, and only in a part of it.
        """
        header = replace(self.header, image_size=size)
        if size < self.size or size % SECTOR_SIZE or size > header.max_image_size:
            raise ConfigError(
                f"{self.path}: {size} bytes: must be a multiple of 512 from {self.size} to {header.max_image_size}"
            )
        await self._commit.settle()
        self.l1 = await self._read_l1(self.storage, header.l1_table_offset, header.l1_used)
        await self._clear(self.size, size)
        await self._commit.settle()
        # Until here the disk has its old size; what is in the tables past its end is zeroes already.
        await self._patch(layout.IMAGE_SIZE_AT, size)
        self.header, self.geometry, self.size = header, header.geometry, size

    async def _clear(self, start: int, end: int) -> None:
        """Make ``[start, end)``, past the end of the disk, read as zeroes when the disk has it."""
        async for runs in self.iter_runs(start, end):
            for at, length, kind, host_offset in zip(
                runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), runs.host_offset.tolist(), strict=True
            ):
                if kind == DATA:
                    await self.data.zero(host_offset, length)
                elif kind == UNALLOCATED and self.has_backing:
                    await self._cover(at, at + length)

    async def _cover(self, start: int, end: int) -> None:
        """Put zeroed clusters over the backing file, which has not ended where the disk did."""
        if start & self._cluster_mask:
            raise ConfigError(
                f"{self.path}: the last {start & self._cluster_mask} bytes are those of the backing file, which may "
                "show behind them: write them first, then grow the disk"
            )
        while start < end:
            done = self.zero(start, end - start, unmap=False)
            if done is None:
                await self.load(start)
            elif done:
                start += done
            elif (allocation := self.allocate(start, self.cluster_size)) is None:
                await self.prepare(start, self.cluster_size)
            else:
                await self.data.zero(allocation.host_offset, self.cluster_size)
                self.publish(allocation)
                start += allocation.length
