"""An open VHDX image, apart from what its block allocation table says: opening, tables, the log, closing."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final, Self
from uuid import uuid4

from nbdserve.errors import ImageError, RequestError
from nbdserve.formats.append_space import UNBOUNDED, AppendSpace
from nbdserve.formats.base import BackingReference, CheckResult, CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.ordered_commit import Batch, OrderedCommit, Stage
from nbdserve.formats.tables import L2Cache, L2Table, Piece, StoredForm, decode_table
from nbdserve.formats.vhdx.bat_scan import end_of_blocks
from nbdserve.formats.vhdx.create import CREATE_OPTIONS, create_vhdx, plan_image
from nbdserve.formats.vhdx.layout import NO_GUID
from nbdserve.formats.vhdx.log import PAGE
from nbdserve.formats.vhdx.log_writer import LogWriter
from nbdserve.formats.vhdx.replay import write_replayed
from nbdserve.formats.vhdx.structure import HeaderWriter, Structure, read_structure, refuse_writing
from nbdserve.storage.base import Storage
from nbdserve.units import KIB, MIB, SECTOR_SIZE, align_up

TABLE_BYTES: Final = 64 * KIB
"""The part of the BAT, or of a sector bitmap, that is read and cached at once."""
TABLE_ENTRY_BITS: Final = 13
"""log2 of the BAT entries in it."""
STORED: Final[StoredForm] = "<u8"
_SECTORS_PER_PAGE_BITS: Final = 3


class VhdxImage(FormatDriver):
    """The parts of an open image that do not depend on what BAT entries mean."""

    name: ClassVar[str] = "vhdx"
    create_options: ClassVar[tuple[CreateOption, ...]] = CREATE_OPTIONS
    needs_open_backing = True
    backing_formats: ClassVar[tuple[str, ...] | None] = ("vhdx",)

    def __init__(self, storage: Storage, structure: Structure, options: Mapping[str, Any]) -> None:
        parameters = structure.parameters
        self.storage, self.path = storage, storage.path
        self.data = structure.overlay or storage
        self.structure = structure
        self.read_only = True
        self.size = parameters.size
        self.cluster_size = self.granularity = parameters.block_size
        if structure.locator is not None:
            self.backing = BackingReference(structure.locator.name, self.name)
        self.has_backing = self.backing is not None or bool(options.get("has_backing", False))
        """Something below may show where this layer does not decide."""
        self.zeroes_fast = True
        self._forget_tables()
        self._loading: dict[tuple[int, int], asyncio.Task[None]] = {}
        # Everything lookup needs is one attribute away.
        self._block_bits = parameters.block_size.bit_length() - 1
        self._block_mask = parameters.block_size - 1
        self._ratio_bits = parameters.chunk_ratio.bit_length() - 1
        self.host_limit = self.data.size
        """Host offset before which the data of every block must be."""
        # Only of a writable image:
        self._begun = False
        """The headers say that the content is not what it was."""
        self._wants_begin = False
        self._wants_room = False
        """So many tables differ from the disk that they are to be written back before more do."""
        self._beginning: asyncio.Task[None] | None = None
        self._broken = ""
        """Why nothing may be changed any more."""

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image. A log that is to be replayed is: in memory only when ``read_only``.

        Options: ``discard``, where ``unmap`` punches freed blocks out of the file; ``has_backing`` when a layer is put
        below an image that names no parent.
        """
        structure = await read_structure(storage)
        driver = cls._class_for(structure)(storage, structure, options)
        if not read_only:
            await driver._open_writable(options)
        return driver

    @classmethod
    def _class_for(cls, structure: Structure) -> type[Self]:
        """The class that knows what the BAT entries of such an image mean."""
        return cls

    async def _open_writable(self, options: Mapping[str, Any]) -> None:
        refuse_writing(self.storage)
        structure = self.structure
        header = structure.header
        if not header.log_length:
            raise ImageError(self.path, "an image without a log can only be read", field="LogLength", value=0)
        end = await end_of_blocks(self.data, structure)
        headers = HeaderWriter(self.storage, header, structure.header_copy)
        if structure.overlay is not None:
            await write_replayed(structure.overlay)
        if header.log_guid != NO_GUID:
            await headers.update(file_write_guid=uuid4(), log_guid=NO_GUID)
        self.structure = replace(structure, overlay=None, header=headers.header)
        self.data = self.storage
        self.host_limit = self.storage.size
        self._headers = headers
        self._log = LogWriter(self.storage, headers)
        limit = UNBOUNDED if self.storage.grows_zeroed else self.storage.size
        self.space = AppendSpace(self.storage, MIB, end, limit=limit, punch=options.get("discard") == "unmap")
        self._commit = OrderedCommit(self.storage, self._collect)
        self.read_only = False

    def accept_backing(self, backing: FormatDriver) -> None:
        """The parent must be the image, in the state, that this one was made on."""
        locator = self.structure.locator
        if locator is None:
            return
        wanted = locator.linkages(self.path)
        shown = locator.values["parent_linkage"]
        if not isinstance(backing, VhdxImage):
            raise ImageError(
                self.path,
                f"the parent is a VHDX image, and {backing.path} is opened as {backing.name}",
                field="parent_linkage",
                value=shown,
            )
        found = backing.structure.header.data_write_guid
        if found not in wanted:
            raise ImageError(
                self.path,
                f"{backing.path} has the DataWriteGuid {found}: it is another image, or was written since",
                field="parent_linkage",
                value=shown,
            )

    # --- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError for every bad option or size."""
        cls.check_option_names(options)
        plan_image(size, options)

    @classmethod
    def created_size(cls, size: int, options: Mapping[str, str]) -> int:
        """Whole sectors."""
        return align_up(size, SECTOR_SIZE)

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
        """Make ``storage`` an empty image; ``backing`` is the open parent of a differencing one."""
        cls.check_option_names(options)
        await create_vhdx(storage, size, options, backing.structure if isinstance(backing, VhdxImage) else None)

    def info(self) -> ImageInfo:
        """The facts of this layer; qemu-img knows nothing that is particular to VHDX."""
        return ImageInfo(self.name, self.size, cluster_size=self.cluster_size, backing=self.backing)

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Judge headers, tables and blocks. What was written before is flushed first.

        Repairing replays the log and renews copies that are damaged; the image is to be opened anew after it.
        """
        from nbdserve.formats.vhdx.check import check_vhdx  # noqa: PLC0415  (check works on drivers)

        if not self.read_only:
            await self._commit.settle()
            if repair_leaks or repair_errors:
                await self._finish()
                self._stop_writing(f"{self.path}: repaired since it was opened, open it anew")
        return await check_vhdx(self, repair=repair_leaks or repair_errors)

    # --- tables ----------------------------------------------------------------------------------------------------

    def _forget_tables(self) -> None:
        """None is in memory, from now on."""
        self.bat = L2Cache(TABLE_BYTES, stored=STORED)
        """The BAT, in parts of TABLE_BYTES by number."""
        self._recent = self.bat.recent

    async def _load_table(self, cache: L2Cache, number: int, host_offset: int) -> None:
        """Bring a table into ``cache``; those who ask for the same one wait together."""
        if cache.find(number) is None:
            key = (id(cache), number)
            task = self._loading.get(key)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._read_table(cache, number, host_offset))
                self._loading[key] = task
                task.add_done_callback(lambda _: self._loading.pop(key, None))
            await asyncio.shield(task)

    async def _read_table(self, cache: L2Cache, number: int, host_offset: int) -> None:
        words = decode_table(await self.data.read(host_offset, TABLE_BYTES), STORED)
        if cache.find(number) is None:
            cache.create(number, host_offset, words)

    async def load_bat(self, index: int) -> L2Table:
        """The part of the BAT with entry ``index``."""
        number = index >> TABLE_ENTRY_BITS
        while (table := self.bat.find(number)) is None:
            await self._load_table(self.bat, number, self.structure.bat.offset + number * TABLE_BYTES)
        return table

    # --- writing ---------------------------------------------------------------------------------------------------

    def _may_change(self) -> bool:
        """Whether the mapping or the data may be changed now; if not, ``load`` sees to it."""
        if self._broken:
            raise RequestError(errno.EIO, self._broken)
        self._wants_begin = not self._begun
        self._wants_room = any(cache.crowded for cache in self._changed_tables())
        return self._begun and not self._wants_room

    async def _make_ready(self) -> None:
        """What ``_may_change`` has found missing."""
        if self._wants_begin:
            await self._begin()
        if self._wants_room:
            self._wants_room = False
            await self._commit.commit()

    async def _begin(self) -> None:
        """Before the first change: the identities of file and data change, so that no child takes this for its parent.

        Crash at any point: the headers have new identities, and the content is still the old.
        """
        self._wants_begin = False
        if not self._begun:
            if self._beginning is None or self._beginning.done():
                update = self._headers.update(file_write_guid=uuid4(), data_write_guid=uuid4())
                self._beginning = asyncio.get_running_loop().create_task(update)
            await asyncio.shield(self._beginning)
            self._begun = True
            self.structure = replace(self.structure, header=self._headers.header)

    def _changed_tables(self) -> list[L2Cache]:
        """The caches with what is to be logged, in the order in which a commit in several entries has to log it."""
        return [self.bat]

    def _collect(self, batch: Batch) -> None:
        stage = batch.stage(self._log.barrier_log)
        for cache in self._changed_tables():
            for table in cache.changed:
                table.pins += 1
                batch.finally_(table.unpin)
                self._collect_pages(stage, cache, table)
            cache.changed.clear()
        self._log.end = self.space.end
        batch.free(self.space)

    @staticmethod
    def _collect_pages(stage: Stage, cache: L2Cache, table: L2Table) -> None:
        sectors = frozenset(table.dirty)
        pieces: list[Piece] = []
        for page in sorted({sector >> _SECTORS_PER_PAGE_BITS for sector in sectors}):
            first = page << _SECTORS_PER_PAGE_BITS
            pieces += table.pieces(range(first, first + PAGE // 512))
        stage.add(pieces, partial(_undo, cache, table, sectors))
        table.dirty.clear()

    async def flush(self) -> None:
        """Everything published so far, and the data behind it, is stable on return."""
        if not self.read_only or self._broken:
            await self._commit.commit()

    def _stop_writing(self, reason: str) -> None:
        self._broken = reason
        self.read_only = True

    async def _finish(self) -> None:
        """Everything in its place, and the log empty."""
        await self._commit.settle()
        await self._log.close()
        if self.storage.size > self.space.end:
            await self.storage.truncate(self.space.end)  # freed blocks at the end

    async def close(self) -> None:
        """Write everything back, empty the log, and close the file whether that succeeded or not."""
        try:
            if not self.read_only:
                await self._finish()
        finally:
            await self.storage.close()


def _undo(cache: L2Cache, table: L2Table, sectors: frozenset[int]) -> None:
    table.dirty.update(sectors)
    cache.changed.add(table)
