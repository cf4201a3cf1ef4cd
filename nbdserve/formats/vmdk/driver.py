"""The VMDK driver (VMware Virtual Disk Format 5.0): extents side by side, the mapping of each its own."""

from __future__ import annotations

import asyncio
import errno
import secrets
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Self

from nbdserve.errors import ConfigError, CorruptImageError, ImageError, RequestError, UnsupportedImageError
from nbdserve.extents import Run, RunStream
from nbdserve.formats.base import Allocation, BackingReference, CheckResult, Companion, FormatDriver, ImageInfo
from nbdserve.formats.ordered_commit import Batch, OrderedCommit, Piece
from nbdserve.formats.tables import L2Cache
from nbdserve.formats.vmdk.compressed import CompressedGrains
from nbdserve.formats.vmdk.create import CREATE_OPTIONS, create_vmdk, created_names, parse_options
from nbdserve.formats.vmdk.descriptor import NO_PARENT, Descriptor, with_other_cid
from nbdserve.formats.vmdk.extents import Extent, FlatExtent, GrainTable, SparseExtent
from nbdserve.formats.vmdk.layout import UNCLEAN_AT
from nbdserve.formats.vmdk.parent import plan_parent
from nbdserve.formats.vmdk.runs import iter_runs
from nbdserve.formats.vmdk.source import Source, open_extents, read_redundant, read_source
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.storage.joined import JoinedStorage
from nbdserve.units import SECTOR_SIZE, align_up

MAX_QUARANTINE: Final = 1 << 16
"""Grains that wait for a commit to become free."""


class VmdkDriver(FormatDriver):
    """One open VMDK image."""

    name = "vmdk"
    create_options = CREATE_OPTIONS
    backing_formats = ("vmdk",)
    needs_open_backing = True

    def __init__(self, storage: Storage, data: Storage, source: Source, extents: list[Extent], cache: L2Cache) -> None:
        self.storage, self.data, self.path = storage, data, storage.path
        self.descriptor = source.descriptor
        self.extents = extents
        self.read_only = True
        self.size = extents[-1].start + extents[-1].size
        self.sparse = [extent for extent in extents if isinstance(extent, SparseExtent)]
        self.cluster_size = max((extent.header.grain_size for extent in self.sparse), default=1)
        self.granularity = self.cluster_size
        self.keeps_places = True
        if source.descriptor.parent_name is not None:
            self.backing = BackingReference(source.descriptor.parent_name, "vmdk")
        self._descriptor_offset, self._descriptor_room = source.descriptor_offset, source.descriptor_room
        self._cache = cache
        self._starts = [extent.start for extent in extents]
        self._ends = [extent.start + extent.size for extent in extents]
        self._compressed = {extent: CompressedGrains(extent) for extent in self.sparse if extent.header.compressed}
        self._loading: dict[tuple[SparseExtent, int], asyncio.Task[None]] = {}
        if len(extents) == 1:
            # One extent answers for itself: the way through the driver costs more than its answer.
            self.lookup = extents[0].lookup  # type: ignore[method-assign]
        # Only of a writable image:
        self._begun = False
        """The image is marked as changed: a new CID is on disk."""
        self._pending: list[SparseExtent] = []
        """Extents that are to be marked as changed before anything in their tables is."""
        self._wanted = False
        """A synchronous method found that something must be awaited before the image is changed."""
        self._refusal: OSError | None = None
        """Why that was not possible: for the writer, who asks again after ``load``."""
        self._beginning = asyncio.Lock()

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image.

        Options: ``companions``, ``discard`` (``unmap`` punches freed grains out of the file), ``has_backing``, and
        ``sequential``: a writable open of a stream-optimized image takes ``write_compressed`` and nothing else.
        """
        source = await read_source(storage)
        companions: Sequence[Storage] = options.get("companions", ())
        extents, cache = await open_extents(storage, source, companions)
        data = storage
        if companions and source.header is None:
            data = companions[0] if len(companions) == 1 else JoinedStorage(companions, storage.path)
        kind = FlatVmdkDriver if all(isinstance(extent, FlatExtent) for extent in extents) else VmdkDriver
        driver = kind(storage, data, source, extents, cache)
        assert isinstance(driver, cls)
        if not read_only:
            await driver._open_writable(options)
        return driver

    @classmethod
    async def companions(cls, storage: Storage) -> Sequence[Companion]:
        """The files of the extents."""
        return (await read_source(storage)).companions

    async def _open_writable(self, options: Mapping[str, Any]) -> None:
        if self.storage.read_only:
            raise ImageError(self.path, "the file is open read-only")
        self._refuse_writing(sequential=bool(options.get("sequential", False)))
        has_backing = self.backing is not None or bool(options.get("has_backing", False))
        for extent in self.sparse:
            redundant = await read_redundant(extent)
            extent.open_writable(redundant, punch=options.get("discard") == "unmap")
        self._see_backing(has_backing=has_backing)
        self.read_only = False
        self.compressed_only = bool(self._compressed)
        self.keeps_places = not self.sparse
        self._commit = OrderedCommit(self.storage, self._collect, data=[self.data])

    def _refuse_writing(self, *, sequential: bool) -> None:
        """ImageError for what can only be read."""
        for line in self.descriptor.extents if len(self.extents) > 1 or not self.sparse else ():
            if line.access != "RW":
                raise ImageError(self.path, "the extent is read-only", field="extent", value=line.text())
        shared = None if len(self.extents) == 1 else self.descriptor.shared_extent
        if shared is not None:
            raise CorruptImageError(
                self.path, "another extent is in the same place of the file", field="extent", value=shared.text()
            )
        for extent in self.extents:
            problem = ""
            if isinstance(extent, SparseExtent):
                if not extent.header.is_hosted:
                    problem = "extents of this form can only be read"
                elif extent.header.compressed and not sequential:
                    problem = "stream-optimized images can only be read"
                elif extent.header.grain_size != self.cluster_size or extent.start % self.cluster_size:
                    problem = "extents with grains of different sizes, or not aligned to them, can only be read"
            elif not isinstance(extent, FlatExtent) or (self.sparse and extent.start % self.cluster_size):
                problem = "extents of this kind next to others can only be read"
            if problem:
                raise UnsupportedImageError(
                    self.path, problem, field="extent", value=extent.path or extent.kind, hint="open it read-only"
                )

    def accept_backing(self, backing: FormatDriver) -> None:
        """The parent is a VMDK image with the content ID that this one was made on."""
        if not isinstance(backing, VmdkDriver):
            raise ImageError(
                self.path, "the parent of a VMDK image is one, too", field="parentFileNameHint", value=backing.path
            )
        if self.descriptor.parent_cid != backing.descriptor.cid:
            raise ImageError(
                self.path,
                f"{backing.path} has CID {backing.descriptor.cid:08x}: it was written after this image was made on it",
                field="parentCID",
                value=f"{self.descriptor.parent_cid:08x}",
            )

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError for bad options and sizes."""
        cls.check_option_names(options)
        parse_options(size, options)

    @classmethod
    def created_size(cls, size: int, options: Mapping[str, str]) -> int:
        """Whole sectors."""
        return align_up(size, SECTOR_SIZE)

    @classmethod
    def created_companions(cls, path: str, size: int, options: Mapping[str, str]) -> Sequence[str]:
        """The files of the extents of a new image."""
        return created_names(path, parse_options(size, options))

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
        """Make an empty image; ``backing`` is needed with ``backing_file``, for its content ID."""
        parent_cid = NO_PARENT
        if backing is not None:
            if not isinstance(backing, VmdkDriver):
                raise ImageError(backing.path, "the parent of a VMDK image is one, too", field="backing_file")
            parent_cid = backing.descriptor.cid
        await create_vmdk(storage, size, options, companions, parent_cid=parent_cid, has_parent=backing is not None)

    def info(self) -> ImageInfo:
        """The facts of this layer."""
        extents = []
        for extent in self.extents:
            facts: dict[str, Any] = {"virtual-size": extent.size, "filename": extent.path}
            if isinstance(extent, SparseExtent):
                if extent.header.compressed:
                    facts = {"compressed": True, **facts}
                facts["cluster-size"] = extent.header.grain_size
            facts["format"] = extent.kind
            extents.append(facts)
        grains = {extent.header.grain_size for extent in self.sparse}
        only = grains.pop() if len(grains) == 1 and len(self.sparse) == len(self.extents) else None
        specific = {
            "cid": self.descriptor.cid,
            "parent-cid": self.descriptor.parent_cid,
            "create-type": self.descriptor.create_type,
            "extents": extents,
        }
        return ImageInfo(self.name, self.size, only, self.backing, specific=specific)

    # --- the mapping -----------------------------------------------------------------------------------------------

    def _at(self, offset: int) -> Extent:
        return self.extents[bisect_right(self._starts, offset) - 1]

    def lookup(self, offset: int, length: int) -> Run | None:
        """What the extent at ``offset`` has there; a single extent is asked directly."""
        number = bisect_right(self._starts, offset) - 1
        room = self._ends[number] - offset
        return self.extents[number].lookup(offset - self._starts[number], length if length < room else room)

    def iter_runs(self, start: int, end: int) -> RunStream:
        """The mapping of ``[start, end)``, about 1 MiB of grain tables at a time. RequestError(EIO) for a bad entry."""
        return iter_runs(self.extents, self.data, start, end)

    async def load(self, offset: int) -> None:
        """Bring the grain table of ``offset`` into memory; before the first change, mark the image as changed.

        That the mark could not be made is no reader's trouble: it is raised when the writer asks again (``_want``).
        """
        if self._wanted:
            try:
                await self._begin()
            except OSError as error:
                self._refusal, self._wanted = error, False
        extent = self._at(offset)
        if not isinstance(extent, SparseExtent) or extent.has_table(offset - extent.start):
            return
        key = extent, (offset - extent.start) >> extent.table_shift
        task = self._loading.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(extent.load_table(key[1]))
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        await asyncio.shield(task)

    async def read_compressed(self, offset: int) -> tuple[int, bytes]:
        """The compressed grain that contains ``offset``."""
        extent = self._at(offset)
        assert isinstance(extent, SparseExtent)
        start, data = await self._compressed[extent].read(offset - extent.start)
        return extent.start + start, data

    async def write_compressed(self, offset: int, data: ReadBuffer) -> None:
        """Add grains at ``offset``, compressed, to an image opened with ``sequential``; ``flush`` makes them stable.

        ``data`` is whole grains, or ends with what the disk has of its last one; a grain can be written once.
        """
        extent = self._at(offset)
        if self.read_only or not isinstance(extent, SparseExtent) or extent not in self._compressed:
            raise RequestError(errno.EPERM, f"{self.path}: not open for writing compressed grains")
        self._wanted = True
        if extent.needs_mark:
            self._pending.append(extent)
        await self._begin()
        whole = memoryview(data)
        for start in range(0, len(whole), self.cluster_size):
            await self._compressed[extent].write(
                offset + start - extent.start, whole[start : start + self.cluster_size]
            )

    # --- changing it -----------------------------------------------------------------------------------------------

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """Everything that is allocated is overwritten in place; the first such look of an open waits for a new CID."""
        self._refuse_when_sequential()
        if not self._begun:
            self._want()
            return None
        number = bisect_right(self._starts, offset) - 1
        room = self._ends[number] - offset
        return self.extents[number].lookup_writable(offset - self._starts[number], length if length < room else room)

    def _refuse_when_sequential(self) -> None:
        if self._compressed:
            raise RequestError(errno.EPERM, f"{self.path}: compressed grains are not written in place")

    def _ready(self, extent: SparseExtent) -> bool:
        """Whether the tables of ``extent`` may be changed now; if not, ``load`` will have to be awaited."""
        assert extent.space is not None
        if extent.needs_mark:
            self._pending.append(extent)
        elif self._begun and not self._is_crowded(extent):
            return True
        self._want()
        return False

    def _want(self) -> None:
        """Let the next ``load`` do what must come first; OSError if that has just failed."""
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal
        self._wanted = True

    def _is_crowded(self, extent: SparseExtent) -> bool:
        assert extent.space is not None
        return self._cache.crowded or len(extent.space.quarantine) > MAX_QUARANTINE

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """New grains at the end of the extent's file, or where grains have become free."""
        extent = self._at(offset)
        assert isinstance(extent, SparseExtent)
        self._refuse_when_sequential()
        if not self._ready(extent):
            return None
        inside = offset - extent.start
        return extent.allocate(inside, min(length, align_up(extent.size - inside, extent.header.grain_size)))

    async def prepare(self, offset: int, length: int) -> None:
        """The grain table in memory, the image marked as changed, and not too many changes waiting."""
        await self.load(offset)

    def publish(self, allocation: Allocation) -> None:
        """Point the grain table at the new grains."""
        allocation.token[0].publish(allocation)

    def abandon(self, allocation: Allocation) -> None:
        """The grains become free with the next commit."""
        allocation.token[0].abandon(allocation)

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Zeroed grains, or without a parent unallocated ones; 0 where the format has neither."""
        extent = self._at(offset)
        if not isinstance(extent, SparseExtent):
            return 0
        self._refuse_when_sequential()
        if not self._ready(extent):
            return None
        inside = offset - extent.start
        return extent.zero(inside, min(length, extent.size - inside), unmap=unmap)

    def discard(self, offset: int, length: int) -> int | None:
        """As ``zero``: what was discarded reads as zeroes."""
        return self.zero(offset, length, unmap=True)

    # --- stability -------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """What must be on disk before anything changes: a new CID, the marks, and room for more changes."""
        async with self._beginning:
            if not self._begun:
                await self._barrier_new_cid()
                self._begun = True
                if len(self.extents) == 1 and not self._compressed:
                    self.lookup_writable = self.extents[0].lookup_writable  # type: ignore[method-assign]
            if self._pending:
                await self._mark_unclean()
            if self._cache.crowded or any(self._is_crowded(extent) for extent in self.sparse):
                await self._commit.settle()
            self._wanted = False

    async def _barrier_new_cid(self) -> None:
        """The image has a new content ID before a byte of it changes.

        Crash after the barrier: nothing has changed, and children of this image are refused all the same, which is
        safe. Without it, a child could be opened over a parent that has changed under it.
        The new ID has as many digits as the old one and takes their place, so no other byte of the text changes.
        """
        place = self.descriptor.cid_at
        if place is None:
            return
        offset = self._descriptor_offset + place[0]
        old = bytes(await self.storage.read(offset, place[1]))
        new = with_other_cid(old, secrets.randbits(32))
        await self.storage.write_stable([(offset, new)])
        self.descriptor = replace(self.descriptor, cid=int(new, 16))

    async def _mark_unclean(self) -> None:
        """``uncleanShutdown`` is set before the tables of an extent change.

        A crash may leave a grain table and its redundant copy with different entries; the mark tells others to look.
        No barrier of its own: tables change on disk in a commit only, whose first flush (of the guest data) is of the
        same files and makes the mark stable, too. Crash before that: the tables on disk are as they were.
        """
        marking = list(dict.fromkeys(self._pending))
        for extent in marking:
            await extent.file.write(UNCLEAN_AT, b"\1")
            extent.needs_mark, extent.marked = False, True
        self._pending = [extent for extent in self._pending if extent not in marking]

    def _collect(self, batch: Batch) -> None:
        tables = batch.stage(self._barrier_grain_tables)
        for table in list(self._cache.changed):
            assert isinstance(table, GrainTable)
            sectors = frozenset(table.dirty)
            table.pins += 1  # it must not be read again before it is written
            batch.finally_(table.unpin)
            tables.add(table.pieces(sectors), partial(table.mark_dirty, sectors))
            table.dirty.clear()
        self._cache.changed.clear()
        for extent in self.sparse:
            if extent.space is not None:
                batch.free(extent.space)

    async def _barrier_grain_tables(self, pieces: list[Piece]) -> None:
        """Grain tables and their redundant copies, after the grains they show.

        Crash before or during it: each sector of a table has old entries or new ones, and both point at stable grains;
        a grain that lost its entry is not used again before the barrier is passed. A table and its copy may differ,
        which ``check`` repairs; the first of them alone is ever read.
        """
        await self.data.write_stable(pieces)

    async def flush(self) -> None:
        """Data, then tables; see ``OrderedCommit``."""
        if not self.read_only:
            await self._commit.commit()
            if self.storage is not self.data:  # the descriptor's file: when its flush has failed, so do all others
                await self.storage.flush()

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """Name another parent, by its file and its content ID, in the descriptor.

        A crash leaves the old parent or the new one, perhaps with a descriptor that has lost comments and the disk data
        base (geometry and adapter). ConfigError too where the descriptor leaves no room to do it that way.
        """
        parent_cid = NO_PARENT
        if reference is not None:
            if not isinstance(backing, VmdkDriver):
                raise ConfigError(f"{self.path}: the parent of a VMDK image is one, too, and has to be opened")
            if not self.sparse or not self._descriptor_room:
                raise ConfigError(f"{self.path}: flat extents, or one without a descriptor, cannot have a parent")
            parent_cid = backing.descriptor.cid
        await self.flush()
        storage, start, room = self.storage, self._descriptor_offset, self._descriptor_room
        stored = bytes(await storage.read(start, min(room, storage.size - start)))
        name = None if reference is None else reference.name
        try:
            text, steps = plan_parent(stored.partition(b"\0")[0], room, name, parent_cid)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        for at, data in steps:
            await storage.write_stable([(start + at, data)])
        if steps and not start and storage.grows_zeroed:  # a file of its own, which ends with the text
            await storage.truncate(len(text))
            await storage.flush()
        self.descriptor = Descriptor.parse(text, self.path)
        self.backing = None if reference is None else BackingReference(reference.name, self.name)
        self._see_backing(has_backing=reference is not None)

    def _see_backing(self, *, has_backing: bool) -> None:
        """Something is below, or nothing is."""
        for extent in self.sparse:
            extent.has_backing = has_backing
        self.zeroes_fast = all(extent.zeroed_grains or not has_backing for extent in self.sparse)

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Compare the grain tables with the files and with their redundant copies."""
        from nbdserve.formats.vmdk.check import check_vmdk  # noqa: PLC0415  (check works on drivers)

        if not self.read_only:
            await self._commit.settle()
        return await check_vmdk(self, repair_leaks=repair_leaks, repair_errors=repair_errors)

    async def close(self) -> None:
        """Write everything back, clear the marks, and close the storages whether that succeeded or not."""
        try:
            if not self.read_only:
                await self._commit.settle()
                await self._finish()
        finally:
            await self.data.close()
            if self.storage is not self.data:
                await self.storage.close()

    async def _finish(self) -> None:
        """Files that end with their last grain, and no marks of this open."""
        for extent in self.sparse:
            if extent.marked:
                assert extent.space is not None
                end = align_up(extent.space.end, SECTOR_SIZE)
                if extent.file.size != end:
                    await extent.file.truncate(end)
                await extent.file.flush()
                await extent.file.write_stable([(UNCLEAN_AT, b"\0")])
                extent.marked = False


class FlatVmdkDriver(VmdkDriver):
    """An image of flat extents: its files are the disk, and no tables change."""

    zero = FormatDriver.zero
    discard = FormatDriver.discard
    allocate = FormatDriver.allocate
