"""What making a QED and a qcow image has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption
from nbdserve.storage.base import Storage

NOCOW: Final = CreateOption("nocow", "Turn off copy-on-write (valid only on btrfs)", "off")
PREALLOCATION: Final = CreateOption("preallocation", "Preallocation mode (allowed values: off, falloc, full)", "off")
SIZE: Final = CreateOption("size", "Virtual disk size")


def parse_preallocation(options: Mapping[str, str]) -> str:
    """``off``, ``falloc`` or ``full``; ConfigError for anything else."""
    preallocation = options.get("preallocation", "off")
    if preallocation not in ("off", "falloc", "full"):
        raise ConfigError(f"preallocation={preallocation}: expects one of off, falloc, full")
    return preallocation


async def write_empty(storage: Storage, header: bytes, end: int, preallocation: str) -> None:
    """Make ``storage`` the ``header`` and zeroes up to ``end``; what it held is lost.

    The header is written last and behind a barrier: before, the file is no image, from then on a complete one.
    ``preallocation`` is of these bytes: data clusters never have a place before they are written.
    """
    await storage.truncate(0)
    await storage.truncate(end)
    if not storage.grows_zeroed or preallocation != "off":
        await storage.zero(0, end, unmap=False)
    await storage.flush()
    await storage.write_stable([(0, header)])
