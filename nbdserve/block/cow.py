"""The write engine: copy-on-write, zeroing and discarding for every format.

One lock is held at a time, for one stretch of the mapping, so that locks cannot wait for each other in a circle.
After a lock is taken the mapping is asked again: it may have changed while waiting.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, cast

import numpy as np

from nbdserve.block.chain import NEEDS_TABLE, resolve
from nbdserve.block.mapping import map_chain
from nbdserve.block.pieces import zero_pieces
from nbdserve.errors import RequestError
from nbdserve.extents import DATA, UNALLOCATED, ZERO, Run
from nbdserve.formats.base import Allocation
from nbdserve.formats.probe import PROBE_LENGTH, format_of
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import KIB, MIB, SECTOR_SIZE, align_down, align_up

if TYPE_CHECKING:
    from nbdserve.block.node import Node

_STRETCH: Final = 256 * MIB
"""The longest range of the mapping that is changed under one lock and in one turn of the event loop."""
_ZERO_BY_STORAGE: Final = 64 * KIB
"""Zeroes shorter than this are written along with the data; longer ones are left to fallocate."""
_ZERO_STEP: Final = MIB
"""New space that is zeroed under one lock."""

Content = TypeVar("Content", memoryview, range)
"""Bytes of the guest, or which they are."""
Filling: TypeAlias = Callable[[Allocation], Awaitable[None]]
"""Puts what the allocation is to hold into new space."""


async def write(node: Node, offset: int, data: memoryview) -> None:
    """Write ``data``, allocating and filling clusters where there are none to overwrite."""
    if node.guard_probed_raw:
        first, last = _unguarded(node, offset, offset + len(data))
        await _write_guarded(node, offset, data[: first - offset])
        await _write_guarded(node, last, data[last - offset :])
        offset, data = first, data[first - offset : last - offset]
        if not data:
            return
    if node.detect_zeroes != "off" and is_zero(data):
        await zero(node, offset, len(data), unmap=node.detect_zeroes == "unmap" and node.unmap)
        return
    position, total = 0, len(data)
    while position < total:
        at = offset + position
        kind, length, _ = await _lookup_writable(node, at, total - position)
        part = data[position : position + length]
        if kind == DATA:
            position += await _overwrite(node, at, part)
        else:
            position += await _write_new(node, at, part)


async def _lookup_writable(node: Node, offset: int, length: int) -> Run:
    while (run := node.top.lookup_writable(offset, length)) is None:
        await node.top.load(offset)
    return run


async def _overwrite(node: Node, offset: int, data: memoryview) -> int:
    async with node.locks.shared(offset, offset + len(data)):
        kind, length, host_offset = await _lookup_writable(node, offset, len(data))
        if kind != DATA:
            return 0
        await node.data.write(host_offset, data[:length])
        return length


async def _write_new(node: Node, offset: int, data: memoryview) -> int:
    """Write the start of ``data`` to newly allocated space; the bytes written (0: the mapping changed, look again)."""

    async def fill(allocation: Allocation) -> None:
        inside = allocation.offset + allocation.length - offset
        await node.data.write_all(await content(node, allocation, offset, data[:inside]))

    return await _change_new(node, offset, len(data), fill)


async def _zero_new(node: Node, offset: int, length: int, *, unmap: bool) -> int:
    """As ``_write_new``, of zeroes: the storage makes them. Offset and length are multiples of a sector."""

    async def fill(allocation: Allocation) -> None:
        start, stop = allocation.offset, allocation.offset + allocation.length
        end = min(offset + length, stop)
        pieces: list[tuple[int, ReadBuffer]] = []
        await _fill(node, allocation, start, offset, pieces)
        await _fill(node, allocation, end, stop, pieces)
        if pieces:
            await node.data.write_all(pieces)
        await node.data.zero(allocation.host_offset + offset - start, end - offset, unmap=unmap)

    return await _change_new(node, offset, length, fill)


async def _change_new(node: Node, offset: int, length: int, fill: Filling) -> int:
    """Let ``fill`` change the start of the range in new space; the bytes done (0: there is a place for it by now)."""
    top = node.top
    end = offset + length
    async with node.locks.exclusive(align_down(offset, top.cluster_size), align_up(end, top.cluster_size)):
        kind, length, _ = await _lookup_writable(node, offset, length)
        if kind == DATA:
            return 0
        start = align_down(offset, top.granularity)
        allocation = await fill_new(node, start, align_up(offset + length, top.granularity) - start, fill)
        return min(offset + length, start + allocation.length) - offset


async def fill_new(node: Node, start: int, length: int, fill: Filling) -> Allocation:
    """Allocate the start of the range, whole units that are held exclusively, ``fill`` the space, and show it."""
    top = node.top
    while (allocation := top.allocate(start, length)) is None:
        await top.prepare(start, length)
    try:
        await fill(allocation)
    except BaseException:
        top.abandon(allocation)
        raise
    node.publish(allocation)
    return allocation


async def content(
    node: Node, allocation: Allocation, offset: int, data: Content
) -> list[tuple[int, ReadBuffer | Content]]:
    """What is to be written to the host for ``data`` and, around it, what its clusters read as so far.

    ``data`` that is not read so far is the range of the guest itself, of whole sectors.

    A sector that ``data`` covers in part is one piece: were it written in two, and the host space is still mapped on
    disk (a zeroed cluster that kept its space), a crash in between would show a mixture.
    """
    end = offset + len(data)
    start, stop = allocation.offset, allocation.offset + allocation.length
    first, last = max(start, align_down(offset, SECTOR_SIZE)), min(stop, align_up(end, SECTOR_SIZE))
    sectors: ReadBuffer | Content = data
    if first < offset or end < last:
        parts = await old_bytes(node, first, offset), cast(ReadBuffer, data), await old_bytes(node, end, last)
        sectors = b"".join(parts)
    around: list[tuple[int, ReadBuffer]] = []
    await _fill(node, allocation, start, first, around)
    await _fill(node, allocation, last, stop, around)
    return [(allocation.host_offset + first - start, sectors), *around]


async def old_bytes(node: Node, start: int, end: int) -> bytearray:
    """What the guest range reads as; past the end of the disk zeroes, so that nothing stale appears when it grows."""
    old = bytearray(end - start)
    inside = min(end, node.size) - start
    if inside > 0:
        zero_pieces(memoryview(old), await node.read_pieces_locked(start, memoryview(old)[:inside]))
    return old


async def _fill(node: Node, allocation: Allocation, start: int, end: int, pieces: list[tuple[int, ReadBuffer]]) -> None:
    """Make the part of ``allocation`` behind the guest range hold what that reads as: add to ``pieces``, or zero it."""
    if start == end:
        return
    host_offset = allocation.host_offset + start - allocation.offset
    inside = min(end, node.size) - start
    if inside > 0 and not await reads_zero(node, start, inside):
        pieces.append((host_offset, await old_bytes(node, start, end)))
    elif not allocation.zeroed:
        if end - start < _ZERO_BY_STORAGE:
            pieces.append((host_offset, bytes(end - start)))
        else:
            await node.data.zero(host_offset, end - start)


async def reads_zero(node: Node, offset: int, length: int) -> bool:
    """Whether the mapping alone tells that the range reads as zeroes."""
    return await _zero_run(node, offset, length) == (True, length)


async def _zero_run(node: Node, offset: int, length: int) -> tuple[bool, int]:
    """Whether the mapping alone tells that the start of the range reads as zeroes, and how far this goes."""
    position, end = offset, offset + length
    zeroes = False
    while position < end:
        kind, run, index, _ = resolve(node.layers, position, end - position)
        if kind == NEEDS_TABLE:
            await node.layers[index].load(position)
            continue
        if position == offset:
            zeroes = kind == ZERO
        elif zeroes is not (kind == ZERO):
            break
        position += run
    return zeroes, position - offset


async def zero(node: Node, offset: int, length: int, *, unmap: bool, fast: bool = False) -> None:
    """Make the range read as zeroes: in the mapping where the format can, else in place, else by writing."""
    end = offset + length
    guarded: list[tuple[int, int]] = []
    if node.guard_probed_raw:
        first, last = _unguarded(node, offset, end)
        guarded = [(offset, first), (last, end)]
        offset, end = first, last
    top = node.top
    if fast and not top.zeroes_fast:
        raise OSError(errno.ENOTSUP, "the image cannot be zeroed faster than it is written")
    in_mapping = top.can("zero")
    while offset < end:
        start = align_up(offset, top.granularity)
        stop = end if end == node.size else align_down(end, top.granularity)
        if start > offset or stop <= start:
            part = min(start if start > offset else end, end) - offset
            zeroed = await _zero_rest_too(node, offset, part, unmap=unmap)
            offset += zeroed or await _zero_data(node, offset, part, unmap=unmap, fast=False)
            continue
        stop = min(stop, start + _STRETCH)
        done: int | None = 0
        if in_mapping:
            async with node.locks.exclusive(align_down(start, top.cluster_size), align_up(stop, top.cluster_size)):
                while (done := node.zero_mapping(start, stop - start, unmap=unmap)) is None:
                    await top.load(start)
            if not done and start % top.cluster_size:
                stop = min(stop, align_up(start, top.cluster_size))  # the mapping may be asked again from there on
        offset = start + (done or await _zero_data(node, start, stop - start, unmap=unmap, fast=fast))
    # The guarded ends come last, so that a fast zero that is refused has left everything as it was.
    for start, stop in guarded:
        await _write_guarded(node, start, memoryview(bytes(stop - start)))


async def _zero_rest_too(node: Node, offset: int, length: int, *, unmap: bool) -> int:
    """Zero the whole unit of the mapping a part of which is to be zeroed, if it holds nothing else; the bytes done.

    A few zeroes over a hole of the backing file then take a flag, and not a cluster of data.
    """
    top = node.top
    start = align_down(offset, top.granularity)
    stop = min(start + top.granularity, node.size)
    if stop - start == length or not top.zeroes_with_rest:
        return 0
    async with node.locks.exclusive(align_down(start, top.cluster_size), align_up(stop, top.cluster_size)):
        while (run := top.lookup(start, stop - start)) is None:
            await top.load(start)
        if run[0] not in (UNALLOCATED, ZERO) or run[1] < stop - start:
            return 0
        for first, last in ((start, offset), (offset + length, stop)):
            if first < last:
                async for part in map_chain(node.layers, first, last):
                    if not np.isin(part.kind, (ZERO, UNALLOCATED)).all():
                        return 0
        while (done := node.zero_mapping(start, stop - start, unmap=unmap)) is None:
            await top.load(start)
        return length if done else 0


async def _zero_data(node: Node, offset: int, length: int, *, unmap: bool, fast: bool) -> int:
    """Zero the start of a range the format has no metadata for, in place or in new space; the bytes done.

    What reads as zeroes already is skipped. 0: the mapping changed, look again.
    """
    async with node.locks.shared(offset, offset + length):
        kind, length, host_offset = await _lookup_writable(node, offset, length)
        if kind == DATA:
            await node.data.zero(host_offset, length, unmap=unmap, fast=fast)
            return length
        zeroes, length = await _zero_run(node, offset, min(length, _ZERO_STEP))
        if zeroes:
            return length
    head = -offset % SECTOR_SIZE
    if head or length < _ZERO_BY_STORAGE:
        return await _write_new(node, offset, memoryview(bytes(min(length, head or length))))
    return await _zero_new(node, offset, align_down(length, SECTOR_SIZE), unmap=unmap)


async def discard(node: Node, offset: int, length: int) -> None:
    """Release what the format can release of the range; the rest keeps its content."""
    top = node.top
    end = offset + length
    if node.guard_probed_raw:
        # Zeroes can complete a header, and a discard may be refused silently.
        offset, end = _unguarded(node, offset, end)
    offset = align_up(offset, top.granularity)
    if end < node.size:
        end = align_down(end, top.granularity)
    while offset < end:
        stop = min(end, offset + _STRETCH)
        async with node.locks.exclusive(align_down(offset, top.cluster_size), align_up(stop, top.cluster_size)):
            if top.can("discard"):
                while (done := node.discard_mapping(offset, stop - offset)) is None:
                    await top.load(offset)
            else:
                kind, done, host_offset = await _lookup_writable(node, offset, stop - offset)
                if kind == DATA:
                    await node.data.discard(host_offset, done)
        if not done:
            return
        offset += done


def is_zero(data: memoryview) -> bool:
    """Whether every byte of ``data`` is zero; 12 GB/s, and data that is not zero is mostly told by its first bytes."""
    if any(data[:16]):
        return False
    return not np.frombuffer(data, np.uint8).any()


def _unguarded(node: Node, offset: int, end: int) -> tuple[int, int]:
    """The part of ``[offset, end)`` that no probe looks at."""
    first = min(end, max(offset, PROBE_LENGTH))
    return first, max(first, min(end, node.size - PROBE_LENGTH))


async def _write_guarded(node: Node, offset: int, data: memoryview) -> None:
    """Write to the first or last bytes of a *probed* raw image, which must not turn into another format.

    The next probe would follow whatever header the guest had written there (CVE-2013-1922 and its kin).
    """
    if not data:
        return
    async with node.locks.exclusive(0, node.size):
        ends = []
        for start in (0, max(0, node.size - PROBE_LENGTH)):
            part = bytearray(min(PROBE_LENGTH, node.size))
            zero_pieces(memoryview(part), await node.read_pieces_locked(start, memoryview(part)))
            first, stop = max(start, offset), min(start + len(part), offset + len(data))
            if first < stop:
                part[first - start : stop - start] = data[first - offset : stop - offset]
            ends.append(part)
        if (found := format_of(ends[0], ends[1])) != "raw":
            raise RequestError(
                errno.EPERM,
                f"{node.path}: its format was probed as raw, so a {found} header cannot be written to it "
                "(serve it with an explicit -f raw)",
            )
        _, _, host_offset = await _lookup_writable(node, offset, len(data))
        await node.data.write(host_offset, data)
