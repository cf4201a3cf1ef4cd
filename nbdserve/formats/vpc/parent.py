"""Naming another parent in a VHD: another header with the name of the parent, which the footer puts in force.

A header fills two sectors, so that one written over another could be torn. The new one is written where the old one is
not, complete and stable; then the copy of the footer at the beginning, one sector, says where it is and what type the
image has.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.tables import AnyWords
from nbdserve.formats.vpc import layout
from nbdserve.formats.vpc.create import HEADER_OFFSET
from nbdserve.formats.vpc.image import BAD, blocks_end, metadata_ranges
from nbdserve.formats.vpc.layout import DIFFERENCING, DYNAMIC, DYNAMIC_HEADER_SIZE, DynamicHeader, Footer
from nbdserve.formats.vpc.parents import make_locators
from nbdserve.formats.vpc.space import BlockSpace
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE

_FRONT_END: Final = HEADER_OFFSET + DYNAMIC_HEADER_SIZE


async def name_parent(
    storage: Storage,
    space: BlockSpace,
    footer: Footer,
    header: DynamicHeader,
    words: AnyWords,
    *,
    name: str,
    parent: Footer,
) -> None:
    """Let the image, which ends with its footer behind ``space.end``, have the parent ``name``.

    The header goes to its usual place if it is not there now, or else behind all blocks, where the parent's name goes
    in any case. What was there before stays, unused: some sectors. ConfigError, with nothing changed, for a name that
    cannot be stored.
    """
    place = space.end
    try:
        locators, tail = make_locators(name, place)
        header = replace(
            header,
            parent_uuid=parent.uuid,
            parent_timestamp=parent.timestamp,
            parent_name=Path(name).name,
            locators=locators,
        )
        built = header.build()
    except ValueError as error:
        raise ConfigError(f"{storage.path}: the parent's name {name!r} cannot be stored in a VHD: {error}") from None
    at = HEADER_OFFSET
    if not _front_is_free(footer, header, words):
        at, tail = place + len(tail), tail + built
    end = place + len(tail)
    # Crash between these: the file ends with its footer, which knows the old header, as does the copy in front.
    await storage.write_stable([(end, footer.build())])
    await storage.write_stable([(place, tail), (at, built)])
    await _barrier_footers(storage, replace(footer, disk_type=DIFFERENCING, data_offset=at), end)


async def name_no_parent(
    storage: Storage, space: BlockSpace, footer: Footer, header: DynamicHeader, words: AnyWords
) -> None:
    """Let the differencing image be a dynamic one, in which nothing looks at what the header says of a parent.

    A header behind all blocks comes back to its usual place first: that is where stock tools put their next block. The
    caller cuts off what is there then, for they rely on zeroes; after a crash on the way, the next one who opens it
    here and allocates does.
    """
    standing_alone = replace(footer, disk_type=DYNAMIC)
    if footer.data_offset >= max(header.table_offset + len(words) * layout.ENTRY_SIZE, blocks_end(words, header)):
        if not _front_is_free(footer, header, words):
            raise ConfigError(f"{storage.path}: there is no place for the header of an image without a parent")
        bare = replace(header, parent_uuid=bytes(16), parent_timestamp=0, parent_name="", locators=())
        await storage.write_stable([(HEADER_OFFSET, bare.build())])
        standing_alone = replace(standing_alone, data_offset=HEADER_OFFSET)
    await _barrier_footers(storage, standing_alone, space.end)


async def _barrier_footers(storage: Storage, footer: Footer, end: int) -> None:
    """The header is stable, then the copy of the footer that tells of it, then the footer.

    Crash before the copy is stable: it is the old one or the new one, and both headers are complete. Crash behind it:
    who goes by the footer sees the old header, which nothing has touched; we and stock tools go by the copy, and the
    footer is written anew with the next block.
    """
    await storage.write_stable([(0, footer.build())])
    await storage.write_stable([(end, footer.build())])


def _front_is_free(footer: Footer, header: DynamicHeader, words: AnyWords) -> bool:
    """Whether nothing is where headers usually are."""
    starts = [start for start, _, _ in metadata_ranges(footer, header)[1:]]
    blocks = words[words < BAD]
    if len(blocks):
        starts.append(int(blocks.min()) * SECTOR_SIZE)
    return min(starts) >= _FRONT_END
