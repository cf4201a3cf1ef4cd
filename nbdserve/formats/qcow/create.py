"""Making qcow images, version 1: the header, the backing file's name and an empty L1 table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption
from nbdserve.formats.create_options import parse_backing
from nbdserve.formats.qcow.layout import MAX_L1_BYTES, Header
from nbdserve.formats.two_level.create import (
    NOCOW,
    PREALLOCATION,
    SIZE,
    parse_preallocation,
    write_empty,
)
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up

CREATE_OPTIONS: Final = (
    CreateOption("backing_file", "File name of a base image"),
    CreateOption("backing_fmt", "Format of the backing image; the header has no room for it, so give it at every use"),
    CreateOption("encrypt.format", "Encrypt the image, format choices: 'aes'"),
    CreateOption("encrypt.key-secret", "ID of the secret that provides the AES encryption key"),
    CreateOption("encryption", "Encrypt the image with format 'aes'", "off"),
    NOCOW,
    PREALLOCATION,
    SIZE,
)

# QEMU's: clusters of one sector when there is a backing file, so that nothing has to be copied from it.
ALONE: Final = (12, 9)
OVER_BACKING: Final = (9, 12)
"""``(cluster_bits, l2_bits)``."""


def plan_header(size: int, options: Mapping[str, str]) -> tuple[Header, str]:
    """The header of a new image, and the preallocation. ConfigError names a bad option."""
    preallocation = parse_preallocation(options)
    for name in ("encryption", "encrypt.format", "encrypt.key-secret"):
        if options.get(name, "off") not in ("off", "no", "false", "n"):
            raise ConfigError(f"{name}={options[name]}: creating encrypted qcow images is not supported")
    declared = parse_backing(options)
    backing = None if declared is None else declared[0]
    size = align_up(size, SECTOR_SIZE)
    if size == 0:
        raise ConfigError("a qcow image cannot have 0 bytes")
    cluster_bits, l2_bits = ALONE if backing is None else OVER_BACKING
    header = Header(size=size, cluster_bits=cluster_bits, l2_bits=l2_bits, l1_table_offset=0, backing_name=backing)
    if header.l1_entries * 8 > MAX_L1_BYTES:
        most = MAX_L1_BYTES // 8 << cluster_bits + l2_bits
        raise ConfigError(f"a disk of {size} bytes is larger than the {most} a qcow image can have here")
    try:
        offset = len(header.build())
    except ValueError as error:
        raise ConfigError(f"backing_file: {error}") from None
    return Header(
        size=size, cluster_bits=cluster_bits, l2_bits=l2_bits, l1_table_offset=offset, backing_name=backing
    ), preallocation


async def create_qcow(storage: Storage, size: int, options: Mapping[str, str]) -> None:
    """Make ``storage`` an empty qcow image of ``size`` bytes (rounded up to whole sectors); what it held is lost."""
    header, preallocation = plan_header(size, options)
    end = header.l1_table_offset + align_up(header.l1_entries * 8, SECTOR_SIZE)
    await write_empty(storage, header.build(), end, preallocation)
