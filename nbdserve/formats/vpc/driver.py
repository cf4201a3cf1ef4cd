"""The VHD driver: dynamic images here; ``open`` picks the class for fixed and differencing ones.

A block in the file is data, whatever its sector bitmap says, as with stock tools: where a dynamic image has a block,
sectors that were never written are zeroes there, too. What is written to has all bits of its bitmap set, for readers
that do look at it.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self, cast

import numpy as np

from nbdserve.errors import ConfigError, CorruptImageError, ImageError, RequestError
from nbdserve.extents import DATA, UNALLOCATED, Run, RunStream
from nbdserve.formats.base import Allocation, BackingReference, CheckResult, CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.tables import Table
from nbdserve.formats.vpc import image, layout
from nbdserve.formats.vpc.create import CREATE_OPTIONS, create_vpc, plan_image
from nbdserve.formats.vpc.image import BAD, REPAIR_HINT, Footers
from nbdserve.formats.vpc.layout import UNUSED, Footer
from nbdserve.formats.vpc.parent import name_no_parent, name_parent
from nbdserve.formats.vpc.reservations import Reservations
from nbdserve.formats.vpc.resize import resize_blocks, resized_footer
from nbdserve.formats.vpc.runs import iter_block_runs
from nbdserve.formats.vpc.space import BlockSpace
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE


class VpcDriver(FormatDriver):
    """One open dynamic image, and what the three types have in common."""

    name: ClassVar[str] = "vpc"
    create_options: ClassVar[tuple[CreateOption, ...]] = CREATE_OPTIONS
    backing_formats: ClassVar[tuple[str, ...] | None] = ("vpc",)
    needs_open_backing = True
    goes_on_as: ClassVar[tuple[int, ...]] = (layout.DYNAMIC,)
    """Types an image may be given while it is open; with another it is to be opened anew."""

    def __init__(self, storage: Storage, footers: Footers, footer: Footer) -> None:
        self.storage = self.data = storage
        self.path = storage.path
        self.footers = footers
        self.footer = footer
        self.read_only = True
        self.size = footer.size
        self._options: Mapping[str, Any] = {}

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image.

        One that is damaged can be read as far as it goes, and written once it is repaired.
        """
        from nbdserve.formats.vpc.differencing import DifferencingDriver  # noqa: PLC0415  (subclasses of this class)
        from nbdserve.formats.vpc.fixed import FixedDriver  # noqa: PLC0415

        footers = await image.read_footers(storage)
        footer = image.require_footer(footers, storage)
        if not read_only:
            if storage.read_only:
                raise ImageError(storage.path, "the file is open read-only")
            if not footer.sound:
                raise CorruptImageError(
                    storage.path, "it is wrong", field="footer checksum", value=footer.stored_checksum, hint=REPAIR_HINT
                )
        kinds: dict[int, type[VpcDriver]] = {layout.FIXED: FixedDriver, layout.DIFFERENCING: DifferencingDriver}
        driver = kinds.get(footer.disk_type, VpcDriver)(storage, footers, footer)
        driver._options = options
        await driver._open(options, read_only=read_only)
        return cast("Self", driver)

    async def _open(self, options: Mapping[str, Any], *, read_only: bool) -> None:
        """Read what the type of image has besides footers. ``options`` as for ``open``."""
        self.header = header = await image.read_header(self.storage, self.footer)
        self.table: Table = await image.read_table(self.storage, self.footer, header)
        self.cluster_size, self.granularity = header.block_size, SECTOR_SIZE
        self.zeroes_fast = self.keeps_places = True
        self._bits = header.block_size.bit_length() - 1
        self._mask = header.block_size - 1
        self._bitmap_size = header.bitmap_size
        self._entries = self.table.entries
        if not read_only:
            self._open_writable()

    def _open_writable(self) -> None:
        footer, header, words = self.footer, self.header, self.table.words
        image.refuse_writing(self.storage, footer, header, words)
        self.read_only = False
        self._space = BlockSpace(
            self.storage,
            footer.build(),
            image.used_end(footer, header, words),
            block_size=header.block_size,
            bitmap_size=header.bitmap_size,
        )
        self._reservations = Reservations(self.storage, self.table, self._space, self._begin_blocks)
        self._full = bytearray(len(words))
        """Per block: 1 when all bits of its bitmap are known to be set."""

    def accept_backing(self, backing: FormatDriver) -> None:
        raise ImageError(
            self.path,
            "only differencing images have a parent",
            field="disk type",
            value=self.footer.disk_type,
        )

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError for what cannot be."""
        plan_image(size, options)

    @classmethod
    def created_size(cls, size: int, options: Mapping[str, str]) -> int:
        """What the geometry covers, unless ``force_size`` is on or the image is a differencing one."""
        return plan_image(size, options).footer.size

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
        """Make ``storage`` an empty image; a differencing one needs its open parent, whose identity it takes."""
        parent = None
        if backing is not None:
            if not isinstance(backing, VpcDriver):
                raise ImageError(backing.path, "the parent of a VHD is a VHD", field="format", value=backing.name)
            parent = backing.footer
        await create_vpc(storage, size, options, parent=parent)

    def info(self) -> ImageInfo:
        return ImageInfo(self.name, self.size, self.cluster_size)

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Compare footers, header and table with each other and the file.

        What was written before is flushed first; after a repair the driver goes on with what is then in the file.
        """
        from nbdserve.formats.vpc.check import check_vpc  # noqa: PLC0415  (check works on drivers)

        if not self.read_only:
            await self.flush()
            await self._settle()
        self.footers = await image.read_footers(self.storage)
        result = await check_vpc(self, repair_leaks=repair_leaks, repair_errors=repair_errors)
        if result.corruptions_fixed or result.leaks_fixed:
            self.footers = await image.read_footers(self.storage)
            self.footer = image.require_footer(self.footers, self.storage)
            await self._open(self._options, read_only=self.read_only)
        return result

    # --- the mapping -----------------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run | None:
        """DATA where there is a block; EIO where the table shows one that is not inside the file."""
        index = offset >> self._bits
        entry = self._entries[index]
        inside = offset & self._mask
        rest = self._mask + 1 - inside
        if entry < BAD:
            return DATA, length if length < rest else rest, (entry << 9) + self._bitmap_size + inside
        return self._without_block(index, offset, length)

    def _without_block(self, index: int, offset: int, length: int) -> Run:
        entries, last = self._entries, offset + length - 1 >> self._bits
        if entries[index] == BAD:
            self.refuse_block(index)
        end = index + 1
        while end <= last and entries[end] == UNUSED:
            end += 1
        return UNALLOCATED, min(length, (end << self._bits) - offset), -1

    def refuse_block(self, index: int) -> NoReturn:
        """RequestError(EIO): the table shows a place outside the file."""
        raise RequestError(errno.EIO, f"{self.path}: block {index} is not inside the file")

    def iter_runs(self, start: int, end: int) -> RunStream:
        """The mapping of ``[start, end)``, some 65536 blocks at a time. RequestError(EIO) for a bad entry."""
        return iter_block_runs(self, start, end)

    # --- changing it -----------------------------------------------------------------------------------------------

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """A block is overwritten in place, once all bits of its bitmap are set."""
        index = offset >> self._bits
        if self._full[index]:
            inside = offset & self._mask
            rest = self._mask + 1 - inside
            return DATA, length if length < rest else rest, (self._entries[index] << 9) + self._bitmap_size + inside
        if self._entries[index] < BAD:
            return None
        return self._without_block(index, offset, length)

    async def load(self, offset: int) -> None:
        """Make sure that the bitmap of the block is full: what follows is a write.

        No order is needed: what is in the sectors is shown as data by all who do not look at bitmaps, us included, and
        is zeroes where nothing was written.
        """
        index = offset >> self._bits
        entry = self._entries[index]
        if self._full[index] or entry >= BAD:
            return
        full = b"\xff" * self._bitmap_size
        if bytes(await self.storage.read(entry << 9, self._bitmap_size)) != full:
            await self.storage.write(entry << 9, full)
        self._full[index] = 1

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """A part of the block that ``prepare`` has reserved; the rest of it is zeroes."""
        index = offset >> self._bits
        place = self._reservations.take(index)
        if place is None:
            return None
        inside = offset & self._mask
        length = min(length, self._mask + 1 - inside)
        return Allocation(offset, length, place + self._bitmap_size + inside, zeroed=True, token=index)

    async def prepare(self, offset: int, length: int) -> None:
        """Reserve the blocks of the range."""
        last = min(offset + length, self.size) - 1
        await self._reservations.reserve(range(offset >> self._bits, (last >> self._bits) + 1))

    async def _begin_blocks(self, places: dict[int, int]) -> None:
        """Set all bits of the bitmaps of new blocks; like ``load``, in no order with the data."""
        full = b"\xff" * self._bitmap_size
        await self.storage.write_all([(place, full) for place in places.values()])

    def publish(self, allocation: Allocation) -> None:
        """The block is there, as it is on disk already."""
        self._reservations.publish(allocation.token)
        self._full[allocation.token] = 1

    def abandon(self, allocation: Allocation) -> None:
        """The place may hold some of the data."""
        self._reservations.give_back(allocation.token)

    async def resize(self, size: int) -> None:
        """Grow the image; ConfigError for what cannot be."""
        larger = resized_footer(self.footer, size)
        await self.flush()
        await self._settle()
        await self._resize(larger)
        self.footers = await image.read_footers(self.storage)
        self.footer = image.require_footer(self.footers, self.storage)
        self.size = self.footer.size
        await self._open(self._options, read_only=False)

    async def _resize(self, larger: Footer) -> None:
        await resize_blocks(self, self._space, larger)

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """Name another parent, by its file and its identity, or none: the image is a dynamic one then.

        A crash leaves the old parent or the new one. A dynamic image that gets one is to be opened anew.
        """
        footer, header, words = self.footer, self.header, self.table.words
        if reference is None:
            await self.flush()
            if footer.disk_type != layout.DIFFERENCING:
                return
            await self._settle()
            await self._space.tidy()
            await name_no_parent(self.storage, self._space, footer, header, words)
        else:
            if not isinstance(backing, VpcDriver):
                raise ConfigError(f"{self.path}: the parent of a VHD is one, too, and has to be opened")
            await self.flush()
            await self._settle()
            if footer.disk_type != layout.DIFFERENCING:
                await self._fill_bitmaps()
            await self._space.tidy()
            name, parent = reference.name, backing.footer
            await name_parent(self.storage, self._space, footer, header, words, name=name, parent=parent)
        self.footers = await image.read_footers(self.storage)
        self.footer = image.require_footer(self.footers, self.storage)
        self.backing = None if reference is None else BackingReference(reference.name, self.name)
        await self._open(self._options, read_only=False)
        await self._space.tidy()
        self.read_only = self.footer.disk_type not in self.goes_on_as

    async def _fill_bitmaps(self) -> None:
        """All sectors of the blocks are here: as before, now also for those who look at the bits. Stable on return."""
        for index in np.flatnonzero(self.table.words < BAD).tolist():
            await self.load(index << self._bits)
        await self.storage.flush()

    async def flush(self) -> None:
        """Guest data, and bits that were set: the table was stable before anything was in a block."""
        await self.storage.flush()

    async def _settle(self) -> None:
        """The table on disk is the one in memory, and the file ends with the footer behind the last block."""
        await self._reservations.settle()
        await self._reservations.withdraw()
        if self._space.is_open:
            self._space.end = image.used_end(self.footer, self.header, self.table.words)
            await self._space.tidy()

    async def close(self) -> None:
        """Flush, give back what was reserved for nothing, and release the file."""
        try:
            if not self.read_only:
                await self.flush()
                await self._settle()
        finally:
            await self.storage.close()
