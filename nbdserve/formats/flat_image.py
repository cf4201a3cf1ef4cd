"""What the formats with a one-level map and no metadata among the data have in common: lookup, allocation, commit.

The file is a header, the map, and units of one size, one for each allocated block of the disk. A word of the map with a
value in ``[low, high)`` refers to the unit at ``base + word * scale``; the other words say that there is none.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from nbdserve.errors import CorruptImageError, ImageError, RequestError
from nbdserve.extents import DATA, UNALLOCATED, Int64Array, Run, RunArray, RunStream
from nbdserve.formats.append_space import AppendSpace
from nbdserve.formats.base import Allocation, CheckResult, FormatDriver
from nbdserve.formats.flat_map import PAGE_BITS, PAGE_MASK, FlatMap, Scan
from nbdserve.formats.ordered_commit import Batch, OrderedCommit, Piece
from nbdserve.formats.tables import AnyWords, L2Table
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, div_ceil

_COPY: Final = MIB


async def copy_unit(storage: Storage, source: int, target: int, length: int) -> None:
    """Copy ``length`` bytes of the file from ``source`` to ``target``, which do not overlap. Not stable on return."""
    for at in range(0, length, _COPY):
        data = await storage.read(source + at, min(_COPY, length - at))
        await storage.write(target + at, data)


class FlatImage(FormatDriver):
    """One open image. A format calls ``_set_map`` in ``open``, and ``_set_writable`` after it."""

    unit_called: ClassVar[str] = "block"
    """What messages call a unit of the disk."""
    outside_means: ClassVar[str] = "outside the file"
    """What is wrong with a word that refers to no possible unit."""

    space: AppendSpace
    map: FlatMap

    def __init__(self, storage: Storage, size: int, block_size: int) -> None:
        self.storage = self.data = storage
        self.path = storage.path
        self.read_only = True
        self.size = size
        self.cluster_size = self.granularity = self._block = block_size
        self._broken = ""
        """Why nothing may be changed any more."""
        self._outstanding = 0
        """Units allocated, neither published nor abandoned: being written."""
        self._guarded = False
        """``lookup_writable`` has more to do than to look."""

    def _set_map(self, block_map: FlatMap, *, base: int, scale: int, low: int, host_limit: int) -> None:
        """``host_limit``: where the file ends."""
        self.map = block_map
        self._recent = block_map.recent
        self._base, self._scale, self._step = base, scale, self._block // scale
        self._low = low
        self._set_host_limit(host_limit)

    def _set_host_limit(self, host_limit: int) -> None:
        self._high = max(self._low, div_ceil(host_limit - self._base, self._scale))

    def _set_writable(self, space: AppendSpace) -> None:
        self.read_only = False
        self.space = space
        self._commits = OrderedCommit(self.storage, self._collect)

    async def _sound_scan(self) -> Scan:
        """``scan`` of an image to be opened writable. ImageError if it cannot be.

        Two blocks that share their place, or one outside the file, keep it from being changed.
        """
        if self.storage.read_only:
            raise ImageError(self.path, "the file is open read-only")
        found = await self.scan()
        for field, faulty, problem in (
            ("with a place of their own", found.duplicates, "share their place with another one"),
            ("inside the file", found.outside, f"are {self.outside_means}"),
        ):
            if faulty:
                raise CorruptImageError(
                    self.path,
                    f"{len(faulty)} {self.unit_called}s {problem}, "
                    f"first that at guest offset {faulty[0] * self._block:#x}",
                    field=f"{self.unit_called}s {field}",
                    value=found.allocated - len(faulty),
                    hint="it can be read; image check -r all",
                )
        return found

    # --- the meaning of words, the format's ------------------------------------------------------------------------

    @abstractmethod
    def _kind(self, word: int) -> int:
        """UNALLOCATED or ZERO for a word that refers to no unit, -1 for one that should but cannot."""

    @abstractmethod
    def _kinds(self, words: AnyWords) -> npt.NDArray[np.uint8]:
        """DATA, UNALLOCATED or ZERO of every word; DATA also for one that refers to an impossible unit."""

    # --- reading the mapping ---------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run | None:
        """What this layer has at ``offset``; EIO where the word is invalid."""
        block, inside = divmod(offset, self._block)
        table = self._recent.get(block >> PAGE_BITS) or self.map.find(block >> PAGE_BITS)
        if table is None:
            return None
        entries = table.entries
        index = block & PAGE_MASK
        word = entries[index]
        run = self._block - inside
        if not self._low <= word < self._high:
            return self._lookup_special(entries, index, offset, length)
        if run < length:
            expected, end = word + self._step, min(len(entries), index + 1 + div_ceil(length - run, self._block))
            index += 1
            while index < end and entries[index] == expected and expected < self._high:
                run += self._block
                index += 1
                expected += self._step
            length = min(length, run)
        return DATA, length, self._base + word * self._scale + inside

    def _lookup_special(self, entries: memoryview[int], index: int, offset: int, length: int) -> Run:
        word = entries[index]
        kind = self._kind(word)
        if kind < 0:
            raise RequestError(errno.EIO, f"{self.path}: invalid map entry {word:#x} for guest offset {offset:#x}")
        run = self._block - offset % self._block
        end = len(entries)
        index += 1
        while run < length and index < end and entries[index] == word:
            run += self._block
            index += 1
        return kind, min(run, length), -1

    async def load(self, offset: int) -> None:
        """Bring the page of the map that has ``offset`` into memory.

        If it is there and too many pages differ from the disk, they are written back: who reads does not wait for it.
        """
        page = offset // self._block >> PAGE_BITS
        if self.map.find(page) is None:
            await self.map.load(page)
        elif not self.read_only and self.map.cache.crowded:
            await self._commits.commit()

    async def iter_runs(self, start: int, end: int) -> RunStream:
        """The mapping of ``[start, end)``, 256 Ki blocks at a time. RequestError(EIO) for an invalid word."""
        block = self._block
        async for first, words in self.map.words(start // block, div_ceil(end, block) if end > start else 0):
            kind = self._kinds(words)
            values = words.astype(np.int64)
            data = kind == DATA
            bad = data & ((values < self._low) | (values >= self._high))
            if bad.any():
                at = int(bad.argmax())
                raise RequestError(
                    errno.EIO,
                    f"{self.path}: invalid map entry {int(words[at]):#x} for guest offset {(first + at) * block:#x}",
                )
            starts = (np.arange(len(words), dtype=np.int64) + first) * block
            host = np.where(data, values * self._scale + self._base, -1)
            cut = np.maximum(starts, start)
            host = np.where(data, host + cut - starts, -1)
            yield RunArray(cut, np.minimum(starts + block, end) - cut, kind, host).coalesced()

    def units_of(self, words: AnyWords) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
        """For ``FlatMap.scan``: the unit each word refers to, counted from the first possible one."""
        values = words.astype(np.int64) - self._low
        units, rest = np.divmod(values, self._step)
        units[rest != 0] = -1
        return units, self._kinds(words) == DATA

    async def scan(self) -> Scan:
        """What the map refers to, in units counted from the first possible one."""
        return await self.map.scan(self.units_of, div_ceil(self._high - self._low, self._step))

    # --- changing the mapping --------------------------------------------------------------------------------------

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """Data is overwritten in place; anything else is to be allocated."""
        run = self.lookup(offset, length)
        if self._guarded and not self._is_admitted(run):
            return None
        if run is None or run[0] == DATA:
            return run
        return UNALLOCATED, run[1], -1

    def _is_admitted(self, run: Run | None) -> bool:
        """Whether ``run`` may be given to who wants to write; False sends him to ``load``. RequestError: nobody may."""
        self._check_whole()
        return True

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """Consecutive units for consecutive blocks of one page of the map that have none."""
        self._check_whole()
        first = offset // self._block
        table = self.map.find(first >> PAGE_BITS)
        if table is None or self.map.cache.crowded or not self._is_marked():
            return None
        index = first & PAGE_MASK
        entries = table.entries
        most = min(len(entries) - index, div_ceil(length, self._block))
        wanted = 1
        while wanted < most and not self._low <= entries[index + wanted] < self._high:
            wanted += 1
        host_offset, count, zeroed = self.space.take(wanted)
        table.pins += 1
        self._outstanding += count
        return Allocation(offset, min(length, count * self._block), host_offset, zeroed, (table, index, count))

    async def prepare(self, offset: int, length: int) -> None:
        """The page of the map in memory, the image marked as in use, and not too many changes waiting."""
        if self.map.cache.crowded:
            await self._commits.commit()
        await self._mark()
        await self.map.load(offset // self._block >> PAGE_BITS)

    def _is_marked(self) -> bool:
        """The header says whatever it has to before the map is changed."""
        return True

    async def _mark(self) -> None:
        """Make ``_is_marked`` true."""

    def publish(self, allocation: Allocation) -> None:
        """Point the words at the new units."""
        table, index, count = allocation.token
        word = (allocation.host_offset - self._base) // self._scale
        for at in range(index, index + count):
            table.entries[at] = word
            word += self._step
        table.touch(index, index + count)
        table.pins -= 1
        self._outstanding -= count
        end = allocation.host_offset + count * self._block
        if word > self._high:
            self._set_host_limit(end)

    def abandon(self, allocation: Allocation) -> None:
        """The units are free after the next commit."""
        table, _, count = allocation.token
        table.pins -= 1
        self._outstanding -= count
        self.space.free(allocation.host_offset, count)

    def _check_whole(self) -> None:
        if self._broken:
            raise RequestError(errno.EIO, self._broken)

    def _writable_page(self, offset: int) -> tuple[L2Table, int] | None:
        """The page and index of the block at ``offset``, to be changed now. None: ``load`` it."""
        block = offset // self._block
        table = self.map.find(block >> PAGE_BITS)
        return None if table is None or self.map.cache.crowded else (table, block & PAGE_MASK)

    # --- stability -------------------------------------------------------------------------------------------------

    def _collect(self, batch: Batch) -> None:
        batch.free(self.space)
        self.map.collect(batch, batch.stage(self._barrier_map))

    async def _barrier_map(self, pieces: list[Piece]) -> None:
        """Words of the map appear, in any order; at the end all of them are stable.

        Crash before the barrier: each word is old or new, for a word of 4 bytes is inside one sector. An old one refers
        to a unit that nobody has reused, for it is in quarantine; a new one to a unit whose data is stable.
        """
        await self.storage.write_stable(pieces)

    async def flush(self) -> None:
        """Commit everything published so far."""
        if not self.read_only:
            await self._commits.commit()

    def _stop_writing(self, reason: str) -> None:
        self._broken = reason
        self._guarded = True

    async def _finish(self) -> None:
        """The last changes before a writable image is closed; what was published is committed."""

    async def close(self) -> None:
        """Write everything back, and close the storage whether that succeeded or not."""
        try:
            if not self.read_only:
                await self._commits.settle()
                if not self._broken:
                    await self._finish()
        finally:
            await self.storage.close()

    # --- checking --------------------------------------------------------------------------------------------------

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Compare the map with itself, with the header, and with the file.

        A repair works on the file; the image is to be opened anew.
        """
        if not self.read_only:
            await self._commits.settle()
            if repair_leaks or repair_errors:
                self._stop_writing(f"{self.path}: repaired since it was opened, open it anew")
        return await self._check_file(repair_leaks=repair_leaks, repair_errors=repair_errors)

    @abstractmethod
    async def _check_file(self, *, repair_leaks: bool, repair_errors: bool) -> CheckResult:
        """The format's check of what is on disk."""
