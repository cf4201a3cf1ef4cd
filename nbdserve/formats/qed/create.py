"""Making QED images: what the options mean, and the writing. The header, then the L1 table; nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption
from nbdserve.formats.create_options import parse_backing
from nbdserve.formats.qed import layout
from nbdserve.formats.qed.layout import Header
from nbdserve.formats.two_level.create import (
    NOCOW,
    PREALLOCATION,
    SIZE,
    parse_preallocation,
    write_empty,
)
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, is_power_of_two, parse_size

DEFAULT_CLUSTER_SIZE: Final = 65536
DEFAULT_TABLE_SIZE: Final = 4

CREATE_OPTIONS: Final = (
    CreateOption("backing_file", "File name of a base image"),
    CreateOption("backing_fmt", "Image format of the base image"),
    CreateOption("cluster_size", "Cluster size (in bytes)", str(DEFAULT_CLUSTER_SIZE)),
    NOCOW,
    PREALLOCATION,
    SIZE,
    CreateOption("table_size", "L1/L2 table size (in clusters)", str(DEFAULT_TABLE_SIZE)),
)


@dataclass(frozen=True, slots=True)
class Options:
    """The creation options, checked."""

    cluster_size: int
    table_size: int
    """Clusters."""
    backing: tuple[str, str] | None
    """Name and format."""
    preallocation: str


def _number(options: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    try:
        value = parse_size(options.get(name, str(default)))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    if not is_power_of_two(value) or not low <= value <= high:
        raise ConfigError(f"{name}={value}: must be a power of two between {low} and {high}")
    return value


def parse_options(options: Mapping[str, str]) -> Options:
    """The options as after ``-o``; ConfigError names a bad one. ``nocow`` acts before the file is opened."""
    return Options(
        cluster_size=_number(
            options, "cluster_size", DEFAULT_CLUSTER_SIZE, layout.MIN_CLUSTER_SIZE, layout.MAX_CLUSTER_SIZE
        ),
        table_size=_number(options, "table_size", DEFAULT_TABLE_SIZE, 1, layout.MAX_TABLE_CLUSTERS),
        backing=parse_backing(options),
        preallocation=parse_preallocation(options),
    )


def plan_header(size: int, options: Options) -> Header:
    """The header of a new image of ``size`` bytes, rounded up to whole sectors. ConfigError if it cannot be."""
    features, name = 0, None
    if options.backing is not None:
        name, fmt = options.backing
        features = layout.FEATURE_BACKING | (layout.FEATURE_RAW_BACKING if fmt == "raw" else 0)
    header = Header(
        cluster_size=options.cluster_size,
        table_size=options.table_size,
        header_size=1,
        l1_table_offset=options.cluster_size,
        image_size=align_up(size, SECTOR_SIZE),
        features=features,
        backing_name=name,
    )
    if header.image_size > header.max_image_size:
        raise ConfigError(
            f"a disk of {size} bytes is larger than the {header.max_image_size} that cluster_size="
            f"{options.cluster_size} and table_size={options.table_size} can map: make one of them larger"
        )
    try:
        header.build()
    except ValueError as error:
        raise ConfigError(f"backing_file: {error}") from None
    return header


async def create_qed(storage: Storage, size: int, options: Mapping[str, str]) -> None:
    """Make ``storage`` an empty QED image of ``size`` bytes (rounded up to whole sectors); what it held is lost."""
    parsed = parse_options(options)
    header = plan_header(size, parsed)
    end = header.l1_table_offset + header.table_bytes
    await write_empty(storage, header.build(), end, parsed.preallocation)
