"""Room for a second map in an image that has none, as those that QEMU makes: its data area begins further behind.

The data area moves by whole blocks, so nearly all of them stay where they are in the file and have another number; the
few at its beginning move to its end. QEMU's tools can use and check the image after a crash at any point, for only two
sectors change what it means, both of them the header's:

1. The first blocks are copied to the end of the file, behind them is a new map. The header's sector then names that
   map. It has placeholders (``two_maps``) for the blocks that were moved away, and for the one the map itself is in:
   QEMU's next block goes behind it.
2. A second new map, with the blocks' new numbers and no placeholders, is written where the data area began. The header
   then names that map and the new beginning at once.

The header cannot name a map behind 4 GiB. In a file that long the places at its end are reserved instead, by a count of
allocated blocks that is too high for as long as the first blocks move there: a crash meanwhile leaves that count, which
QEMU's check calls an error, though nothing is lost by it. No other order does without. Until the first blocks' space is
free nothing before 4 GiB is, so no second map can be there; to free it, entries have to refer to the end of the file;
what they refer to must be less than the count, for QEMU puts its next block there; and the number of entries stays the
same. So the count is greater than that number, which is the error.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from nbdserve.errors import UnsupportedImageError
from nbdserve.extents import Int64Array
from nbdserve.formats.flat_image import copy_unit
from nbdserve.formats.flat_map import FlatMap, Scan
from nbdserve.formats.tables import AnyWords
from nbdserve.formats.vdi import layout
from nbdserve.formats.vdi.layout import ZEROED, Header
from nbdserve.formats.vdi.two_maps import TwoMaps, placeholder_words
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil

_WORD = 4


def is_wanted(header: Header, found: Scan) -> bool:
    """Whether there is no room, and it can be made: not in a data area with holes. Closing an image fills them."""
    return (
        header.type != layout.TYPE_STATIC
        and header.end <= header.map_offset
        and header.blocks == header.disk_blocks
        and found.allocated == found.end == len(found.used) == header.blocks_allocated
        and TwoMaps.of(header) is None
    )


async def make_room(storage: Storage, header: Header, sector: bytes) -> tuple[Header, bytes]:
    """The header and its sector, with the room made for an image that wants it. OSError."""
    allocated, block = header.blocks_allocated, header.block_size
    shift = _blocks_to_move(header)
    length = align_up(header.disk_blocks * _WORD, SECTOR_SIZE)
    most_placeholders = 2 * (shift + div_ceil(length, block) + 1)
    map_blocks = div_ceil(length + align_up(most_placeholders * _WORD, SECTOR_SIZE), block)
    unused = max(allocated, shift)
    first_map_block = allocated + shift
    map_offset = header.data_offset + first_map_block * block
    if map_offset + map_blocks * block >= layout.OFFSET_LIMIT:
        return await _move_behind_a_count(storage, header, sector, shift)
    await _copy_first(storage, header, min(allocated, shift), unused)
    moved = await _write_map(storage, _map_of(storage, header), map_offset, shift, unused)
    placeholders = [*range(shift), *range(first_map_block, first_map_block + map_blocks)]
    words, entries = placeholder_words(header.disk_blocks, placeholders)
    await storage.write_stable([(map_offset + header.disk_blocks * _WORD, words)])
    header, sector = await _write_header(
        storage,
        replace(header, map_offset=map_offset, blocks=entries, blocks_allocated=moved + len(placeholders)),
        sector,
    )
    return await finish(storage, header, sector)


async def _move_behind_a_count(storage: Storage, header: Header, sector: bytes, shift: int) -> tuple[Header, bytes]:
    """The way without a map at the end of the file, from one that is dense.

    Each step is stable before the next. Crash before the last one: the count is too high, and each block is where the
    map says, its old place or the new one.
    """
    allocated, block = header.blocks_allocated, header.block_size
    moved = replace(header, data_offset=header.data_offset + shift * block)
    maps = TwoMaps.of(moved)
    if allocated < shift or moved.data_offset >= layout.OFFSET_LIMIT or maps is None:
        return header, sector
    _, sector = await _write_header(storage, replace(header, blocks_allocated=allocated + shift), sector)
    await _copy_first(storage, header, shift, allocated)
    await storage.flush()
    await _write_map(storage, _map_of(storage, header), header.map_offset, shift, allocated)
    await storage.flush()
    await _write_map(storage, _map_of(storage, header), maps.other, 0, -shift)
    await storage.flush()
    return await _write_header(storage, replace(moved, map_offset=maps.other), sector)


async def finish(storage: Storage, header: Header, sector: bytes) -> tuple[Header, bytes]:
    """The second step, for an image whose map lies among the data. UnsupportedImageError if it is not such a one."""
    if not header.map_among_data:
        return header, sector
    found = await _map_of(storage, header).scan(_units, layout.ZEROED)
    block = header.block_size
    map_block = (header.map_offset - header.data_offset) // block
    shift = min(int(found.used[0]), map_block) if len(found.used) else _blocks_to_move(header)
    end = max(found.end - shift, 0)
    new = replace(header, map_offset=header.end, data_offset=header.data_offset + shift * block)
    maps = TwoMaps.of(replace(new, blocks=header.disk_blocks))
    own = range(map_block, map_block + div_ceil(header.blocks * _WORD, block))
    if (
        maps is None
        or end - len(found.used) > maps.most
        or new.data_offset > header.map_offset
        or len(found.used) != found.allocated
        or found.outside
        or np.isin(found.used, own).any()
    ):
        raise UnsupportedImageError(
            storage.path,
            "the map lies among the data, in a way that is not known",
            field="map offset",
            value=header.map_offset,
            hint="it can be read; convert the image",
        )
    await _write_map(storage, _map_of(storage, header), new.map_offset, 0, -shift)
    holes = [at - shift for first, count in found.holes(shift) for at in range(first, first + count)]
    words, entries = placeholder_words(header.disk_blocks, holes) if holes else (b"", header.disk_blocks)
    await storage.write_stable([(new.map_offset + header.disk_blocks * _WORD, words)])
    new = replace(new, blocks=entries, blocks_allocated=end)
    header, sector = await _write_header(storage, new, sector)
    await storage.truncate(new.data_offset + end * block)
    return header, sector


async def _copy_first(storage: Storage, header: Header, count: int, target: int) -> None:
    """The first ``count`` blocks, to those from ``target`` on. Not stable on return."""
    base, block = header.data_offset, header.block_size
    for number in range(count):
        await copy_unit(storage, base + number * block, base + (target + number) * block, block)


def _units(words: AnyWords) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    return words.astype(np.int64), words < ZEROED


def _map_of(storage: Storage, header: Header) -> FlatMap:
    return FlatMap(storage, header.map_offset, header.disk_blocks)


def _blocks_to_move(header: Header) -> int:
    """So many that there is room for two maps and some placeholders."""
    need = 2 * (align_up(header.disk_blocks * _WORD, SECTOR_SIZE) + layout.PLACEHOLDER_ROOM)
    return max(1, div_ceil(header.end + need - header.data_offset, header.block_size))


async def _write_map(storage: Storage, source: FlatMap, target: int, below: int, add: int) -> int:
    """Copy a map; blocks ``below`` (0: all of them) get another number. How many entries refer to a block."""
    count = 0
    async for first, words in source.words(0, source.count):
        values = words.astype(np.int64)
        placed = values < ZEROED
        count += int(placed.sum())
        values[placed & (values < below) if below else placed] += add
        await storage.write(target + first * _WORD, values.astype("<u4").tobytes())
    return count


async def _write_header(storage: Storage, header: Header, sector: bytes) -> tuple[Header, bytes]:
    """One sector: the image is the old one or the new one.

    Crash before the flush: either, and what both refer to is stable.
    """
    sector = layout.patched(
        sector,
        {
            layout.MAP_OFFSET_AT: header.map_offset,
            layout.DATA_OFFSET_AT: header.data_offset,
            layout.BLOCKS_AT: header.blocks,
            layout.BLOCKS_ALLOCATED_AT: header.blocks_allocated,
        },
    )
    await storage.write_stable([(0, sector)])
    return header, sector
