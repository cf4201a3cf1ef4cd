"""Making raw-cow images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption, FormatDriver
from nbdserve.formats.create_options import parse_backing
from nbdserve.formats.raw_cow.layout import (
    HEADER_SIZE,
    MAX_BITMAP_BYTES,
    MAX_CLUSTER_SIZE,
    MIN_CLUSTER_SIZE,
    Header,
    stored_time,
)
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, is_power_of_two, parse_size

CREATE_OPTIONS: Final = (
    CreateOption("size", "Virtual disk size"),
    CreateOption("backing_file", "File name of a base image"),
    CreateOption("backing_fmt", "Image format of the base image"),
    CreateOption(
        "raw_file", "File name of the raw image that takes the writes; one that is there has its size, and is kept"
    ),
    CreateOption("cluster_size", "What one bit of the bitmap stands for", "65536"),
)


def plan_header(size: int, options: Mapping[str, str]) -> Header:
    """The header an image with these options gets; ``size`` is rounded up to whole sectors. ConfigError."""
    raw_file = options.get("raw_file")
    if not raw_file:
        raise ConfigError("raw-cow images need raw_file, the name of the raw image that takes the writes")
    backing_file, backing_format = parse_backing(options) or (None, None)
    try:
        cluster_size = parse_size(options.get("cluster_size", "65536"))
    except ValueError as error:
        raise ConfigError(f"cluster_size: {error}") from None
    if not is_power_of_two(cluster_size) or not MIN_CLUSTER_SIZE <= cluster_size <= MAX_CLUSTER_SIZE:
        raise ConfigError(
            f"cluster_size={cluster_size}: must be a power of two between {MIN_CLUSTER_SIZE} and {MAX_CLUSTER_SIZE}"
        )
    header = Header(
        size=align_up(size, SECTOR_SIZE),
        raw_file=raw_file,
        backing_file=backing_file,
        backing_format=backing_format,
        cluster_size=cluster_size,
    )
    check_size(header)
    try:
        header.build()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return header


def check_size(header: Header) -> None:
    """ConfigError when the disk is larger than its bitmap may be."""
    if header.bitmap_bytes > MAX_BITMAP_BYTES:
        most = (MAX_BITMAP_BYTES * 8) * header.cluster_size
        raise ConfigError(
            f"a disk of {header.size} bytes: with cluster_size={header.cluster_size} it has at most {most}, "
            "use a larger cluster_size"
        )


async def create_raw_cow(
    storage: Storage, raw: Storage, size: int, options: Mapping[str, str], *, backing: FormatDriver | None = None
) -> None:
    """Make ``storage`` an image of ``size`` bytes over ``raw``, no bit of it set. ConfigError before a file is touched.

    What the raw file holds stays there; a new one, still empty, gets the size of the disk. The header is written last
    and behind a barrier: before, the file is no raw-cow image, from then on it is a complete one.
    """
    header = plan_header(size, options)
    header = replace(header, mtime=mtime_of(backing))
    await write_image(storage, raw, header, bytes(header.end_offset - header.bitmap_offset))


def mtime_of(backing: FormatDriver | None) -> int:
    """When the backing file was last changed, as the header's 32 bits have it; 0 when that is not known."""
    if backing is None:
        return 0
    try:
        return stored_time(Path(backing.storage.path).stat().st_mtime)
    except OSError:
        return 0


async def write_image(storage: Storage, raw: Storage | None, header: Header, bitmap: bytes) -> None:
    """Replace what ``storage`` holds by an image with this ``bitmap``; ``raw`` grows to its size."""
    await storage.truncate(0)
    await storage.truncate(header.end_offset)
    if not storage.grows_zeroed:
        await storage.zero(0, HEADER_SIZE)
    if raw is not None:
        if raw.size < header.size:
            await raw.truncate(header.size)
        await raw.flush()
    if any(bitmap) or not storage.grows_zeroed:
        await storage.write(header.bitmap_offset, bitmap)
    await storage.flush()
    # Only a complete image gets its header: a crash before this leaves a file that nobody takes for raw-cow.
    await storage.write_stable([(0, header.build())])
